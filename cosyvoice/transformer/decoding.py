"""The attention stack of the language model in the form that decodes fastest.

A decoding step multiplies every weight with a single frame, so its time is that of reading the weights. The linear
layers of the blocks change their form; norms, softmax and cache stay in float32. So does the embedding: it is less than
a hundredth of the weights, and rounding it to 8 bits would cost more than all the others.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from cosyvoice.transformer.attention import RelPositionMultiHeadedAttention
from cosyvoice.transformer.cache import INITIAL_CACHE_FRAMES
from cosyvoice.transformer.encoder import TransformerEncoder
from cosyvoice.transformer.precision import Convert, stacked
from matcha.models.components.past import KeyValueCache

LEAST_CAPTURED_FRAMES = 1024  # room of a cache for short sentences, so that one serves them all
MOST_CAPTURED_FRAMES = 4096  # longer ones would keep gigabytes for the most that they could become
FEWEST_ROWS = 256  # of the cache that a graph attends to
MOST_IDLE = 4  # that wait for the next sequence; each keeps its cache
WARM_UP_STEPS = 3  # in which libraries choose kernels and allocate workspaces, which no capture may do
_capturing = threading.Lock()  # torch can do one at a time


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
        self.register_buffer("positions", super().grown_positions(none, INITIAL_CACHE_FRAMES), persistent=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear_qkv(x).chunk(3, dim=-1)

    def grown_positions(self, positions: Tensor, capacity: int) -> Tensor:
        known = self.positions  # once: other requests may be growing it, too
        if capacity > known.size(2):
            self.positions = known = super().grown_positions(known, capacity)
        return known[:, :, -capacity:]


@torch.no_grad()
def prepare_stack(stack: TransformerEncoder, convert: Convert) -> None:
    """Give the blocks' linear layers their decoding form, in place, one block after the other."""
    for block in stack.encoders:
        block.self_attn = DecodingAttention(block.self_attn, convert)
        block.feed_forward.w_1 = convert(block.feed_forward.w_1)
        block.feed_forward.w_2 = convert(block.feed_forward.w_2)


class DecodingStack(Protocol):
    """An attention stack that reads a growing sequence."""

    def new_cache(self, capacity: int) -> list[KeyValueCache]:
        """Return an empty cache, one part a layer."""

    def step_at(self, x: Tensor, place: Tensor, cache: list[KeyValueCache]) -> Tensor:
        """Read one frame (1, 1, C) into row `place` (1,) of the cache. Returns (1, 1, C)."""


class CapturedSteps:
    """Decoding steps of one sequence at a time as CUDA graphs: captured when first needed, then replayed.

    The hundreds of small kernels of a step take longer to launch than to run. A graph repeats the same kernels on the
    same memory, so the cache keeps its size and place, and what differs between steps, the token and the row that it
    takes in the cache, is read from the device's memory. A graph attends to a fixed number of rows; those after the
    token weigh nothing. So there is one for the first 256 rows, one for twice as many, and so on up to the whole cache,
    and each step replays the shortest that holds its row. On a CPU each step is computed, to the same numbers.
    """

    def __init__(self, stack: DecodingStack, embedding: nn.Embedding, head: nn.Module, capacity: int) -> None:
        """stack: in its decoding form. embedding: of the tokens. head: from the stack's output to scores (V,).

        capacity: the most frames of a sequence.
        """
        self.stack, self.embedding, self.head = stack, embedding, head
        self.cache = stack.new_cache(capacity)
        device = embedding.weight.device
        self.token, self.place = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self.replays = device.type != "cpu"
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by rows: a graph, and where its result lies

    @property
    def capacity(self) -> int:
        return self.cache[0].capacity

    def has_room(self, frames: int) -> bool:
        """Whether so many more fit."""
        return self.cache[0].length + frames <= self.capacity

    def clear(self) -> None:
        """Begin another sequence: `stack.forward_chunk` may read its first frames into `cache`."""
        for layer_cache in self.cache:
            layer_cache.length = 0
            layer_cache.keys.zero_()  # rows that are not written yet take part with weight 0: none may be NaN
            layer_cache.values.zero_()

    def after(self, token: int) -> Tensor:
        """Return the log-probabilities (V,) of what follows `token`, which becomes part of the sequence.

        The next step may overwrite them.
        """
        place = self.cache[0].length
        self.token.fill_(token)
        self.place.fill_(place)
        for layer_cache in self.cache:
            layer_cache.length += 1
        rows = self.rows_for(place)
        if not self.replays:
            return self.compute(rows)
        if rows not in self.graphs:
            with _capturing, torch.cuda.device(self.token.device):
                self.graphs[rows] = self.capture(rows)  # a capture that fails, for want of memory, is tried again
        graph, log_p = self.graphs[rows]
        graph.replay()
        return log_p

    def rows_for(self, place: int) -> int:
        """Return the fewest rows of a graph that hold `place`."""
        return min(self.capacity, max(FEWEST_ROWS, 1 << place.bit_length()))

    def compute(self, rows: int) -> Tensor:
        """Compute the step for `token` at `place`, which is among the first `rows` of the cache."""
        some_rows = [layer_cache.first(rows) for layer_cache in self.cache]
        x = self.stack.step_at(self.embedding(self.token).unsqueeze(0), self.place, some_rows)
        return self.head(x[0, -1]).float().log_softmax(dim=-1)

    def capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return the graph of `compute(rows)` and where each replay leaves its result."""
        side, before = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self.compute(rows)  # writes what the replay will write
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as the flow of a stream, may go on allocating memory
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # its own is of the first GPU
                log_p = self.compute(rows)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves the thread on the other
        return graph, log_p


class CapturedStepsPool:
    """`CapturedSteps` that are used again: as many as sequences are being written at a time, of which few are kept."""

    def __init__(self, stack: DecodingStack, embedding: nn.Embedding, head: nn.Module) -> None:
        self.parts = (stack, embedding, head)
        self.idle: list[CapturedSteps] = []
        self._choosing = threading.Lock()

    @contextmanager
    def lent(self, frames: int) -> Iterator[CapturedSteps]:
        """Steps for a new sequence of at most so many frames."""
        with self._choosing:
            steps = next((steps for steps in self.idle if steps.capacity >= frames), None)
            # without one that fits, all are too short: a longer one serves short sentences too
            self.idle = [other for other in self.idle if other is not steps] if steps else []
        if steps is None:
            steps = CapturedSteps(*self.parts, capacity=max(LEAST_CAPTURED_FRAMES, 1 << (frames - 1).bit_length()))
        steps.clear()
        try:
            yield steps
        finally:
            with self._choosing:
                self.idle = [*self.idle, steps][-MOST_IDLE:]
