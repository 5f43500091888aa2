"""The command line of the two scripts that train encoders."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cosyvoice.utils.command import check_least
from utils import add_seed


def train_encoder(
    argv: Sequence[str] | None, description: str, file_name: str, steps: int, get_train: Callable[[], Callable]
) -> None:
    """Train as the options say, and print the results as JSON, unless the output is there already.

    steps: the default. get_train: hands out the `train` of the encoder, which is not imported before it is needed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="Kaldi-style folders to train on")
    parser.add_argument("--dev", type=Path, nargs="+", required=True, help="Kaldi-style folders to measure on")
    parser.add_argument("--output", type=Path, required=True, help=f"file to write: {file_name}")
    parser.add_argument("--utterances", type=int, default=4000, help="drawn from the data (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="of training (default: %(default)s)")
    add_seed(parser)
    options = parser.parse_args(argv)
    for name in ("utterances", "steps"):
        check_least(f"--{name}", getattr(options, name))
    if options.output.is_file():
        print(f"{options.output} is there already; delete it to train anew")
        return
    train = get_train()
    results = train(options.data, options.dev, options.output, options.utterances, options.steps, options.seed)
    print(json.dumps(results))
