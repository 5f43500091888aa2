"""How far the training of one part has come, and the rules that say when it is over."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SMOOTHED_EPOCHS = 3  # whose mean training loss is compared with the threshold


@dataclass(frozen=True)
class EpochLosses:
    """The mean losses of one epoch, counted from 1. Where no clip is held out, there is no `val`."""

    epoch: int
    train: float
    val: float | None = None
    val_error: float | None = None  # the standard error of val

    @property
    def judged(self) -> float:
        """The loss that the epoch is judged by."""
        return self.train if self.val is None else self.val

    def content(self) -> dict[str, float]:
        """Return the losses as files hold them."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class PartProgress:
    """How far the training of one part has come.

    A part stops when the mean training loss of its last three epochs falls to the threshold, or when `patience` epochs
    in a row were not better than the best one. Patience counts epochs, however few optimiser steps an epoch has.
    """

    best_loss: float = math.inf
    best_epoch: int = 0
    epochs_without_gain: int = 0
    stopped: str = ""  # why, once it has
    loss_sum: float = 0.0  # over the clips of the epoch so far
    clips: int = 0
    history: list[EpochLosses] = field(default_factory=list)
    best: "dict[str, Tensor]" = field(default_factory=dict)  # the adapters of the best epoch
    best_held_out: list[float] = field(default_factory=list)  # the losses whose mean best_loss is

    def add(self, loss: float, clips: int) -> None:
        """Count a training batch with its mean loss."""
        self.loss_sum += loss * clips
        self.clips += clips

    def end_epoch(self, epoch: int, held_out: list[float], threshold: float, patience: int) -> bool:
        """Judge the epoch by its held-out losses, or by its training loss where there are none, and stop if it is time.

        Return whether it is the best so far, whose adapters belong into `best`.
        """
        losses = EpochLosses(epoch, self.loss_sum / self.clips)
        if held_out:
            losses = EpochLosses(epoch, losses.train, statistics.fmean(held_out), standard_error(held_out))
        self.history.append(losses)
        self.loss_sum, self.clips = 0.0, 0
        is_best = self._compare(epoch, held_out or [losses.train])
        self.stopped = self._reason_to_stop(threshold, patience)
        return is_best

    def _compare(self, epoch: int, losses: list[float]) -> bool:
        if self.best_held_out and not clearly_less(losses, self.best_held_out):
            self.epochs_without_gain += 1
            return False
        self.best_loss, self.best_held_out = statistics.fmean(losses), losses
        self.best_epoch, self.epochs_without_gain = epoch, 0
        return True

    def _reason_to_stop(self, threshold: float, patience: int) -> str:
        recent = statistics.fmean(losses.train for losses in self.history[-SMOOTHED_EPOCHS:])
        if recent <= threshold:
            return f"its training loss {recent:.3f} reached the threshold {threshold:g}"
        if self.epochs_without_gain >= patience:
            return f"no better loss for {patience} epochs"
        return ""

    def content(self) -> dict[str, Any]:
        """Return the progress as checkpoints hold it."""
        return vars(self) | {"history": [losses.content() for losses in self.history]}


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; 0 for one value, of which nothing is known."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def clearly_less(losses: Sequence[float], than: Sequence[float]) -> bool:
    """Return whether the losses' mean is below that of the same clips and draws before, by more than its error."""
    gains = [before - now for before, now in zip(than, losses, strict=True)]
    return statistics.fmean(gains) > standard_error(gains)
