"""The keys and values that attention layers keep while sequences grow frame by frame."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.utils.mask import subsequent_mask

INITIAL_CACHE_FRAMES = 256


@dataclass
class KeyValueCache:
    """The keys and values of one layer.

    The buffers hold `capacity` rows and are enlarged by doubling. Rows in use are views, never copies.
    """

    keys: Tensor  # (B, H, capacity, D), rows 0..length-1 in use
    values: Tensor  # (B, H, capacity, D)
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.size(2)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of N new frames (B, H, N, D). Return the keys and values of all frames so far (B, H, T, D)."""
        end = self.length + keys.size(2)
        if end > self.capacity:
            self.enlarge(max(end, 2 * self.capacity))
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def put(self, place: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write those of one frame (B, H, 1, D) to row `place` (1,). Return the whole buffers; `length` stays."""
        return self.keys.index_copy_(2, place, keys), self.values.index_copy_(2, place, values)

    def enlarge(self, capacity: int) -> None:
        """Give the buffers `capacity` rows."""
        grown = capacity - self.capacity
        self.keys, self.values = (F.pad(buffer, (0, 0, 0, grown)) for buffer in (self.keys, self.values))

    @classmethod
    def joined(cls, caches: Sequence[Self]) -> Self:
        """Return one cache of several sequences (one item each). All end at its `length`; rows before them are zero."""
        largest = max(caches, key=lambda cache: cache.capacity)
        length = max(cache.length for cache in caches)
        keys, values = (largest.keys.new_zeros(len(caches), *largest.keys.shape[1:]) for _ in range(2))
        for item, cache in enumerate(caches):
            rows = slice(length - cache.length, length)
            keys[item, :, rows] = cache.keys[0, :, : cache.length]
            values[item, :, rows] = cache.values[0, :, : cache.length]
        return replace(largest, keys=keys, values=values, length=length)


def join_caches(caches: Sequence[Sequence[KeyValueCache]]) -> tuple[list[KeyValueCache], Tensor]:
    """Return one cache of B sequences, in which all end together, and where each begins: (B,).

    caches: of each sequence, one part a layer.
    """
    lengths = torch.tensor([cache[0].length for cache in caches], device=caches[0][0].keys.device)
    return [type(layers[0]).joined(layers) for layers in zip(*caches, strict=True)], lengths.max() - lengths


def visible_rows(new: int, total: int, starts: Tensor | None, device: torch.device) -> Tensor | None:
    """Return what each of the last `new` frames of `total` may attend to: itself and the frames before it.

    starts: (B,), where each sequence begins in a joined cache. Returns (1 or B, 1 or `new`, `total`), or None where
    everything is visible.
    """
    mask = None if new == 1 else subsequent_mask(total, device)[None, total - new :]  # (1, N, T)
    if starts is None:
        return mask
    begun = torch.arange(total, device=device) >= starts[:, None, None]  # (B, 1, T)
    return begun if mask is None else begun & mask
