"""The learning rates of CosyVoice2's recipe, step by step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import V2
from torch import nn

from cosyvoice.bin import optimizers
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.scheduler import NoamHoldAnnealing

CONF = {"optim": "adam", "optim_conf": {"lr": 1e-3}}
SCHEDULES = {
    "warmuplr_2500": ("warmuplr", {"warmup_steps": 2500}),
    "noamhold_w5_h10_min1e-6": ("NoamHoldAnnealing", {"warmup_steps": 5, "hold_steps": 10, "min_lr": 1e-6}),
}
DEEPSPEED = Path(__file__).parents[1] / "examples" / "libritts" / "cosyvoice" / "conf" / "ds_stage2.json"


def rates(train_conf: dict[str, Any], steps: int) -> list[float]:
    optimizer, scheduler = optimizers.build([nn.Parameter(torch.zeros(1))], train_conf)
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name: str) -> None:
    scheduler, settings = SCHEDULES[name]
    expected = V2.table("schedules")[name]
    found = rates(CONF | {"scheduler": scheduler, "scheduler_conf": settings}, len(expected))
    assert found == pytest.approx(expected, rel=1e-7)


def test_the_shipped_settings_train_at_a_constant_rate() -> None:
    """They give constantlr the warmup_steps of another schedule; with deepspeed upstream raises TypeError there."""
    recorded = V2.table("schedules")
    assert "warmup_steps" in recorded["train_conf"]["scheduler_conf"]
    assert rates(recorded["train_conf"], len(recorded["constantlr"])) == recorded["constantlr"]


def test_deepspeed_takes_the_optimizer_of_train_conf() -> None:
    """Upstream's file asks for AdamW at 1e-3 whatever train_conf says."""
    assert not {"optimizer", "scheduler"} & json.loads(DEEPSPEED.read_text(encoding="utf-8")).keys()


def test_constantlr_refuses_what_it_does_not_know() -> None:
    with pytest.raises(InputError, match="hold_steps"):
        rates(CONF | {"scheduler": "constantlr", "scheduler_conf": {"hold_steps": 3}}, 1)


def test_noam_hold_annealing_ends_at_its_least_rate() -> None:
    settings = {"warmup_steps": 1, "hold_steps": 2, "min_lr": 6e-4, "max_steps": 8}
    found = rates(CONF | {"scheduler": "NoamHoldAnnealing", "scheduler_conf": settings}, 11)
    assert found[:4] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert found[4] == pytest.approx(1e-3 * 0.5**0.5)
    assert found[5:] == pytest.approx([6e-4] * 6)
    with pytest.raises(InputError, match="fill max_steps 3"):
        NoamHoldAnnealing(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 1, 2, max_steps=3)
