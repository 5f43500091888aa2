#!/usr/bin/env python3
"""Train CosyVoice-mini's speech tokenizer on phones whose times the engines told, and write it as ONNX.

    examples/mini/train_tokenizer.py --data data/mini/train --dev data/mini/dev --output speech_tokenizer_v1.onnx

Recordings without .phones beside them are not used. A killed run is continued by the same command; the last line of
the output is a JSON of what the tokens are worth on the dev folders.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="Kaldi-style folders to train on")
    parser.add_argument("--dev", type=Path, nargs="+", required=True, help="Kaldi-style folders to measure on")
    parser.add_argument("--output", type=Path, required=True, help="file to write: speech_tokenizer_v1.onnx")
    parser.add_argument("--utterances", type=int, default=4000, help="drawn from the data (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1986, help="of all random draws (default: %(default)s)")
    options = parser.parse_args(argv)

    from examples.mini.encoder_training import is_finished
    from examples.mini.tokenizer_training import train
    from utils import check_positive

    for name in ("utterances", "steps"):
        check_positive(f"--{name}", getattr(options, name))
    if not is_finished(options.output):
        results = train(options.data, options.dev, options.output, options.utterances, options.steps, options.seed)
        print(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.utils.command import run

    run(main)
