"""The files of a finished voice: checkpoints read back, adapters merged, the speaker vector, and the sidecar."""

import json
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from config import CHECKPOINT_KEY, MODES, PARTS
from cosyvoice.model_folder.fingerprints import fingerprint_weights
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import check_fields, check_finite, load_tensors, read_state_dict
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.file_utils import alone_in, atomic_write, save_tensors
from lora import merged
from utils import quoted

VERSION = "0.1.0"
# What a checkpoint tells beside the adapters, and what of each part.
STATE_FIELDS = {
    "config": dict, "seed": int, "speaker": str, "run": str, "data": str, "base": dict, "embedding": Tensor,
    "epochs": int, "batches_done": int, "progress": dict,
}  # fmt: skip
PROGRESS_FIELDS = {"best_loss": float, "best_epoch": int, "stopped": str, "history": list, "best": dict}
SIDECAR_FIELDS = {"speaker": str, "run": str, "files": dict, "merged_epoch": dict, "base": dict}
PACE = "pace"  # in both: the most speech tokens per text token of any training clip; older files do not have it
_OTHER = "train first, or give another joint_<mode>_*.ckpt"


def last_checkpoint(output_dir: Path, mode: str) -> Path:
    return output_dir / f"joint_{mode}_last.ckpt"


def merged_path(output_dir: Path, part: str, mode: str) -> Path:
    return output_dir / f"{part}_merged_{mode}.pt"


def sidecar_path(output_dir: Path, mode: str) -> Path:
    return output_dir / f"voice_{mode}.json"


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
    _check_pace(path, state, _OTHER)
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


def _check_pace(path: Path, content: dict[str, Any], remedy: str) -> None:
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


def newest_run(output_dir: Path) -> Path:
    """The last checkpoint written by any mode. Raises InputError where there is none."""
    found = sorted(output_dir.glob("joint_*_last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"{output_dir} holds no joint_<mode>_last.ckpt; run train_joint.py first, or give --ckpt")
    return found[-1]


def newest_voice(output_dir: Path) -> dict[str, Any]:
    """The newest sidecar's content, its files as paths. Raises InputError where there is none, or a file is gone."""
    found = sidecars(output_dir)
    if not found:
        raise InputError(f"{output_dir} holds no trained voice; run train_joint.py first, or give --llm and --flow")
    content = read_sidecar(found[0])
    files = {part: output_dir / file for part, file in content["files"].items()}
    if lost := [str(path) for path in files.values() if not path.is_file()]:
        raise InputError(f"{', '.join(lost)} of {found[0].name} is gone; run merge_joint_weights.py again")
    return content | {"files": files}


def sidecars(folder: Path) -> list[Path]:
    """The sidecars of a folder, the newest first."""
    found = (sidecar_path(folder, mode) for mode in MODES)
    return sorted((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime, reverse=True)


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return the content of a file that `write_sidecar` wrote. Raises InputError for anything else."""
    remedy = "run merge_joint_weights.py to write it anew"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path} cannot be read; {remedy}") from None
    check_fields(path, content, SIDECAR_FIELDS, remedy)
    _check_pace(path, content, remedy)
    if not content["files"].keys() <= set(PARTS):
        raise InputError(f"{path} is damaged: it names files of other parts than {' and '.join(PARTS)}; {remedy}")
    for name in content["files"]:
        check_fields(path, content["files"], {name: str}, remedy)
        check_fields(path, content["base"], {name: str}, remedy)
    return content


def stored_speakers(output_dir: Path, model_dir: Path) -> dict[str, Any]:
    """What `spk2info.pt` of the base model and that of the output folder hold; of one name, the latter's."""
    from cosyvoice.cli.frontend import read_spk2info

    return read_spk2info(ModelFolder(model_dir).stored_speakers) | read_spk2info(output_dir / "spk2info.pt")


def write_speaker(run: Run, known: dict[str, Any], output_dir: Path) -> Path:
    """Write `spk2info.pt`: the voice, beside the speakers already known."""
    target = output_dir / "spk2info.pt"
    voice = {"embedding": run.state["embedding"].view(1, -1).float()}
    save_tensors(known | {run.state["speaker"]: voice}, target)
    return target


def _relative(file: Path, folder: Path) -> str:
    try:
        return os.path.relpath(file, folder)
    except ValueError:  # on another drive
        return str(file.resolve())


def write_sidecar(run: Run, files: dict[str, Path], epochs: dict[str, int], output_dir: Path) -> Path:
    """What a file of tensors cannot hold. files: merged file by part. epochs: the epoch each part's weights are from.

    Parts that an earlier merge of the same run wrote stay listed.
    """
    path = sidecar_path(output_dir, run.mode)
    progress = run.state["progress"]
    content = {
        "version": VERSION,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": run.mode,
        "speaker": run.state["speaker"],
        "run": run.state["run"],
        "files": {part: _relative(file, output_dir) for part, file in files.items()},
        "merged_epoch": epochs,
        "base": run.state["base"],
        "seed": run.state["seed"],
        "epochs_trained": run.state["epochs"],
        "losses": {part: progress[part]["history"] for part in run.parts},
        "stopped": {part: progress[part]["stopped"] for part in run.parts},
        "settings": run.config,
        **({PACE: run.state[PACE]} if PACE in run.state else {}),
    }
    try:
        earlier = read_sidecar(path)
    except InputError:  # there is none, or it is damaged and replaced
        earlier = {}
    if earlier.get("run") == content["run"]:
        content |= {key: earlier[key] | content[key] for key in ("files", "merged_epoch")}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def merge_run(run: Run, model_dir: Path, output_dir: Path, targets: dict[str, Path], use_best: bool) -> list[Path]:
    """Merge the parts named in `targets` into those files, and write speaker vector and sidecar.

    `use_best` takes every part's best epoch, otherwise the weights as the checkpoint holds them. Returns the files.
    """
    run.check_base(base_fingerprints(model_dir), model_dir)
    with alone_in(output_dir, "merge_joint_weights.py"):
        speakers, epochs = stored_speakers(output_dir, model_dir), {}
        with ExitStack() as renaming:  # all at the end, so that a stopped merge mixes no old part with a new one
            for part, target in targets.items():
                base = read_state_dict(ModelFolder(model_dir).weights(part))
                adapters = run.best(part) if use_best else run.adapters[part]
                save_tensors(merged(base, adapters, run.scale(part)), renaming.enter_context(atomic_write(target)))
                progress = run.state["progress"][part]
                epochs[part] = progress["best_epoch"] if use_best else len(progress["history"])
        speaker = write_speaker(run, speakers, output_dir)
        return [*targets.values(), speaker, write_sidecar(run, targets, epochs, output_dir)]
