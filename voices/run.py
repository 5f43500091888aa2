"""A training checkpoint, read back and checked."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from config import CHECKPOINT_KEY, MODES, PARTS
from cosyvoice.model_folder.fingerprints import fingerprint_weights
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import check_fields, load_tensors
from cosyvoice.runtime.errors import InputError
from utils import quoted
from voices.run_state import REMEDY, RunState, check_tensors, read_state


def last_checkpoint(output_dir: Path, mode: str) -> Path:
    return output_dir / f"joint_{mode}_last.ckpt"


def newest_run(output_dir: Path) -> Path:
    """The last checkpoint written by any mode. Raises InputError where there is none."""
    found = sorted(output_dir.glob("joint_*_last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"{output_dir} holds no joint_<mode>_last.ckpt; run train_joint.py first, or give --ckpt")
    return found[-1]


def base_fingerprints(folder: ModelFolder) -> dict[str, str]:
    """Return what tells the base weights from others, by part. Raises InputError where a file is missing."""
    files = {part: folder.weights(part) for part in PARTS}
    for file in files.values():
        if not file.is_file():
            raise InputError(f"{file} does not exist; check the folder, or download the model again")
    return {part: fingerprint_weights(file) for part, file in files.items()}


@dataclass
class Run:
    """A training checkpoint as the suite writes it."""

    path: Path
    state: RunState
    adapters: dict[str, dict[str, Tensor]]  # by part, as they were when the checkpoint was written

    @property
    def mode(self) -> str:
        return self.state.origin.mode

    @property
    def parts(self) -> tuple[str, ...]:
        return MODES[self.mode]

    @property
    def config(self) -> dict[str, Any]:
        return self.state.config

    def scale(self, part: str) -> float:
        return scale_of(self.config[f"{part}_lora"])

    @property
    def embedding(self) -> Tensor:
        """The speaker vector (1, 192)."""
        return self.state.embedding.view(1, -1)

    @property
    def pace(self) -> float | None:
        """Return the speaker's slowest pace in speech tokens per text token, if the run trained an LLM and noted it."""
        return self.state.origin.pace if "llm" in self.parts else None

    def best(self, part: str) -> dict[str, Tensor]:
        """The adapters of the part's best epoch; raises InputError before the first epoch has ended."""
        best = self.state.progress[part].best
        if not best:
            command = f"python train_joint.py --mode {self.mode} --resume {quoted(self.path)}"
            raise InputError(f"no epoch of {self.path} is finished; go on with {command}")
        return best

    def check_base(self, folder: ModelFolder) -> None:
        """Raise InputError unless the parts were trained on the base weights of this folder."""
        check_base(str(self.path), self.state.origin.base, self.parts, folder)


def check_base(trained: str, base: dict[str, str], parts: Iterable[str], folder: ModelFolder) -> None:
    """Raise InputError unless the parts of what is called `trained` have their base weights in this folder."""
    fingerprints = base_fingerprints(folder)
    for part in parts:
        if base[part] != fingerprints[part]:
            other = f"{trained} was trained on another base model than {folder.weights(part)}"
            raise InputError(f"{other}; give the folder it was trained on with --model-dir")


def scale_of(lora: dict[str, Any]) -> float:
    """The factor of an adapter's update, by the part's LoRA settings."""
    return lora["lora_alpha"] / lora["lora_r"]


def read_run(path: Path) -> Run:
    """Return a checkpoint, whose content is checked here, once, so that nothing else need doubt it.

    Raises InputError for a missing or damaged file, and for one that is no training checkpoint of the suite.
    """
    content = load_tensors(path, REMEDY)
    found = content.get(CHECKPOINT_KEY) if isinstance(content, dict) else None
    if not isinstance(found, dict) or str(found.get("mode")) not in MODES:
        weights = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
        kind = "merged or base weights" if weights else "something else"
        raise InputError(f"{path} is no checkpoint of train_joint.py but {kind}; {REMEDY}")
    state = read_state(path, found)
    check_fields(path, content, {"state_dict": dict}, REMEDY)
    check_tensors(path, content["state_dict"])
    adapters: dict[str, dict[str, Tensor]] = {part: {} for part in MODES[state.origin.mode]}
    for name, tensor in content["state_dict"].items():
        _, part, inner = [*name.split(".", 2), "", ""][:3]  # "parts.<part>.<layer>"
        check_fields(path, adapters, {part: dict}, REMEDY)
        adapters[part][inner] = tensor
    return Run(path, state, adapters)
