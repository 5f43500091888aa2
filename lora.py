"""Low-rank adaptation (Hu et al., 2021): small trainable updates beside frozen linear layers."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.runtime.errors import InputError

ADAPTER_NAMES = ("lora_A", "lora_B")


class Dropout(nn.Dropout):
    """Dropout that draws 16 bits per element on a CPU, where torch's own takes as long as the products around it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        threshold = round(self.p * 2**16) - 2**15
        kept = torch.ge(draws[: x.numel()].view(x.shape), threshold, out=torch.empty_like(x, requires_grad=False))
        return x * kept.div_(1 - self.p)


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trainable low-rank update: y = W x + b + (alpha / rank) B A x.

    `weight` and `bias` keep their names, so base checkpoints still load. B starts at zero, so training starts exactly
    at the base model. A and B stay in float32, whatever the base's type is.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)  # nn.Linear's __init__ would allocate the weights again
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        self.dropout = Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear starts

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for both products
        narrow = F.linear(self.dropout(x), self.lora_A)
        y = F.linear(x, self.weight, self.bias)
        return torch.addmm(y.flatten(0, -2), narrow.flatten(0, -2), self.lora_B.t(), alpha=self.scale).view_as(y)


def inject(module: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float) -> list[str]:
    """Freeze `module` and add adapters to every linear layer whose last name is among `targets`.

    A target may span several names (`to_out.0`). Returns the names of the adapted layers. Raises InputError for a
    target that matches no layer.
    """
    module.requires_grad_(False)
    endings = {target: f".{target}" for target in targets}
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    unused = [target for target, ending in endings.items() if not any(f".{name}".endswith(ending) for name in linear)]
    if unused:
        raise InputError(f"target_modules: no linear layer is named {', '.join(unused)}; remove them from the settings")
    adapted = [name for name in linear if f".{name}".endswith(tuple(endings.values()))]
    for name in adapted:
        parent, _, last = name.rpartition(".")
        base = module.get_submodule(name)
        setattr(module.get_submodule(parent), last, LoRALinear(base, rank, alpha, dropout))
    return adapted


def adapters(module: nn.Module) -> Iterator[LoRALinear]:
    """Return the adapted layers inside `module`."""
    return (layer for layer in module.modules() if isinstance(layer, LoRALinear))


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the trainable tensors by name, on the CPU."""
    state = module.state_dict()
    return {name: state[name].detach().cpu().clone() for name in state if name.endswith(ADAPTER_NAMES)}


def load_adapters(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load trained tensors into a module with adapters. Raises InputError if names or shapes differ."""
    own = {name: tensor.shape for name, tensor in adapter_state(module).items()}
    if own != {name: tensor.shape for name, tensor in state.items()}:
        raise InputError("the adapters do not fit; give the LoRA settings (rank, targets) and base of their own run")
    module.load_state_dict(state, strict=False)


def rescaled(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return adapters whose update is `factor` times that of the given ones."""
    return {name: tensor * factor if name.endswith("lora_B") else tensor for name, tensor in state.items()}


def merged(base: dict[str, Tensor], adapter: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the base weights with the updates added: W + scale B A, computed in float32, stored in the base's type.

    base: a state dict without adapters, which is not changed. Weights without an update are the base's own tensors, so
    tied weights stay tied. adapter: the result of `adapter_state`. scale: alpha / rank.
    """
    result = dict(base)
    layers = sorted({name.rpartition(".")[0] for name in adapter})
    unknown = [layer for layer in layers if f"{layer}.weight" not in base]
    if unknown:
        raise InputError(f"the adapters belong to another model: it has no layer {unknown[0]}. Give their own base")
    for layer in layers:
        update = adapter[f"{layer}.lora_B"].float() @ adapter[f"{layer}.lora_A"].float()
        weight = base[f"{layer}.weight"]
        result[f"{layer}.weight"] = (weight.float() + scale * update).to(weight.dtype)
    return result
