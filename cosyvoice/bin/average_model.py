"""Average the weights of several epochs of one training run: stage 6 of the recipe.

    python cosyvoice/bin/average_model.py --dst_model exp/llm/llm.pt --src_path exp/llm --num 5 --val_best

Of a vocoder's training the generator is written beside it too, as hift.pt, which a model folder needs.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # as a file, it finds the suite only so
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from cosyvoice.runtime.startup import stop_silently

    stop_silently()

from cosyvoice.runtime.command import run
from cosyvoice.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

GENERATOR = "generator."


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dst_model", type=Path, required=True, help="where the average goes")
    parser.add_argument("--src_path", type=Path, required=True, help="folder of epoch_N_whole.pt and .yaml")
    parser.add_argument("--num", type=int, default=5, help="epochs to average (default: %(default)s)")
    parser.add_argument("--val_best", action="store_true", help="those of least held-out loss (default: the last ones)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from cosyvoice.utils.file_utils import save_tensors

    paths = choose(args.src_path, args.num, args.val_best)
    for path in paths:
        print(f"averaging {path}")
    state = average(paths)
    save_tensors(state, args.dst_model)
    print(f"wrote {args.dst_model}")
    generator = {name.removeprefix(GENERATOR): value for name, value in state.items() if name.startswith(GENERATOR)}
    if generator:
        save_tensors(generator, args.dst_model.with_name("hift.pt"))
        print(f"wrote {args.dst_model.with_name('hift.pt')}")
    return 0


def choose(folder: Path, number: int, val_best: bool) -> list[Path]:
    """The checkpoints of the best (or the last) epochs. Raises InputError where there are fewer."""
    import yaml

    losses: dict[Path, tuple[float, int]] = {}
    for sidecar in folder.glob("epoch_*_whole.yaml"):
        try:
            info = yaml.safe_load(sidecar.read_text(encoding="utf-8"))
            losses[sidecar.with_suffix(".pt")] = float(info["loss_dict"]["loss"]), int(info["epoch"])
        except (yaml.YAMLError, KeyError, TypeError, ValueError):
            raise InputError(f"{sidecar} does not tell the loss of an epoch; remove it with its .pt") from None
    if val_best:
        losses = {path: loss for path, loss in losses.items() if math.isfinite(loss[0])}
    if not 1 <= number <= len(losses):
        kind = "epochs with a finite loss" if val_best else "epochs"
        raise InputError(f"--num {number}: {folder} holds {len(losses)} {kind} (epoch_N_whole.yaml)")
    if val_best:
        return sorted(losses, key=losses.__getitem__)[:number]
    return sorted(losses, key=lambda path: losses[path][1])[-number:]


def average(paths: Sequence[Path]) -> "dict[str, Tensor]":
    """The mean of state dicts, formed in double precision, in each tensor's own type; without training counters."""
    import torch

    from cosyvoice.model_folder.weights import read_state_dict

    sums: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for path in paths:
        state = read_state_dict(path)
        if sums and state.keys() != sums.keys():
            raise InputError(f"{path} has other weights than {paths[0]}; average epochs of one run")
        types = {name: tensor.dtype for name, tensor in state.items()}
        for name, tensor in state.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    return {name: (total / len(paths)).to(types[name]) for name, total in sums.items()}


if __name__ == "__main__":
    run(main)
