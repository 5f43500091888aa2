"""Export the attention stacks of llm and flow as TorchScript: the first half of the recipe's stage 7.

    python cosyvoice/bin/export_jit.py --model_dir pretrained_models/CosyVoice-300M

Writes llm.text_encoder.fp32.zip, llm.llm.fp32.zip and flow.encoder.fp32.zip there, those that the model has: CosyVoice2
has only the last. Each is the stack's `forward` over whole sequences of at least 2 frames: (B, T, C) float32 and
lengths (B,) int64 in, output (B, U, D) and valid frames (B, 1, U) bool out. The step-by-step decoding with its cache
stays in Python.
"""

import argparse
import sys
import warnings
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
    from torch import Tensor, nn
    from torch.jit import ScriptModule

STACKS = ("llm.text_encoder", "llm.llm", "flow.encoder")
EXAMPLE = (2, 20)  # items, frames
CHECKED = ((1, 2), (3, 37), (2, 301))  # other sizes than the example's, or a trace could have kept it
TOLERANCE = 1e-3  # float32 sums in another order


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="folder of cosyvoice.yaml, llm.pt and flow.pt")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    model_dir = parse(argv).model_dir
    from cosyvoice.model_folder.folder import ModelFolder
    from cosyvoice.model_folder.weights import load_part
    from cosyvoice.transformer.encoder import AttentionStack

    folder = ModelFolder(model_dir)
    parts = {name: load_part(folder, name) for name in ("llm", "flow")}
    for name in STACKS:
        part, _, attribute = name.partition(".")
        stack = getattr(parts[part], attribute, None)
        if isinstance(stack, AttentionStack):  # and not a Qwen2 model
            export(stack, model_dir / f"{name}.fp32.zip")
    return 0


def export(stack: "nn.Module", path: Path) -> None:
    """Writes the file once it gives the module's numbers."""
    import torch

    from cosyvoice.utils.file_utils import atomic_write

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of what `check` shows not to matter
        traced = torch.jit.trace(stack, example(stack, *EXAMPLE), check_trace=False)
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:  # the bytes would depend on the name of a file that torch opens itself
            torch.jit.save(traced, file)
        check(torch.jit.load(temporary), stack, path)
    print(f"wrote {path}")


def example(stack: "nn.Module", items: int, frames: int) -> "tuple[Tensor, Tensor]":
    """Random input, one item of full length and shorter ones."""
    import torch

    generator = torch.Generator().manual_seed(0)
    channels = stack.embed.out[0].in_features
    lengths = torch.linspace(frames, 1, items).long()
    return torch.randn(items, frames, channels, generator=generator), lengths


def check(exported: "ScriptModule", stack: "nn.Module", path: Path) -> None:
    """Raises InputError where the exported stack differs from its module at any of the sizes."""
    import torch

    for size in CHECKED:
        inputs = example(stack, *size)
        with torch.no_grad():
            (found, found_valid), (wanted, valid) = exported(*inputs), stack(*inputs)
        difference = (found - wanted).abs().max().item()
        if not (difference <= TOLERANCE and torch.equal(found_valid, valid)):
            raise InputError(f"{path} is not written: at {size} it differs from its module by {difference:.1e}")


if __name__ == "__main__":
    run(main)
