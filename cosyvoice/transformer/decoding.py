"""An attention stack's weights in the form that decoding reads fastest.

A decoding step multiplies every weight with a single frame, so its time is that of reading the weights: fewer bytes
make it faster. The linear layers of the blocks change their form; norms, softmax and cache stay in float32. So does the
embedding: it is less than a hundredth of the weights, and rounding it to 8 bits would cost more than all the others.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.transformer.attention import RelPositionMultiHeadedAttention
from cosyvoice.transformer.encoder import INITIAL_CACHE_FRAMES, TransformerEncoder
from cosyvoice.utils.errors import InputError

INT8_MAX = 127
REDUCE_RANGE = True


class Float16Linear(nn.Module):
    """W x + b with W kept in float16 and converted in registers; x and all sums are float32 (FBGEMM)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class BFloat16Linear(nn.Module):
    """W x + b in bfloat16, for processors with instructions for it; x and the result are float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach().bfloat16(), linear.bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias).float()


class Int8Linear(nn.Module):
    """W x + b with W rounded to 8 bits, one scale a row, and x rounded with one scale a call.

    x gets 7 bits (REDUCE_RANGE), since a processor without VNNI adds pairs of products in 16 bits.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = (weight.abs().amax(dim=1).double() / INT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, REDUCE_RANGE)


LINEARS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "float32": lambda linear: linear,
    "float16": Float16Linear,
    "bfloat16": BFloat16Linear,
    "int8": Int8Linear,
}


def check_precision(precision: str, device: torch.device) -> None:
    """Raises InputError for an unknown precision, and for one that this device does not gain from."""
    if precision not in LINEARS:
        raise InputError(f"unknown precision {precision!r}; give one of {', '.join(LINEARS)}")
    if precision == "float32":
        return
    if device.type != "cpu":
        raise InputError(f"precision {precision} is for the CPU; use float32 on {device.type}")
    if precision == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
        raise InputError("precision bfloat16: this processor has no instructions for it; use float16")
    if precision != "bfloat16" and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise InputError(f"precision {precision}: torch has no such kernels for this processor; use float32")


class DecodingAttention(RelPositionMultiHeadedAttention):
    """The same attention: queries, keys and values come from one product, and all caches share their distances."""

    def __init__(self, base: RelPositionMultiHeadedAttention, convert: Callable[[nn.Linear], nn.Module]) -> None:
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


def stacked(*linears: nn.Linear) -> nn.Linear:
    """One layer whose output is that of all the given ones, one after the other."""
    whole = nn.Linear(1, 1)  # its sizes are those of the weights it gets
    whole.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
    whole.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))
    whole.out_features, whole.in_features = whole.weight.shape
    return whole


@torch.no_grad()
def prepare_stack(stack: TransformerEncoder, convert: Callable[[nn.Linear], nn.Module]) -> None:
    """Give the blocks' linear layers their decoding form, in place, one block after the other."""
    for block in stack.encoders:
        block.self_attn = DecodingAttention(block.self_attn, convert)
        block.feed_forward.w_1 = convert(block.feed_forward.w_1)
        block.feed_forward.w_2 = convert(block.feed_forward.w_2)
