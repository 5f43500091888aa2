"""The trainer of preferences against the recorded numbers: those that are right, not those of the public code."""

import copy
import random

import pytest
import torch
from models import tiny2
from parity import V2, assert_close
from torch import Tensor

from cosyvoice.bin.preference_model import PreferenceModel
from cosyvoice.llm.qwen2_lm import Qwen2LM

CONF = {"optim": "adam", "optim_conf": {"lr": 1e-5}, "scheduler": "constantlr", "grad_clip": 5}


@pytest.mark.parametrize("name", V2.cases("llm_dpo_*"))
def test_parity2_trainer_of_preferences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layouts are those recorded: there, the two versions of a clip need not have the same."""
    data, meta = V2.arrays(name), V2.meta(name)
    batch = {key.removeprefix("batch/"): value for key, value in data.items() if key.startswith("batch/")}
    llm = tiny2("llm")
    reference = copy.deepcopy(llm)
    with torch.no_grad():
        reference.llm_decoder.weight.mul_(0.9)
    random.seed(meta["seed"])
    lengths = torch.cat((batch["speech_token_len"], batch["reject_speech_token_len"])).tolist()
    layouts = torch.tensor(llm.turns.draw(0.5, batch["text_token_len"].repeat(2).tolist(), lengths))
    doubled = Qwen2LM.doubled
    monkeypatch.setattr(Qwen2LM, "doubled", lambda llm, batch: doubled(llm, batch) | {"bistream": layouts})

    assert meta["label_smoothing"] == 0
    losses = PreferenceModel(llm, reference, CONF | {"dpo_conf": {"beta": meta["beta"]}}, seed=1).losses(batch)
    rewards = [data["right/chosen_reward"], data["right/rejected_reward"]]
    wanted: dict[str, Tensor] = {
        "loss": data["right/total_loss"],
        "sft_loss": data["sft_loss"],
        "dpo_loss": data["right/dpo_loss"],
        "chosen_reward": rewards[0].mean(),
        "reject_reward": rewards[1].mean(),
        "reward_margin": (rewards[0] - rewards[1]).mean(),
        "dpo_acc": (rewards[0] > rewards[1]).float().mean(),
    }
    for key, value in wanted.items():
        assert_close(losses[key], value, atol=1e-4)
    assert losses.keys() == wanted.keys() | {"acc"}


def test_parity2_usual_beta() -> None:
    model = PreferenceModel(tiny2("llm"), tiny2("llm"), CONF, seed=1)
    assert (model.preference.beta, model.preference.label_smoothing, model.preference.ipo) == (0.01, 0, False)
