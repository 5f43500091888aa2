#!/usr/bin/env python3
"""Write the weights that the training of a small model's flow starts from.

    examples/mini/make_flow_start.py --config data/mini/cosyvoice.yaml --output data/mini/exp/flow_start.pt --seed 1986

They are random, but for two things. A token stands for four numbers, and tokens whose numbers are alike sound alike:
their vectors start as a projection of the numbers, and so alike, too. And a velocity network starts as one that takes
away the noisy mel that it reads, and adds the encoded tokens: to find that out takes a small one thousands of steps.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
APART = 0.1  # spread of what is each token's own, beside a projection of spread 1
MEL_MEAN = -5.6  # of log-mels, about
BESIDE = 0.1  # size of what else the velocity network computes at the start, as a share of its usual one
# The last layers of a velocity network are a layer norm and Mish. A channel that starts as LEVEL + value / SPREAD goes
# through Mish nearly unchanged, and the norm changes no values where it has MARK, of either sign, beside them.
MARK, SPREAD, LEVEL = 8.0, 3.2, 3.0

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cosyvoice.flow.causal_decoder import CausalConditionalDecoder


def main(argv: Sequence[str] | None = None) -> None:
    from cosyvoice.runtime.command import seed_all
    from utils import add_seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML of the model")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    add_seed(parser)
    options = parser.parse_args(argv)

    from cosyvoice.flow.causal_flow import CausalMaskedDiffWithXvec
    from cosyvoice.model_folder.model_yaml import load_model_yaml
    from cosyvoice.utils.file_utils import save_tensors

    seed_all(options.seed)
    flow = load_model_yaml(options.config, parts=("flow",))["flow"]
    if isinstance(flow, CausalMaskedDiffWithXvec):
        start_as_denoiser(flow.decoder.estimator)
        flow.encoder_proj.bias.data.fill_(MEL_MEAN)
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


def start_as_denoiser(network: "CausalConditionalDecoder") -> None:
    """Let the velocity start as mu - x, what the encoded tokens say less the noisy mel. Changes weights in place.

    The first channels of the residual path carry it from end to end. Raises InputError where there are too few.
    """
    import torch

    from cosyvoice.runtime.errors import InputError

    mels = network.final_proj.out_channels
    channels = network.final_proj.in_channels
    if channels < mels:
        raise InputError(f"the flow's channels are {channels}, and must be at least {mels}")
    one_each = torch.eye(mels)
    (down,), (up,) = network.down_blocks, network.up_blocks
    stages = down, *network.mid_blocks, up
    with torch.no_grad():
        for residual_block, transformer_blocks, *_ in stages:
            residual_block.block2.block["2"].weight.fill_(BESIDE)
            for block in transformer_blocks:
                block.attn1.to_out[0].weight.mul_(BESIDE)
                block.ff.net[2].weight.mul_(BESIDE)
        into = down[0].res_conv
        into.bias[:mels] = -MEL_MEAN  # taken out up to the last layer: a norm would mistake it for an offset
        into.weight[:mels] = 0  # (channels, x + mu + speaker + known mel, 1)
        into.weight[:mels, :mels, 0], into.weight[:mels, mels : 2 * mels, 0] = -one_each, one_each
        for residual_block, *_ in stages[1:]:
            keep(residual_block.res_conv, 0.0, channels)
        for *_, same_rate in (down, up):
            keep(same_rate, BESIDE, channels)
        convolution, norm = network.final_block.block["0"], network.final_block.block["2"]
        keep(convolution, BESIDE, mels)
        sign = torch.ones(channels)
        sign[1::2] = -1
        convolution.bias.copy_(MARK * sign)
        norm.weight.fill_(MARK / SPREAD)
        norm.bias.copy_(LEVEL - MARK / SPREAD * sign)
        out = network.final_proj.weight  # (mels, channels, 1)
        out.mul_(BESIDE)
        out[:, :mels, 0] = SPREAD * one_each
        network.final_proj.bias.copy_(MEL_MEAN - LEVEL * out.sum(dim=(1, 2)))


def keep(convolution: "nn.Conv1d", share: float, channels: int) -> None:
    """Let a convolution start as what it reads in the first channels at the present frame, plus a share of itself."""
    import torch

    weight = convolution.weight  # (channels out, channels in, frames), of which the last is the present one
    weight.mul_(share)
    weight[:channels] = 0
    weight[:channels, :channels, -1] = torch.eye(channels)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
