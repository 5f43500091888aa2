#!/usr/bin/env python3
"""Write the weights that the training of a small model's flow starts from.

    examples/mini/make_flow_start.py --config data/mini/cosyvoice.yaml --output data/mini/exp/flow_start.pt --seed 1986

They are random, but for the vectors of the speech tokens. A token stands for four numbers, and tokens whose numbers are
alike sound alike: their vectors start as a projection of the numbers, and so alike, too.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
APART = 0.1  # spread of what is each token's own, beside a projection of spread 1

if TYPE_CHECKING:
    from torch import Tensor


def main(argv: Sequence[str] | None = None) -> None:
    from cosyvoice.runtime.command import seed_all
    from utils import add_seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML of the model")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    add_seed(parser)
    options = parser.parse_args(argv)

    from cosyvoice.model_folder.model_yaml import load_model_yaml
    from cosyvoice.utils.file_utils import save_tensors

    seed_all(options.seed)
    flow = load_model_yaml(options.config, parts=("flow",))["flow"]
    state = flow.state_dict()
    state["input_embedding.weight"] = token_vectors(*flow.input_embedding.weight.shape)
    save_tensors(state, options.output)
    print(f"{options.output}: {len(state)} tensors")


def token_vectors(tokens: int, size: int) -> "Tensor":
    """Return (tokens, size) vectors of about unit spread. Raises InputError for tokens that no tokenizer here has."""
    import torch

    from examples.mini.speech_tokenizer import ScalarQuantiser, levels_of

    quantiser = ScalarQuantiser(levels_of(tokens))
    numbers = quantiser.numbers(torch.arange(tokens))
    projection = torch.randn(numbers.shape[1], size) / numbers.square().sum(dim=1).mean().sqrt()
    return numbers @ projection + APART * torch.randn(tokens, size)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
