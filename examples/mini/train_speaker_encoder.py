#!/usr/bin/env python3
"""Train CosyVoice-mini's speaker encoder to tell the corpus's speakers apart, and write it as ONNX.

    examples/mini/train_speaker_encoder.py --data data/mini/train --dev data/mini/dev --output campplus.onnx

A killed run is continued by the same command; the last line of the output is a JSON of how well the vectors tell the
speakers of the dev folders apart.
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
    parser.add_argument("--output", type=Path, required=True, help="file to write: campplus.onnx")
    parser.add_argument("--utterances", type=int, default=4000, help="drawn from the data (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=700, help="of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1986, help="of all random draws (default: %(default)s)")
    options = parser.parse_args(argv)

    from examples.mini.encoder_training import is_finished
    from examples.mini.speaker_training import train
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
