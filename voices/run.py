"""A training checkpoint, read back and checked."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from config import CHECKPOINT_KEY, MODES, PARTS
from cosyvoice.model_folder.fingerprints import fingerprint_weights
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import check_fields, check_finite, load_tensors
from cosyvoice.runtime.errors import InputError
from utils import quoted

# What a checkpoint tells beside the adapters, and what of each part.
STATE_FIELDS = {
    "config": dict, "seed": int, "speaker": str, "run": str, "data": str, "base": dict, "embedding": Tensor,
    "epochs": int, "batches_done": int, "progress": dict,
}  # fmt: skip
PROGRESS_FIELDS = {"best_loss": float, "best_epoch": int, "stopped": str, "history": list, "best": dict}
PACE = "pace"  # the most speech tokens a text token of any training clip; older files do not have it
_OTHER = "train first, or give another joint_<mode>_*.ckpt"


def last_checkpoint(output_dir: Path, mode: str) -> Path:
    return output_dir / f"joint_{mode}_last.ckpt"


def newest_run(output_dir: Path) -> Path:
    """The last checkpoint written by any mode. Raises InputError where there is none."""
    found = sorted(output_dir.glob("joint_*_last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"{output_dir} holds no joint_<mode>_last.ckpt; run train_joint.py first, or give --ckpt")
    return found[-1]


def base_fingerprints(model_dir: Path) -> dict[str, str]:
    """What tells the base weights from others, by part. Raises InputError where a file is missing."""
    files = {part: ModelFolder(model_dir).weights(part) for part in PARTS}
    for file in files.values():
        if not file.is_file():
            raise InputError(f"{file} does not exist; check the folder, or download the model again")
    return {part: fingerprint_weights(file) for part, file in files.items()}


@dataclass
class Run:
    """A training checkpoint as the suite writes it."""

    path: Path
    mode: str
    parts: tuple[str, ...]
    config: dict[str, Any]
    state: dict[str, Any]  # the suite's own state: seed, speaker, embedding (192,), progress of each part, base
    adapters: dict[str, dict[str, Tensor]]  # by part, as they were when the checkpoint was written

    def scale(self, part: str) -> float:
        return scale_of(self.config[f"{part}_lora"])

    @property
    def embedding(self) -> Tensor:
        """The speaker vector (1, 192)."""
        return self.state["embedding"].view(1, -1)

    @property
    def pace(self) -> float | None:
        """Return the speaker's slowest pace in speech tokens per text token, if the run trained an LLM and noted it."""
        return self.state.get(PACE) if "llm" in self.parts else None

    def best(self, part: str) -> dict[str, Tensor]:
        """The adapters of the part's best epoch; raises InputError before the first epoch has ended."""
        best = self.state["progress"][part]["best"]
        if not best:
            command = f"python train_joint.py --mode {self.mode} --resume {quoted(self.path)}"
            raise InputError(f"no epoch of {self.path} is finished; go on with {command}")
        return best

    def check_base(self, fingerprints: dict[str, str], model_dir: Path) -> None:
        """Raises InputError unless the parts were trained on the base weights of this folder."""
        check_base(str(self.path), self.state["base"], self.parts, fingerprints, model_dir)


def check_base(
    trained: str, base: dict[str, str], parts: Iterable[str], fingerprints: dict[str, str], model_dir: Path
) -> None:
    """Raises InputError unless the parts of what is called `trained` have their base weights in this folder."""
    for part in parts:
        if base[part] != fingerprints[part]:
            other = f"{trained} was trained on another base model than {ModelFolder(model_dir).weights(part)}"
            raise InputError(f"{other}; give the folder it was trained on with --model-dir")


def scale_of(lora: dict[str, Any]) -> float:
    """The factor of an adapter's update, by the part's LoRA settings."""
    return lora["lora_alpha"] / lora["lora_r"]


def read_run(path: Path) -> Run:
    """Raises InputError for a missing or damaged file, and for one that is no training checkpoint of the suite.

    What it holds is checked here, once, so that nothing else need doubt it.
    """
    content = load_tensors(path, _OTHER)
    state = content.get(CHECKPOINT_KEY) if isinstance(content, dict) else None
    if not isinstance(state, dict) or str(state.get("mode")) not in MODES:
        weights = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
        kind = "merged or base weights" if weights else "something else"
        raise InputError(f"{path} is no checkpoint of train_joint.py but {kind}; {_OTHER}")
    parts = MODES[state["mode"]]
    check_fields(path, state, STATE_FIELDS, _OTHER)
    check_pace(path, state, _OTHER)
    for part in parts:
        check_fields(path, state["base"], {part: str}, _OTHER)
        check_fields(path, state["progress"], {part: dict}, _OTHER)
        check_fields(path, state["progress"][part], PROGRESS_FIELDS, _OTHER)
        check_fields(path, state["config"], {f"{part}_lora": dict}, _OTHER)
        check_fields(path, state["config"][f"{part}_lora"], {"lora_r": int, "lora_alpha": int | float}, _OTHER)
        for entry in state["progress"][part]["history"]:
            check_fields(path, entry, {"epoch": int, "train": float}, _OTHER)
        _check_tensors(path, state["progress"][part]["best"])
    _check_tensors(path, {"embedding": state["embedding"]})
    check_fields(path, content, {"state_dict": dict}, _OTHER)
    _check_tensors(path, content["state_dict"])
    adapters: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for name, tensor in content["state_dict"].items():
        _, part, inner = [*name.split(".", 2), "", ""][:3]  # "parts.<part>.<layer>"
        check_fields(path, adapters, {part: dict}, _OTHER)
        adapters[part][inner] = tensor
    return Run(path, state["mode"], parts, state["config"], state, adapters)


def check_pace(path: Path, content: dict[str, Any], remedy: str) -> None:
    """Raise InputError for a pace that no one speaks at; older files have none."""
    if PACE in content:
        check_fields(path, content, {PACE: int | float}, remedy)
        if not 0 < content[PACE] < math.inf:
            raise InputError(f"{path} is damaged: its {PACE} is {content[PACE]}; {remedy}")


def _check_tensors(path: Path, tensors: dict[Any, Any]) -> None:
    """Raises InputError unless these are finite tensors by name."""
    if not all(isinstance(name, str) for name in tensors):
        raise InputError(f"{path} is damaged: its weights have no names; {_OTHER}")
    check_fields(path, tensors, dict.fromkeys(tensors, Tensor), _OTHER)
    check_finite(path, tensors)
