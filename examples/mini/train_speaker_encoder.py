#!/usr/bin/env python3
"""Train CosyVoice-mini's speaker encoder to tell the corpus's speakers apart, and write it as ONNX.

    examples/mini/train_speaker_encoder.py --data data/mini/train --dev data/mini/dev --output campplus.onnx

A killed run is continued by the same command; the last line of the output is a JSON of how well the vectors tell the
speakers of the dev folders apart.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    from examples.mini.encoder_command import train_encoder

    train_encoder(argv, __doc__, "campplus.onnx", 700, get_train)


def get_train() -> Callable:
    from examples.mini.speaker_training import train

    return train


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.utils.command import run

    run(main)
