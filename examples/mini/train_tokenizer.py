#!/usr/bin/env python3
"""Train a small model's speech tokenizer on Whisper's first blocks, and write it as ONNX.

    examples/mini/train_tokenizer.py --data data/mini/train --dev data/mini/dev --output speech_tokenizer_v1.onnx

The same command continues a killed run. The last line of the output is a JSON that tells how good the tokens are on the
dev folders.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PULL_HELP = "on tokens to be like the one before: fewer changes are easier for a language model"


def main(argv: Sequence[str] | None = None) -> None:
    from cosyvoice.runtime.command import check_least
    from utils import add_seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=HERE, help="folder of the model's YAML (default: %(default)s)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="Kaldi-style folders to train on")
    parser.add_argument("--dev", type=Path, nargs="+", required=True, help="Kaldi-style folders to measure on")
    parser.add_argument("--output", type=Path, required=True, help="file to write: speech_tokenizer_v1.onnx or _v2")
    parser.add_argument("--utterances", type=int, default=3000, help="drawn from the data (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2500, help="of training (default: %(default)s)")
    parser.add_argument("--pull", type=float, default=0.15, help=f"{PULL_HELP} (default: %(default)s)")
    add_seed(parser)
    options = parser.parse_args(argv)
    for name in ("utterances", "steps"):
        check_least(f"--{name}", getattr(options, name))
    if options.output.is_file():
        print(f"{options.output} is there already; delete it to train again")
        return

    from examples.mini.tokenizer_training import train

    results = train(
        options.recipe,
        options.data,
        options.dev,
        options.output,
        options.utterances,
        options.steps,
        options.pull,
        options.seed,
    )
    print(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
