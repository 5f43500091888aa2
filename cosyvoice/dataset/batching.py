"""Groups samples into runs, and pads a run to tensors."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Sample = dict[str, Any]


def frame_count(sample: Sample) -> int:
    """Return the number of mel frames of a sample, or of its speech tokens if it has no mel."""
    return len(sample["speech_feat" if "speech_feat" in sample else "speech_token"])


def runs(data: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield consecutive runs of `size` samples; the last may be shorter."""
    run: list[Sample] = []
    for sample in data:
        run.append(sample)
        if len(run) == size:
            yield run
            run = []
    if run:
        yield run


def runs_of_frames(data: Iterable[Sample], max_frames: int) -> Iterator[list[Sample]]:
    """Yield consecutive runs whose padded size, longest length times count, is at most `max_frames`.

    A sample that is too long for that gets its own run.
    """
    run: list[Sample] = []
    longest = 0
    for sample in data:
        longest = max(longest, frame_count(sample))
        if run and longest * (len(run) + 1) > max_frames:
            yield run
            run, longest = [], frame_count(sample)
        run.append(sample)
    if run:
        yield run


def token_tensors(samples: list[Sample], name: str) -> list[Tensor]:
    """Return copies of the ids as int64, since Arrow's arrays are read-only."""
    return [torch.from_numpy(np.array(sample[name], dtype=np.int64)) for sample in samples]


def padded(name: str, items: list[Tensor]) -> dict[str, Tensor]:
    """Return {name: (B, L, ...), name_len: (B,) int32}, filled with zeros."""
    lengths = torch.tensor([len(item) for item in items], dtype=torch.int32)
    return {name: pad_sequence(items, batch_first=True), f"{name}_len": lengths}
