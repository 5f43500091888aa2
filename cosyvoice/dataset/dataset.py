"""A corpus of parquet files as epochs of batches, divided among processes and workers."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cosyvoice.dataset.parquet import readable_parquet
from cosyvoice.dataset.processor import preferences
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.text_files import decode_lines

Batch = dict[str, Any]
Step = Callable[..., Iterable[Any]]


class Dataset(IterableDataset):
    """The files of a list, processed by the steps of a recipe's `data_pipeline`.

    The files are dealt to processes times workers streams. Order, share and random draws depend on seed, epoch and
    stream only. So an epoch can be repeated, and two processes with one worker each see the same batches as one process
    with two workers.
    """

    def __init__(
        self,
        data_list_file: Path,
        data_pipeline: Sequence[Step],
        mode: str = "train",
        gan: bool = False,
        dpo: bool = False,
        shuffle: bool = True,
        partition: bool = True,
        seed: int = 1986,
    ) -> None:
        """Read the list. Raises InputError if it is missing or empty.

        data_list_file: a parquet file on each line. gan: add waveform and pitch to the batches. dpo: leave out
        recordings without rejected speech tokens, and add these to the batches. partition: give each process a share
        of the files, not all of them.
        """
        self.files = read_list(Path(data_list_file))
        self.name = str(data_list_file)
        opener, *steps, padding = data_pipeline
        steps = [opener, *([preferences] if dpo else []), *steps, partial(padding, gan=gan, dpo=dpo)]
        self.steps = [partial(step, mode=mode) for step in steps]
        self.shuffle, self.partition, self.seed = shuffle, partition, seed
        self.rank, self.processes = 0, 1
        self.shared_epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive read it

    @property
    def epoch(self) -> int:
        return int(self.shared_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next `iter`, for all workers. Without shuffle every epoch is the same."""
        self.shared_epoch.fill_(epoch if self.shuffle else 0)

    def set_share(self, rank: int, processes: int) -> None:
        """Take the share of process `rank`. Raises InputError if there are fewer files than processes."""
        if self.partition and len(self.files) < processes:
            raise InputError(
                f"{self.name} lists {len(self.files)} parquet file(s) for {processes} processes; write smaller ones "
                "(tools/make_parquet_list.py --num_utts_per_parquet), or start fewer processes"
            )
        self.rank, self.processes = (rank, processes) if self.partition else (0, 1)

    def fingerprint(self) -> str:
        """Return a digest that changes when a file of the list is replaced by one with other rows. It reads no rows.

        Raises InputError if a file cannot be read.
        """
        digest = hashlib.sha256()
        for file in self.files:
            with readable_parquet(file):
                footer = pyarrow.parquet.read_metadata(file)
            digest.update(repr((footer.metadata, footer.to_dict())).encode())  # sizes and extremes of each column
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        """Return an iterator over this worker's batches of the current epoch."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # the first streams get the most files and belong to different processes
        stream = number * self.processes + self.rank
        files = list(self.files)
        if self.shuffle:
            random.Random(seed_of(self.seed, self.epoch)).shuffle(files)
        data: Iterable[Any] = ({"src": file} for file in files[stream :: workers * self.processes])
        for step in self.steps:
            data = step(data)
        return with_own_random(iter(data), seed_of(self.seed, self.epoch, stream))


def read_list(path: Path) -> list[str]:
    """Return the files of a list. Raises InputError if the list or one of its files is missing."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; tools/make_parquet_list.py writes data.list")
    try:
        files = [line for line in decode_lines(path.read_bytes(), str(path)) if line.strip()]
    except InputError as error:
        raise InputError(f"{error}, or give the data.list that tools/make_parquet_list.py writes") from None
    if not files:
        raise InputError(f"{path} lists no parquet file; run tools/make_parquet_list.py again")
    if missing := [file for file in files if not Path(file).is_file()]:
        remedy = "make it again with tools/make_parquet_list.py, or start in the folder that its path is relative to"
        raise InputError(f"{path} lists {missing[0]}, which does not exist; {remedy}")
    return files


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def with_own_random(items: Iterator[Any], seed: int) -> Iterator[Any]:
    """Yield the items, which see a state of Python's global generator that nothing else sees or changes."""
    own = random.Random(seed).getstate()
    while True:
        outside = random.getstate()
        random.setstate(own)
        try:
            item = next(items, None)
        finally:
            own = random.getstate()
            random.setstate(outside)
        if item is None:
            return
        yield item
