"""Learning-rate schedules."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupLR(LRScheduler):
    """Linear rise over `warmup_steps` to the optimiser's lr, then decay with the square root of the step.

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
        """Continue after `step` steps; the next `step()` goes on from there."""
        self.last_epoch = step
