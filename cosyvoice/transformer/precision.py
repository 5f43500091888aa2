"""The forms that linear layers can have for inference: exact, or with fewer bits and faster.

Where a layer sees a single frame at a time, its time is that of reading the weights: fewer bytes make it faster. Where
it sees many, the products take the time, and only a form that also multiplies faster is a gain. A GPU computes whole
modules in float16 instead.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cosyvoice.runtime.device import cpu_has_bfloat16
from cosyvoice.runtime.errors import InputError

INT8_MAX = 127
REDUCE_RANGE = True
ZERO_POINT = 64  # of 7 bits
HALF_RANGE = 63  # steps on both sides of it
FINER = 2 * HALF_RANGE  # times finer are the second 7 bits of an input
LEAST_STEP = 1e-30  # that an input of zeros has


class Float16Linear(nn.Module):
    """W x + b with W kept in float16 and converted in registers; x and all sums are float32 (FBGEMM)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class BFloat16Linear(nn.Module):
    """W x + b in bfloat16, for processors with instructions for it; x and the result are float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = copy.deepcopy(linear).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.bfloat16()).float()


class Int8Linear(nn.Module):
    """W x + b with W rounded to 8 bits, one scale a row, and x rounded with one scale a call.

    x gets 7 bits (REDUCE_RANGE), since a processor without VNNI adds pairs of products in 16 bits.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = packed_in_8_bits(linear.weight.detach(), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, REDUCE_RANGE)


class FineInt8Linear(nn.Module):
    """The same W, with x in 14 bits: the coarse 7 bits, and their rounding error in 7 more.

    Both parts are rows of one product, which reads W once: for a frame at a time the second one costs little.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = packed_in_8_bits(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        step = max(float(torch.linalg.vector_norm(x, torch.inf)) / HALF_RANGE, LEAST_STEP)
        steps = x / step
        coarse = steps.round()
        fine = steps.sub_(coarse).mul_(FINER)  # within half a step, and so within the same range
        parts = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            torch.stack((coarse, fine)), 1.0, ZERO_POINT, self.packed
        )
        product = torch.add(parts[0], parts[1], alpha=1 / FINER)
        return product.mul_(step) if self.bias is None else torch.add(self.bias, product, alpha=step)


def packed_in_8_bits(weight: Tensor, bias: Tensor | None) -> torch.ScriptObject:
    """Return the weights (N, K), rounded to 8 bits with one scale a row, and the bias, as FBGEMM multiplies by them."""
    scales = (weight.abs().amax(dim=1).double() / INT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    quantized = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, bias)


Convert = Callable[[nn.Linear], nn.Module]
LINEARS: dict[str, Convert] = {  # for a frame at a time
    "float32": lambda linear: linear,
    "float16": Float16Linear,
    "bfloat16": BFloat16Linear,
    "int8": Int8Linear,
}
FINE_INPUTS = LINEARS | {"int8": FineInt8Linear}  # where 7 bits of input would be the larger part of the error
MANY_FRAMES = LINEARS | {"float16": LINEARS["float32"]}  # its products are no faster
KEPT: dict[str, torch.dtype | None] = {  # the type of the keys and values of a stream; None is that of the weights
    "float32": None,
    "float16": torch.float16,
    "bfloat16": torch.float16,  # as small, more exact, and they are converted in any case
    "int8": torch.int8,
}
ON_GPU = ("float32", "float16")


def conversion(module: nn.Module, precision: str, forms: Mapping[str, Convert] = LINEARS) -> Convert:
    """Return what gives a linear layer of `module` the form for `precision`.

    On a GPU, float16 is a matter of the whole module: it is halved here, and its layers stay as they are.
    """
    if precision == "float16" and is_on_gpu(module):
        module.half()
        return LINEARS["float32"]
    return forms[precision]


def is_on_gpu(module: nn.Module) -> bool:
    return next(module.parameters()).device.type != "cpu"


def fastest_precision(device: torch.device) -> str:
    """The fastest on this device of those whose cost is small: CosyVoice-mini speaks in int8 as well as in float32.

    On a GPU float32, until float16 has been measured on one.
    """
    try:
        check_precision("int8", device)
    except InputError:
        return "float32"
    return "int8"


def check_precision(precision: str, device: torch.device) -> None:
    """Raise InputError for an unknown precision, and for one that this device does not gain from."""
    if precision not in LINEARS:
        raise InputError(f"unknown precision {precision!r}; give one of {', '.join(LINEARS)}")
    if precision == "float32":
        return
    if device.type != "cpu":
        if precision not in ON_GPU:
            raise InputError(f"precision {precision} is for the CPU; use {' or '.join(ON_GPU)} on {device.type}")
        return
    if precision == "bfloat16" and not cpu_has_bfloat16():
        raise InputError("precision bfloat16: this processor has no instructions for it; use float16")
    if precision != "bfloat16" and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise InputError(f"precision {precision}: torch has no such kernels for this processor; use float32")


def stacked(*linears: nn.Linear) -> nn.Linear:
    """One layer whose output is that of all the given ones, one after the other; all have a bias, or none."""
    whole = nn.Linear(1, 1)  # its sizes are those of the weights it gets
    whole.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    whole.bias = nn.Parameter(torch.cat(biases)) if biases else None
    whole.out_features, whole.in_features = whole.weight.shape
    return whole
