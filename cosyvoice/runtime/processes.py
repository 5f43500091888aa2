"""What processes that train together tell each other. All of them call the same function; one process has no wait."""

from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_processes() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everywhere(here: bool) -> bool:
    """Return whether `here` is true in all processes."""
    if rank_and_processes()[1] == 1:
        return here
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    answer = torch.tensor(int(here), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def somewhere(here: bool) -> bool:
    """Return whether `here` is true in any process."""
    return not everywhere(not here)


def mean_of_all(values: dict[str, Tensor], clips: int) -> tuple[dict[str, Tensor], int]:
    """Return the means over the clips of all processes, and how many clips these are.

    values: 0-d means over the `clips` of this process, with the same names everywhere.
    """
    if rank_and_processes()[1] == 1:
        return values, clips
    names = sorted(values)  # not every process has them in the same order
    sums = torch.stack([values[name].detach().double() * clips for name in names])
    sums = torch.cat([sums, sums.new_tensor([clips])])
    dist.all_reduce(sums)
    means = sums[:-1] / sums[-1]
    return dict(zip(names, means, strict=True)), int(sums[-1])


def all_in_turn(own: list[Any]) -> list[Any]:
    """Return the lists of all processes as one: the first item of each, then the second of each, and so on."""
    processes = rank_and_processes()[1]
    if processes == 1:
        return own
    lists: list[Any] = [None] * processes
    dist.all_gather_object(lists, own)
    missing = object()
    return [item for turn in zip_longest(*lists, fillvalue=missing) for item in turn if item is not missing]
