"""Export the flow's velocity network as ONNX: the second half of the recipe's stage 7.

    python cosyvoice/bin/export_onnx.py --model_dir pretrained_models/CosyVoice-300M

Writes flow.decoder.estimator.fp32.onnx there. Inputs, float32: x, mu and cond (2, 80, T), mask (2, 1, T), t (2,), spks
(2, 80); two items because guidance takes a conditional and an unconditional one. Output: estimator_out (2, 80, T).
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

ITEMS = 2
EXAMPLE_FRAMES = 256
CHECKED_FRAMES = (1, 2, 37, 300)  # odd and even: the network halves the frame rate
TOLERANCE = 1e-3  # float32 sums in another order
OPSET = 18
WITH_FRAMES = ("x", "mask", "mu", "cond", "estimator_out")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="folder of cosyvoice.yaml and flow.pt")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    model_dir = parse(argv).model_dir
    from cosyvoice.model_folder.folder import ModelFolder
    from cosyvoice.model_folder.weights import load_part

    flow = load_part(ModelFolder(model_dir), "flow")
    if not hasattr(flow.decoder, "estimator"):
        raise InputError(f"the flow of {model_dir} has no estimator to be exported; give a folder like CosyVoice-300M")
    path = model_dir / "flow.decoder.estimator.fp32.onnx"
    export(flow.decoder.estimator, flow.spk_embed_affine_layer.out_features, path)
    print(f"wrote {path}")
    return 0


def export(estimator: "nn.Module", mel_bins: int, path: Path) -> None:
    """Writes the file once onnxruntime gives the module's numbers."""
    import torch

    from cosyvoice.utils.file_utils import atomic_write

    inputs = example(mel_bins, EXAMPLE_FRAMES)
    with atomic_write(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter without onnxscript is called old
            torch.onnx.export(
                estimator,
                tuple(inputs.values()),
                temporary,
                input_names=list(inputs),
                output_names=["estimator_out"],
                dynamic_axes={name: {2: "seq_len"} for name in WITH_FRAMES},
                opset_version=OPSET,
                dynamo=False,
            )
        check(temporary, estimator, mel_bins, path)


def example(mel_bins: int, frames: int) -> "dict[str, Tensor]":
    """Random inputs; the last frames of the second item are padding."""
    import torch

    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(ITEMS, 1, frames)
    mask[1, :, frames - frames // 4 :] = 0
    x, mu, cond = torch.randn(3, ITEMS, mel_bins, frames, generator=generator)
    spks = torch.randn(ITEMS, mel_bins, generator=generator)
    return {"x": x, "mask": mask, "mu": mu, "t": torch.tensor([0.2, 0.7]), "spks": spks, "cond": cond}


def check(exported: Path, estimator: "nn.Module", mel_bins: int, path: Path) -> None:
    """Raises InputError where the exported network differs from its module at any of the lengths."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    for frames in CHECKED_FRAMES:
        inputs = example(mel_bins, frames)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.no_grad():
            wanted = estimator(*inputs.values())
        difference = (torch.from_numpy(found) - wanted).abs().max().item()
        if not difference <= TOLERANCE:
            raise InputError(f"{path} is not written: {frames} frames differ from the module's by {difference:.1e}")


if __name__ == "__main__":
    run(main)
