#!/usr/bin/env python3
"""Train CosyVoice-mini's speech tokenizer on phones whose times the engines told, and write it as ONNX.

    examples/mini/train_tokenizer.py --data data/mini/train --dev data/mini/dev --output speech_tokenizer_v1.onnx

Recordings without .phones beside them are not used. A killed run is continued by the same command; the last line of
the output is a JSON of what the tokens are worth on the dev folders.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    from examples.mini.encoder_command import train_encoder

    train_encoder(argv, __doc__, "speech_tokenizer_v1.onnx", 1200, get_train)


def get_train() -> Callable:
    from examples.mini.tokenizer_training import train

    return train


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.utils.command import run

    run(main)
