"""The attention stack of the language model in the form that decodes fastest.

A decoding step multiplies every weight with a single frame, so its time is that of reading the weights. The linear
layers of the blocks change their form; norms, softmax and cache stay in float32. So does the embedding: it is less than
a hundredth of the weights, and rounding it to 8 bits would cost more than all the others.
"""

import torch
from torch import Tensor, nn

from cosyvoice.transformer.attention import RelPositionMultiHeadedAttention
from cosyvoice.transformer.encoder import INITIAL_CACHE_FRAMES, TransformerEncoder
from cosyvoice.transformer.precision import Convert, stacked


class DecodingAttention(RelPositionMultiHeadedAttention):
    """The same attention: queries, keys and values come from one product, and all caches share their distances."""

    def __init__(self, base: RelPositionMultiHeadedAttention, convert: Convert) -> None:
        nn.Module.__init__(self)  # the weights are there already
        self.h, self.d_k, self.dropout_rate = base.h, base.d_k, base.dropout_rate
        self.linear_qkv = convert(stacked(base.linear_q, base.linear_k, base.linear_v))
        self.linear_out = convert(base.linear_out)
        self.linear_pos = base.linear_pos
        self.pos_bias_u, self.pos_bias_v = base.pos_bias_u, base.pos_bias_v
        none = self.pos_bias_u.detach().new_empty(1, self.h, 0, self.d_k)
        self.positions = super().grown_positions(none, INITIAL_CACHE_FRAMES)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear_qkv(x).chunk(3, dim=-1)

    def grown_positions(self, positions: Tensor, capacity: int) -> Tensor:
        if capacity > self.positions.size(2):
            self.positions = super().grown_positions(self.positions, capacity)
        return self.positions[:, :, -capacity:]


@torch.no_grad()
def prepare_stack(stack: TransformerEncoder, convert: Convert) -> None:
    """Give the blocks' linear layers their decoding form, in place, one block after the other."""
    for block in stack.encoders:
        block.self_attn = DecodingAttention(block.self_attn, convert)
        block.feed_forward.w_1 = convert(block.feed_forward.w_1)
        block.feed_forward.w_2 = convert(block.feed_forward.w_2)
