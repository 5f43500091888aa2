"""What the layers of a causal network keep while a sequence grows, so that each call computes the new frames only."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INT8_MAX = 127
SCALE_TYPE = torch.float32  # of a row in int8
TINY = 1e-12  # a scale that rows of zeros can have
CHUNKS_AT_ONCE = 4  # that attend together: as many as a stream's longest hop has


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
            self.reserve(max(end, 2 * self.capacity))  # doubled: a row is copied once on average
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


def row_bytes(size: int, dtype: torch.dtype) -> int:
    """Return the bytes that a KeyValueBlocks keeps of the key, or the value, of a frame in one head of that size."""
    return size * dtype.itemsize + (SCALE_TYPE.itemsize if dtype == torch.int8 else 0)


class KeyValueBlocks:
    """The keys and values of all attention layers of a network, in one block for each call that kept some.

    They are most of what a stream holds. A block is written once and stays where it is: memory is what the frames need
    and nothing more, and no call copies all of it to make room. It is one piece for all layers, because many small ones
    between short-lived tensors leave a heap full of holes. A layer reads its part of all blocks as one tensor, in the
    type that it computes in; that copy lives as long as its attention does.

    Of int8 each row of a head has its own scale. At the sizes of CosyVoice2-0.5B with random weights that moves the
    mel by 1.1e-3 on average, float16 by 3.6e-5, and int8 weights by 2.2e-2 (its standard deviation is 1.3).
    """

    def __init__(self, layers: int, dtype: torch.dtype) -> None:
        """layers: how many will call. dtype: that of the blocks: floating point, or int8."""
        self.layers, self.dtype = layers, dtype
        self.numbers: dict[nn.Module, int] = {}  # of the layers, in the order of their calls
        self.blocks: list[Tensor] = []  # (L, 2, B, H, N, D) each: keys, then values
        self.scales: list[Tensor] = []  # (L, 2, B, H, N, 1) each, of blocks in int8
        self.rows = 0  # of all blocks that are complete

    def joined(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's rows so far and, behind them, the new ones: (B, H, N, D) -> (B, H, rows + N, D)."""
        if self.rows == 0:
            return key, value
        number, first = self.numbers[layer], 0
        whole = key.new_empty(2, *key.shape[:2], self.rows + key.size(2), key.size(3))
        for place, block in enumerate(self.blocks):
            if first < self.rows:
                part = whole[:, :, :, first : first + block.size(4)]
                part.copy_(block[number])
                if self.scales:
                    part.mul_(self.scales[place][number])
                first += block.size(4)
        whole[0, :, :, self.rows :], whole[1, :, :, self.rows :] = key, value
        return whole[0], whole[1]

    def keep(self, layer: nn.Module, key: Tensor, value: Tensor, rows: int) -> None:
        """Keep the layer's first `rows` new rows. All layers do so before the rows count."""
        number = self.numbers.setdefault(layer, len(self.numbers))
        if rows == 0:
            return
        if number == 0:
            sizes = self.layers, 2, *key.shape[:2], rows
            self.blocks.append(key.new_empty((*sizes, key.size(3)), dtype=self.dtype))
            if self.dtype == torch.int8:
                self.scales.append(key.new_empty((*sizes, 1), dtype=SCALE_TYPE))
        for i, x in enumerate((key[:, :, :rows], value[:, :, :rows])):
            if self.scales:
                scale = self.scales[-1][number, i] = (x.abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp(min=TINY)
                x = (x / scale).round()
            self.blocks[-1][number, i] = x


class Past:
    """The frames that a causal network has already seen, as each of its layers needs them.

    One call may bring frames that later ones still change. So the caller names the number of `final` frames before the
    call, and calls `advance` after it: everything behind them is forgotten, and comes again with the next call.
    """

    def __init__(
        self,
        chunk_size: int = 0,
        layers: int = 0,
        kept_type: torch.dtype = torch.float32,
        attended: dict[nn.Module, KeyValueCache] | None = None,
    ) -> None:
        """chunk_size, layers, kept_type: of `attend`: frames of a chunk, how many layers call it, and the type in which
        keys and values are kept. attended: the empty caches of layers that need more than keys and values.
        """
        self.chunk_size, self.layers, self.kept_type = chunk_size, layers, kept_type
        self.earlier = KeyValueBlocks(layers, kept_type)
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

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention of N new frames (B, H, N, D) to the frames that `mask` shows them of all T so far.

        mask: (1, 1, N, T), by chunks; None where all see all. It has four axes because torch's fast attention on a CPU
        takes no mask of three: it falls back to one that is several times slower. A few chunks at a time attend to
        the frames up to their own end, so that those of a long prompt are not multiplied with all of it.
        """
        keys, values = self.earlier.joined(layer, key, value)
        self.earlier.keep(layer, key, value, self.final)
        if mask is None:
            return F.scaled_dot_product_attention(query, keys, values)
        parts, end = [], self.length
        rows = CHUNKS_AT_ONCE * self.chunk_size
        for some, visible in zip(query.split(rows, dim=2), mask.split(rows, dim=2), strict=True):
            end += some.size(2)
            seen = keys[:, :, :end], values[:, :, :end]
            parts.append(F.scaled_dot_product_attention(some, *seen, attn_mask=visible[..., :end]))
        return torch.cat(parts, dim=2)

    def advance(self) -> None:
        """Keep the `final` frames of the call that has just ended."""
        self.length += self.final
        self.earlier.rows = self.length
        for cache in self.attended.values():
            cache.length = self.length
        for half in self.halves:
            half.advance()

    def chunk(self, parts: int) -> "list[Past]":
        """Return the pasts of the parts of a batch, each of which is computed by itself: like `Tensor.chunk`."""
        if not self.halves:
            self.halves = [Past(self.chunk_size, self.layers, self.kept_type) for _ in range(parts)]
        for half in self.halves:
            half.final = self.final
        return self.halves
