"""What every script shares: options, the one way errors end, seeds, the device, loading parts of the base model."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config import DATA_DIR, OUTPUT_DIR, SEED
from cosyvoice.utils.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a script's `main` and leave: a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130."""
    try:
        code = main(None) or 0
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; what was finished is kept", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)


def add_folders(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add `--model-dir`, `--data-dir`, `--output-dir`, as far as `names` (model, data, output) asks."""
    group = parser.add_argument_group("folders")
    if "model" in names:
        group.add_argument("--model-dir", type=Path, help="base model (default: pretrained_models/CosyVoice-300M)")
    if "data" in names:
        group.add_argument("--data-dir", type=Path, default=DATA_DIR, help="parquet files (default: %(default)s)")
    if "output" in names:
        group.add_argument("--output-dir", type=Path, default=OUTPUT_DIR, help="results (default: %(default)s)")


def add_device(parser: argparse.ArgumentParser) -> None:
    choices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=choices, default="auto", help="where to compute (default: %(default)s)")


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=SEED, help="seed of all random draws (default: %(default)s)")


def pick_device(name: str) -> "torch.device":
    """`auto`, `cpu` or `cuda` as a torch device. Raises InputError where CUDA is asked for and missing."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def seed_all(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators from a tuple, so that any step's draws can be made again."""
    import random

    import numpy as np
    import torch

    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def check_writable(folder: Path) -> None:
    """Raise InputError, before any work, where results could not be written."""
    from cosyvoice.utils.file_utils import atomic_write

    with atomic_write(folder / ".writable") as probe:
        probe.touch()
    (folder / ".writable").unlink()


def load_part(model_dir: Path, part: str) -> "nn.Module":
    """`llm` or `flow` of a model folder, built and strictly loaded, in eval mode on the CPU."""
    from cosyvoice.utils.checkpoint import load_strict, read_state_dict
    from cosyvoice.utils.model_yaml import load_model_yaml

    module = load_model_yaml(model_dir / "cosyvoice.yaml", parts=(part,))[part]
    weights = model_dir / f"{part}.pt"
    load_strict(module, read_state_dict(weights), str(weights))
    return module.eval()
