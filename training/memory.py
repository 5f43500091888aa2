"""How much memory a training step takes, and so how many clips `--memory` can put into one pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cosyvoice.bin.memory import HALF_BYTES, PROCESS_BYTES, TRAINED_BYTES
from dataset import Clip, collate
from llm_flow_model import JointModel
from training.precision import HALF_TYPES, compute_precision, half_type

PASSING_SHARE = 1.3  # of what is kept for gradients, with what is there for a moment only
RECOMPUTING_SHARE = 4  # what a block takes while its gradients are computed, over what it saves for them; measured
FLOAT32_ON_GPU = (F.layer_norm, F.group_norm)  # what autocast computes in float32 on a GPU, but not on a CPU


def clips_a_pass(model: JointModel, clips: Sequence[Clip], memory: int, device: str, devices: int = 1) -> int:
    """Return how many clips fit into one pass in `memory` bytes: a divisor of a device's clips of a step, or 0.

    Judged by what the longest clip keeps. Fewer passes of more clips give the same gradient.
    """
    config = model.config
    longest = max(clips, key=lambda clip: len(clip.text_token) + len(clip.speech_token))
    computes_in_half = compute_precision(config, device) in HALF_TYPES
    model.train()
    room = memory - PROCESS_BYTES - weight_bytes(model, computes_in_half, device)
    most = int(room / (PASSING_SHARE * kept_bytes(model, collate([longest]), computes_in_half)))
    share = config["batch_size"] * config["accumulate_grad_batches"] // devices
    return max((size for size in range(1, share + 1) if share % size == 0 and size <= most), default=0)


def weight_bytes(model: JointModel, computes_in_half: bool, device: str) -> int:
    """Return the bytes of base and adapters with their optimiser, however many clips there are."""
    frozen = 4
    if half_type(model.config, device):
        frozen = 2
    elif computes_in_half:
        frozen += HALF_BYTES
    return sum(weight.numel() * (TRAINED_BYTES if weight.requires_grad else frozen) for weight in model.parameters())


def kept_bytes(model: JointModel, batch: dict[str, Tensor], in_half: bool = False) -> int:
    """Return the bytes that training on `batch` keeps until its gradients are there, not counting the weights.

    Where blocks are computed again, also what the largest one takes in the meantime. in_half: it trains in half
    precision; bfloat16 stands for both kinds, since a CPU has it.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    passing = [0]

    def measure(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        passing.append(saved_bytes(lambda: block.forward.args[0](*inputs, **named), weights))

    hooks = [block.register_forward_pre_hook(measure, with_kwargs=True) for block in model.recomputed_blocks()]
    with half_precision(weights, in_half):
        kept = saved_bytes(lambda: model.losses(batch, model.active()), weights)
    for hook in hooks:
        hook.remove()
    return kept + RECOMPUTING_SHARE * max(passing)


def saved_bytes(compute: Callable[[], Any], weights: set[int]) -> int:
    """Return the bytes that autograd keeps for `compute`, not counting the weights, given by their places in memory."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(size for place, size in kept.items() if place not in weights)


@contextmanager
def half_precision(weights: set[int], enabled: bool) -> Iterator[None]:
    """Compute as a GPU does in half precision; copies of weights join `weights`, the places of weights in memory."""
    if not enabled:
        yield
        return
    with torch.autocast("cpu", dtype=torch.bfloat16), NormsInFloat32(), WeightCopies(weights):
        yield


class NormsInFloat32(TorchFunctionMode):
    """Gives norms float32 input, as autocast does on a GPU; what they keep for their gradients is twice as much."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in FLOAT32_ON_GPU:
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


class WeightCopies(TorchDispatchMode):
    """Adds the places of copies in another type to those of the weights: autocast makes them of float32 weights."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights = weights
        self.copies: list[Tensor] = []  # kept, so that nothing else gets their places

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        copies = function is torch.ops.aten._to_copy.default
        if copies and args[0].untyped_storage().data_ptr() in self.weights:
            self.copies.append(result)
            self.weights.add(result.untyped_storage().data_ptr())
        return result
