"""Learning-rate schedules."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cosyvoice.runtime.errors import InputError


class WarmupLR(LRScheduler):
    """A linear rise over `warmup_steps` to the optimiser's lr, then a decay with the square root of the step.

    lr_n = lr * sqrt(w) * min(n^-0.5, n * w^-1.5), n = 1, 2, ...: the Transformer's schedule ("Attention Is
    All You Need", section 5.3), scaled so that the peak does not depend on w. Without warm-up (w = 0) lr_n
    = lr * n^-0.5.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 25000, last_epoch: int = -1) -> None:
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        n, w = self.last_epoch + 1, self.warmup_steps
        scale = w**0.5 * min(n**-0.5, n * w**-1.5) if w else n**-0.5
        return [lr * scale for lr in self.base_lrs]

    def set_step(self, step: int) -> None:
        """Continue after `step` steps."""
        self.last_epoch = step


class ConstantLR(LRScheduler):
    """The optimiser's lr, unchanged.

    warmup_steps has no effect: CosyVoice2's recipe leaves it in scheduler_conf beside `scheduler: constantlr`.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0) -> None:
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return self.base_lrs


class NoamHoldAnnealing(LRScheduler):
    """A linear rise to the optimiser's lr, a hold, then a decay with a power of the step.

    lr_n = lr * min(1, (n + 1) / (w + 1)) up to step w + h, then lr * (w / (n - h))^d, and never below min_lr there;
    n = 0, 1, ... counts steps, w = warmup_steps, h = hold_steps, d = decay_rate. After step max_steps it is min_lr.
    This is the schedule of Squeezeformer (Kim et al. 2022).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        hold_steps: int = 0,
        decay_rate: float = 0.5,
        min_lr: float = 0.0,
        max_steps: int | None = None,
    ) -> None:
        """Set the schedule. Raises InputError unless warm-up and hold end before max_steps."""
        if max_steps is not None and warmup_steps + hold_steps >= max_steps:
            raise InputError(
                f"NoamHoldAnnealing: warmup_steps {warmup_steps} and hold_steps {hold_steps} "
                f"fill max_steps {max_steps}. Give a larger max_steps, or leave it out"
            )
        self.warmup_steps, self.hold_steps, self.max_steps = warmup_steps, hold_steps, max_steps
        self.decay_rate, self.min_lr = decay_rate, min_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        n, w, h = self.last_epoch, self.warmup_steps, self.hold_steps
        if self.max_steps is not None and n > self.max_steps:
            return [self.min_lr for _ in self.base_lrs]
        if n <= w + h:
            return [lr * min(1.0, (n + 1) / (w + 1)) for lr in self.base_lrs]
        scale = (max(1, w) / (n - h)) ** self.decay_rate
        return [max(lr * scale, self.min_lr) for lr in self.base_lrs]


class CosineLR(LRScheduler):
    """The optimiser's lr times `learning_rate_factor` of the optimiser's steps."""

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, end: float = 0.0) -> None:
        """Set the schedule. Raises InputError unless the warm-up is shorter than the total and 0 <= end <= 1."""
        if not 0 <= warmup_steps < total_steps or not 0 <= end <= 1:
            raise InputError(
                "cosine needs 0 <= warmup_steps < total_steps and 0 <= end <= 1, "
                f"not {warmup_steps}, {total_steps} and {end}"
            )
        self.total_steps, self.warmup_steps, self.end = total_steps, warmup_steps, end
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        factor = learning_rate_factor(self.last_epoch, self.warmup_steps, self.total_steps, self.end)
        return [lr * factor for lr in self.base_lrs]


def learning_rate_factor(step: int, warmup: int, total: int, end: float = 0.0) -> float:
    """Return a factor that rises over `warmup` steps, then falls along half a cosine from 1 to `end` at `total`.

    Steps count from 0 and include the warm-up. Source: Loshchilov and Hutter, 2017, equation 5, without restarts.
    """
    if step < warmup:
        return (step + 1) / warmup
    half_cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
    return end + (1 - end) * half_cosine
