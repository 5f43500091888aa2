"""The caches of all layers of a stack, while one or several sequences grow frame by frame."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cosyvoice.utils.mask import mask_of_new_frames
from matcha.models.components.past import KeyValueCache

INITIAL_CACHE_FRAMES = 256


def join_caches(caches: Sequence[Sequence[KeyValueCache]]) -> tuple[list[KeyValueCache], Tensor]:
    """Return one cache of B sequences, in which all end together, and where each begins: (B,).

    caches: of each sequence, one part a layer.
    """
    lengths = torch.tensor([cache[0].length for cache in caches], device=caches[0][0].keys.device)
    return [joined(layers) for layers in zip(*caches, strict=True)], lengths.max() - lengths


def joined(caches: Sequence[KeyValueCache]) -> KeyValueCache:
    """Return one layer's cache of several sequences (one item each). All end at its `length`; rows before are zero."""
    largest = max(caches, key=lambda cache: cache.capacity)
    length = max(cache.length for cache in caches)
    keys, values = (largest.keys.new_zeros(len(caches), *largest.keys.shape[1:]) for _ in range(2))
    for item, cache in enumerate(caches):
        rows = slice(length - cache.length, length)
        keys[item, :, rows] = cache.keys[0, :, : cache.length]
        values[item, :, rows] = cache.values[0, :, : cache.length]
    return replace(largest, keys=keys, values=values, length=length)


def visible_rows(new: int, total: int, starts: Tensor | None, device: torch.device) -> Tensor | None:
    """Return what each of the last `new` frames of `total` may attend to: itself and the frames before it.

    starts: (B,), where each sequence begins in a joined cache. Returns (1 or B, 1 or `new`, `total`), or None where
    everything is visible.
    """
    mask = mask_of_new_frames(new, total, 1, device)  # (1, N, T)
    if starts is None:
        return mask
    begun = torch.arange(total, device=device) >= starts[:, None, None]  # (B, 1, T)
    return begun if mask is None else begun & mask
