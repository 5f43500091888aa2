"""Feeds epochs of batches to a trainer, in step with the other processes."""

from collections.abc import Iterator

from torch.utils.data import DataLoader

from cosyvoice.dataset.dataset import Batch, Dataset
from cosyvoice.runtime.errors import InputError
from cosyvoice.runtime.processes import everywhere, rank_and_processes


class EpochLoader:
    """An iterable whose passes are epochs of this process's batches.

    All processes end an epoch as soon as one of them has no batch left: gradients are averaged over all processes, and
    the others would wait for it forever.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0, prefetch: int = 100, pin_memory: bool = False) -> None:
        """Set up the workers. prefetch: batches that each worker prepares in advance."""
        self.dataset = dataset
        self.loader = DataLoader(
            dataset,
            batch_size=None,  # the pipeline makes the batches
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            persistent_workers=num_workers > 0,  # starting one takes seconds, too long for short epochs
            pin_memory=pin_memory,
        )
        self.epoch = 0
        self.skip = 0  # batches of the next pass that an interrupted run has already seen

    @property
    def sampler(self) -> "EpochLoader":
        """Return the object whose `set_epoch` the trainer calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the epoch's batches. Raises InputError if no utterance passes the pipeline or a file is unreadable."""
        self.dataset.set_share(*rank_and_processes())
        self.dataset.set_epoch(self.epoch)
        skip, self.skip = self.skip, 0
        seen = 0
        for batch in in_step(self.batches()):
            seen += 1
            if seen > skip:
                yield batch
        if not seen:
            remedy = "Check the settings of filter and resample in the YAML"
            raise InputError(f"no utterance of {self.dataset.name} can be trained on. {remedy}")

    def batches(self) -> Iterator[Batch]:
        try:
            yield from self.loader
        except InputError as error:  # a worker's error has a traceback before its message
            message = str(error).strip().splitlines()[-1]
            raise InputError(message.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")) from None


def in_step(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches as long as every process has one."""
    for batch in batches:
        if not everywhere(True):
            return
        yield batch
    everywhere(False)
