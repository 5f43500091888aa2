"""What a checkpoint tells of its run: the rules that stop a part, and the files that older versions wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from config import JOINT_TRAINING_CONFIG
from cosyvoice.runtime.errors import InputError
from voices.progress import EpochLosses, PartProgress, clearly_less
from voices.run import Run
from voices.run_state import Origin, read_state
from voices.sidecar import read_sidecar, write_sidecar

PATH = Path("joint_llm_only_last.ckpt")


def run_epochs(*losses: float, held_out: bool, threshold: float = 0.0, patience: int = 2) -> PartProgress:
    """Return the progress of epochs of two clips with these losses; training ends at the first reason to stop."""
    progress = PartProgress()
    for epoch, loss in enumerate(losses, start=1):
        assert not progress.stopped
        progress.add(loss - 1, clips=1)
        progress.add(loss + 1, clips=1)
        progress.end_epoch(epoch, [loss, 2 * loss] if held_out else [], threshold, patience)
    return progress


@pytest.mark.parametrize("held_out", [True, False])
def test_patience_counts_epochs_since_the_best_one(held_out: bool) -> None:
    progress = run_epochs(5, 4, 4.5, 3, 3, 3.5, held_out=held_out)
    assert progress.stopped == "no better loss for 2 epochs"
    assert (progress.best_epoch, progress.best_loss) == (4, 4.5 if held_out else 3.0)
    assert [losses.train for losses in progress.history] == [5, 4, 4.5, 3, 3, 3.5]
    assert (progress.history[-1].val == 5.25) == held_out
    assert progress.history[-1].judged == (5.25 if held_out else 3.5)
    assert not run_epochs(5, 4, 4.5, 3, 3, held_out=held_out).stopped


def test_the_mean_training_loss_of_three_epochs_reaches_the_threshold() -> None:
    assert not run_epochs(6, 1, 2, held_out=True, threshold=2).stopped  # one epoch below it, a mean of 3
    progress = run_epochs(6, 1, 2, 2.9, held_out=True, threshold=2, patience=9)
    assert progress.stopped == "its training loss 1.967 reached the threshold 2"
    assert progress.best_epoch == 2


def test_only_the_best_epoch_asks_for_its_adapters() -> None:
    progress, best = PartProgress(), []
    for epoch, loss in enumerate((3.0, 4.0, 2.0), start=1):
        progress.add(loss, clips=1)
        best.append(progress.end_epoch(epoch, [loss], threshold=0.0, patience=9))
    assert best == [True, False, True]


def test_an_epoch_is_better_by_more_than_chance() -> None:
    assert clearly_less([2.0], [2.1]) and not clearly_less([2.1], [2.0]) and not clearly_less([2.0], [2.0])
    assert clearly_less([1.9, 4.8, 0.9], [2.0, 5.0, 1.0])  # each clip's is less, however unlike the clips are
    assert not clearly_less([2.0, 5.0, 0.5], [2.0, 5.0, 1.0]) and not clearly_less([1.0, 5.5], [2.0, 5.0])


def written() -> dict[str, Any]:
    """Return the state of a checkpoint in the form that every version has written."""
    history = [{"epoch": 1, "train": 3.5, "val": 3.0, "val_error": 0.25}, {"epoch": 2, "train": 3.25}]
    progress = {
        "best_loss": 3.0, "best_epoch": 1, "epochs_without_gain": 1, "stopped": "", "loss_sum": 6.5, "clips": 2,
        "history": history, "best": {"a.lora_A": torch.ones(2, 2)}, "best_held_out": [2.75, 3.25],
    }  # fmt: skip
    return {
        "mode": "llm_only", "run": "17", "base": {"llm": "1", "flow": "2"}, "data": "3", "speaker": "anna", "pace": 4.5,
        "config": JOINT_TRAINING_CONFIG, "seed": 7, "embedding": torch.ones(192), "epochs": 2, "batches_done": 4,
        "progress": {"llm": progress},
    }  # fmt: skip


def test_a_checkpoints_state_is_written_as_it_was_read() -> None:
    state = read_state(PATH, written())
    assert state.origin == Origin("llm_only", "17", {"llm": "1", "flow": "2"}, "3", "anna", 4.5)
    progress = state.progress["llm"]
    assert progress.history == [EpochLosses(1, 3.5, 3.0, 0.25), EpochLosses(2, 3.25)]
    assert (progress.loss_sum, progress.clips, progress.epochs_without_gain) == (6.5, 2, 1)
    found = state.content()
    assert torch.equal(found.pop("embedding"), torch.ones(192))
    assert torch.equal(found["progress"]["llm"].pop("best")["a.lora_A"], torch.ones(2, 2))
    expected = written()
    del expected["embedding"], expected["progress"]["llm"]["best"]
    assert found == expected


def test_an_older_checkpoint_lacks_what_was_added_later() -> None:
    content = written()
    del content["pace"]
    for name in ("epochs_without_gain", "loss_sum", "clips", "best_held_out"):
        del content["progress"]["llm"][name]
    state = read_state(PATH, content)
    assert state.origin.pace is None and "pace" not in state.content()
    assert (state.progress["llm"].clips, state.progress["llm"].best_held_out) == (0, [])


@pytest.mark.parametrize(("name", "value"), [("loss_sum", "6.5"), ("clips", None), ("best_held_out", 3.0)])
def test_a_field_of_another_kind_is_refused(name: str, value: Any) -> None:
    content = written()
    content["progress"]["llm"][name] = value
    with pytest.raises(InputError, match=f"damaged: its {name} is missing or of another kind"):
        read_state(PATH, content)


def test_a_sidecar_has_all_its_fields(tmp_path: Path) -> None:
    run = Run(PATH, read_state(PATH, written()), {"llm": {}})
    path = write_sidecar(run, {"llm": tmp_path / "llm.pt"}, {"llm": 1}, 0.5, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "voice_llm_only.json" and content.pop("written")
    assert list(content.items()) == [
        ("version", "0.1.0"), ("mode", "llm_only"), ("speaker", "anna"), ("run", "17"), ("files", {"llm": "llm.pt"}),
        ("merged_epoch", {"llm": 1}), ("merged_scale", {"llm": 0.5}), ("base", {"llm": "1", "flow": "2"}),
        ("seed", 7), ("epochs_trained", 2),
        ("losses", {"llm": written()["progress"]["llm"]["history"]}), ("stopped", {"llm": ""}),
        ("settings", JOINT_TRAINING_CONFIG), ("pace", 4.5),
    ]  # fmt: skip
    voice = read_sidecar(path)
    assert (voice.speaker, voice.files, voice.pace) == ("anna", {"llm": tmp_path / "llm.pt"}, 4.5)
    assert voice.merged_scale == {"llm": 0.5}
