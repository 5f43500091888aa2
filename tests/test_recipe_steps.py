"""Single steps of the recipe's trainer: groups of batches, and gradients that are not finite."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from cosyvoice.bin import optimizers, recipe_models
from cosyvoice.bin.recipe_models import SpeechModel
from cosyvoice.runtime.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")

CONF = {"optim": "adam", "optim_conf": {"lr": 0.1}, "scheduler": "constantlr", "grad_clip": 5, "accum_grad": 2}


class Slope(nn.Module):
    """loss = slope * weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: dict, device: torch.device) -> dict[str, Tensor]:
        return {"loss": batch["slope"] * self.weight}


class Slopes:
    """An endless-looking loader, like the recipe's."""

    def __init__(self, *slopes: float) -> None:
        self.slopes = slopes

    def __iter__(self) -> Iterator[dict]:
        for slope in self.slopes:
            yield {"slope": torch.tensor(slope), "utts": ["one"]}


def fit(folder: Path, *slopes: float) -> SpeechModel:
    model = SpeechModel(Slope(), CONF, seed=1)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, default_root_dir=folder, **quiet)
    trainer.fit(model, Slopes(*slopes))
    return model


def test_every_step_takes_the_mean_gradient_of_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def record(parameters: list[nn.Parameter], most: float) -> Tensor:
        taken.append(parameters[0].grad.item())
        return clip(parameters, most)

    clip = recipe_models.clip_grad_norm_
    monkeypatch.setattr(recipe_models, "clip_grad_norm_", record)
    fit(tmp_path, 1.0, 3.0, 4.0)
    assert taken == [2.0, 4.0]  # the last one is alone in its group


def test_gradients_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    step = torch.optim.Adam.step

    def record(self: torch.optim.Adam, closure: object) -> None:
        with torch.enable_grad():
            closure()
        taken.append(self.param_groups[0]["params"][0].grad.item())
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    fit(tmp_path, 30.0, 10.0)
    assert taken == [pytest.approx(5.0)]


def test_a_step_without_finite_gradient_is_left_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="step 1 is left out"):
        model = fit(tmp_path, 1.0, float("nan"))
    assert model.part.weight == 1.0
    with pytest.warns(UserWarning, match="step 1 is left out"):
        model = fit(tmp_path, float("inf"), 1.0, 1.0, 1.0)
    assert model.part.weight.item() == pytest.approx(0.9)  # Adam's first step is the learning rate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": "lion"}, "optim 'lion'"),
        ({"scheduler": None}, "scheduler None"),
        ({"optim_conf": {"rate": 1}}, "rate"),
    ],
)
def test_unknown_settings_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    model = SpeechModel(Slope(), CONF | change, seed=1)
    with pytest.raises(InputError, match=message):
        model.configure_optimizers()


def test_the_cosine_schedule_in_closed_form() -> None:
    conf = CONF | {"scheduler": "cosine", "scheduler_conf": {"warmup_steps": 4, "total_steps": 12, "end": 0.1}}
    optimizer, scheduler = optimizers.build([nn.Parameter(torch.zeros(1))], conf)
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rise = [0.025, 0.05, 0.075, 0.1]
    fall = [0.1 * (0.1 + 0.9 * math.cos(math.pi * step / 16) ** 2) for step in range(8)]  # cos^2(x/2) = (1 + cos x) / 2
    assert rates == pytest.approx([*rise, *fall, 0.01, 0.01, 0.01])
    assert rates[8] == pytest.approx(0.1 * 0.55)  # half-way


@pytest.mark.parametrize("change", [{"warmup_steps": 12}, {"warmup_steps": -1}, {"end": 1.5}, {"end": -0.1}])
def test_impossible_cosines_are_refused(change: dict) -> None:
    conf = CONF | {"scheduler": "cosine", "scheduler_conf": {"total_steps": 12} | change}
    with pytest.raises(InputError, match="cosine needs"):
        optimizers.build([nn.Parameter(torch.zeros(1))], conf)
