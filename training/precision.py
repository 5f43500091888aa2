"""The precision that training computes in."""

from typing import Any

import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor

from cosyvoice.runtime.device import cpu_has_bfloat16

HALF_TYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
# Of the loss in float16. torch's own, 65536, has room for gradients below 1 only, and each overflow costs one of a
# run's few steps, while the schedule moves on. This one has room for gradients from 6e-11 to 64.
FIRST_LOSS_SCALE = 1024.0
MOST_SKIPPED_STEPS = 3  # without a word


def half_type(config: dict[str, Any], device: str) -> torch.dtype | None:
    """What the frozen weights are kept in where it is computed in half precision: on a GPU."""
    return HALF_TYPES.get(config["precision"]) if device == "cuda" else None


def compute_precision(config: dict[str, Any], device: str) -> str:
    """The precision to compute in: a CPU gains nothing from float16, but some multiply faster in bfloat16."""
    wanted = config["precision"]
    if device == "cpu" and wanted == "16-mixed":
        return "bf16-mixed" if cpu_has_bfloat16() else "32-true"
    return wanted


def precision_options(config: dict[str, Any], device: str) -> dict[str, Any]:
    """The trainer's options for the precision to compute in."""
    precision = compute_precision(config, device)
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": MixedPrecision(precision, device, LossScaler(device))}


class LossScaler(torch.amp.GradScaler):
    """Scales the loss for float16, counts the optimiser steps that overflow costs, and says so where there are many."""

    def __init__(self, device: str) -> None:
        super().__init__(device, init_scale=FIRST_LOSS_SCALE)
        self.skipped = 0

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Set the scale for the next step, a smaller one where this step was left out."""
        before = self.get_scale()
        super().update(new_scale)
        if self.get_scale() < before:
            self.skipped += 1
            if self.skipped == MOST_SKIPPED_STEPS + 1:
                problem = f"{self.skipped} optimiser steps were left out, because gradients overflow in float16"
                print(f"\n{problem}: --set precision=bf16-mixed or 32-true takes them", flush=True)
