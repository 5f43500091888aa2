"""What the layers of a causal network keep while a sequence grows, so that each call computes the new frames only."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROWTH = 1.25  # of full buffers: they are the largest thing that a stream holds


@dataclass
class KeyValueCache:
    """The keys and values that one attention layer has computed for earlier frames.

    The buffers hold `capacity` rows; rows in use are views, never copies.
    """

    keys: Tensor  # (B, H, capacity, D), rows 0..length-1 in use
    values: Tensor  # (B, H, capacity, D)
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.size(2)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Remember N more rows (B, H, N, D), and return all `length` + N rows so far."""
        end = self.length + key.size(2)
        if end > self.capacity:
            self.reserve(max(end, int(GROWTH * self.capacity)))
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def put(self, place: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one row (B, H, 1, D) at `place` (1,), and return the whole buffers. The length stays."""
        return self.keys.index_copy_(2, place, key), self.values.index_copy_(2, place, value)

    def first(self, rows: int) -> Self:
        """Return the first rows alone, as views: what is written there is in this cache, too."""
        return replace(self, keys=self.keys[:, :, :rows], values=self.values[:, :, :rows])

    def reserve(self, capacity: int) -> None:
        """Give both buffers `capacity` rows."""
        grown = capacity - self.capacity
        self.keys = F.pad(self.keys, (0, 0, 0, grown))
        self.values = F.pad(self.values, (0, 0, 0, grown))


class Past:
    """The frames that a causal network has already seen, as each of its layers needs them.

    One call may bring frames that later ones still change. So the caller names the number of `final` frames before the
    call, and calls `advance` after it: everything behind them is forgotten, and comes again with the next call.
    """

    def __init__(self, attended: dict[nn.Module, KeyValueCache] | None = None) -> None:
        """attended: the empty caches of layers that need more than keys and values."""
        self.length = 0  # frames that are kept
        self.final = 0  # how many of this call's frames will be kept
        self.contexts: dict[nn.Module, Tensor] = {}  # (B, C, frames) before the first frame of the next call
        self.attended = attended or {}
        self.halves: list[Past] = []

    def with_context(self, layer: nn.Module, x: Tensor, frames: int) -> Tensor:
        """Return x (B, C, N) behind the `frames` frames that came before it, which are zero at the start."""
        before = self.contexts.get(layer)
        if before is None:
            before = x.new_zeros(*x.shape[:2], frames)
        whole = torch.cat([before, x], dim=2)
        self.contexts[layer] = whole[:, :, self.final : self.final + frames].clone()  # a view would hold all of it
        return whole

    def with_earlier(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all frames so far: (B, H, N, D) -> (B, H, length + N, D)."""
        if layer not in self.attended:
            self.attended[layer] = KeyValueCache(key[:, :, :0], value[:, :, :0])
        return self.attended[layer].append(key, value)

    def advance(self) -> None:
        """Keep the `final` frames of the call that has just ended."""
        self.length += self.final
        for cache in self.attended.values():
            cache.length = self.length
        for half in self.halves:
            half.advance()

    def chunk(self, parts: int) -> "list[Past]":
        """Return the pasts of the parts of a batch, each of which is computed by itself: like `Tensor.chunk`."""
        if not self.halves:
            self.halves = [Past() for _ in range(parts)]
        for half in self.halves:
            half.final = self.final
        return self.halves
