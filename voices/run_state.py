"""What a training checkpoint tells beside the adapters: where the run comes from, and how far it has come."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from config import MODES
from cosyvoice.model_folder.weights import check_fields, check_finite
from cosyvoice.runtime.errors import InputError
from voices.progress import EpochLosses, PartProgress

REMEDY = "train first, or give another joint_<mode>_*.ckpt"
STATE_FIELDS = {
    "config": dict, "seed": int, "speaker": str, "run": str, "data": str, "base": dict, "embedding": Tensor,
    "epochs": int, "batches_done": int, "progress": dict,
}  # fmt: skip
PROGRESS_FIELDS = {"best_loss": float, "best_epoch": int, "stopped": str, "history": list, "best": dict}
# What older files may lack.
LATER_PROGRESS_FIELDS = {"epochs_without_gain": int, "loss_sum": float, "clips": int, "best_held_out": list}
LATER_EPOCH_FIELDS = {"val": float, "val_error": float}
PACE = "pace"


@dataclass(frozen=True)
class Origin:
    """Where a run comes from."""

    mode: str  # one of config.MODES
    run: str  # a name that no other run has
    base: dict[str, str]  # fingerprints of the base weights, by part
    data: str  # fingerprint of the clips
    speaker: str
    pace: float | None = None  # the most speech tokens a text token of any training clip; older files do not have it


@dataclass(frozen=True)
class RunState:
    """The suite's own state of a training run."""

    origin: Origin
    config: dict[str, Any]
    seed: int
    embedding: Tensor  # (192,), the speaker vector
    epochs: int  # that are done
    batches_done: int  # of the epoch after those
    progress: dict[str, PartProgress]  # by part

    def content(self) -> dict[str, Any]:
        """Return the state as checkpoints hold it, in plain types and tensors."""
        origin = {name: value for name, value in vars(self.origin).items() if value is not None}
        progress = {part: progress.content() for part, progress in self.progress.items()}
        state = {name: value for name, value in vars(self).items() if name != "origin"}
        return origin | state | {"progress": progress}


def read_state(path: Path, content: dict[str, Any]) -> RunState:
    """Return what `RunState.content` gave, of a known mode. Raises InputError, naming the file, for anything else."""
    check_fields(path, content, STATE_FIELDS, REMEDY)
    check_pace(path, content, REMEDY)
    check_tensors(path, {"embedding": content["embedding"]})
    parts = MODES[content["mode"]]
    for part in parts:
        check_fields(path, content["base"], {part: str}, REMEDY)
        check_fields(path, content["progress"], {part: dict}, REMEDY)
        check_fields(path, content["config"], {f"{part}_lora": dict}, REMEDY)
        check_fields(path, content["config"][f"{part}_lora"], {"lora_r": int, "lora_alpha": int | float}, REMEDY)
    progress = {part: _read_progress(path, content["progress"][part]) for part in parts}
    origin = Origin(**{field.name: content.get(field.name) for field in fields(Origin)})
    own = {field.name: content[field.name] for field in fields(RunState) if field.name != "origin"}
    return RunState(origin, **own | {"progress": progress})


def _read_progress(path: Path, content: dict[str, Any]) -> PartProgress:
    values = _checked(path, content, PROGRESS_FIELDS, LATER_PROGRESS_FIELDS)
    check_tensors(path, values["best"])
    epoch_fields = {"epoch": int, "train": float}
    history = [EpochLosses(**_checked(path, entry, epoch_fields, LATER_EPOCH_FIELDS)) for entry in values["history"]]
    return PartProgress(**values | {"history": history})


def _checked(path: Path, content: Any, kinds: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a mapping that are known; those of `later` may be missing."""
    check_fields(path, content, kinds, REMEDY)
    present = {name: kind for name, kind in later.items() if name in content}
    check_fields(path, content, present, REMEDY)
    return {name: content[name] for name in [*kinds, *present]}


def check_pace(path: Path, content: dict[str, Any], remedy: str) -> None:
    """Raise InputError for a pace that no one speaks at; older files have none."""
    if PACE in content:
        check_fields(path, content, {PACE: int | float}, remedy)
        if not 0 < content[PACE] < math.inf:
            raise InputError(f"{path} is damaged: its {PACE} is {content[PACE]}; {remedy}")


def check_tensors(path: Path, tensors: dict[Any, Any]) -> None:
    """Raise InputError unless these are finite tensors by name."""
    if not all(isinstance(name, str) for name in tensors):
        raise InputError(f"{path} is damaged: its weights have no names; {REMEDY}")
    check_fields(path, tensors, dict.fromkeys(tensors, Tensor), REMEDY)
    check_finite(path, tensors)
