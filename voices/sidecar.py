"""The file beside merged weights, which holds what a file of tensors cannot."""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from config import MODES, PARTS
from cosyvoice.model_folder.weights import check_fields
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import atomic_write
from voices.run import Run
from voices.run_state import PACE, check_pace

VERSION = "0.1.0"
FIELDS = {"speaker": str, "run": str, "files": dict, "merged_epoch": dict, "base": dict}


def sidecar_path(output_dir: Path, mode: str) -> Path:
    return output_dir / f"voice_{mode}.json"


@dataclass(frozen=True)
class Sidecar:
    """What a sidecar tells of merged weights."""

    speaker: str
    run: str
    files: dict[str, Path]  # by part
    merged_epoch: dict[str, int]  # by part
    merged_scale: dict[str, float]  # share of what the adapters change, by part; older files do not have it
    base: dict[str, str]  # fingerprints of the base weights, by part
    pace: float | None  # as in Origin


def newest_voice(output_dir: Path) -> Sidecar:
    """Return the newest sidecar of a folder. Raises InputError where there is none, or a merged file is gone."""
    found = sidecars(output_dir)
    if not found:
        raise InputError(f"{output_dir} holds no trained voice; run train_joint.py first, or give --llm and --flow")
    voice = read_sidecar(found[0])
    if lost := [str(path) for path in voice.files.values() if not path.is_file()]:
        raise InputError(f"{', '.join(lost)} of {found[0].name} is gone; run merge_joint_weights.py again")
    return voice


def sidecars(folder: Path) -> list[Path]:
    """The sidecars of a folder, the newest first."""
    found = (sidecar_path(folder, mode) for mode in MODES)
    return sorted((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime, reverse=True)


def read_sidecar(path: Path) -> Sidecar:
    """Return what a file tells that `write_sidecar` wrote. Raises InputError for anything else."""
    remedy = "run merge_joint_weights.py to write it anew"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path} cannot be read; {remedy}") from None
    check_fields(path, content, FIELDS, remedy)
    check_pace(path, content, remedy)
    if not content["files"].keys() <= set(PARTS):
        raise InputError(f"{path} is damaged: it names files of other parts than {' and '.join(PARTS)}; {remedy}")
    for name in content["files"]:
        check_fields(path, content["files"], {name: str}, remedy)
        check_fields(path, content["base"], {name: str}, remedy)
    scales = content.get("merged_scale", {})
    check_fields(path, content | {"merged_scale": scales}, {"merged_scale": dict}, remedy)
    files = {part: path.parent / file for part, file in content["files"].items()}
    values = {name: content[name] for name in FIELDS} | {"files": files}
    return Sidecar(**values, merged_scale=scales, pace=content.get(PACE))


def _relative(file: Path, folder: Path) -> str:
    try:
        return os.path.relpath(file, folder)
    except ValueError:  # on another drive
        return str(file.resolve())


def write_sidecar(run: Run, files: dict[str, Path], epochs: dict[str, int], scale: float, output_dir: Path) -> Path:
    """Write what a file of tensors cannot hold. files: by part. epochs: the epoch that each part's weights are from.

    scale: the share of what the adapters change. Parts that an earlier merge of the same run wrote stay listed.
    """
    path, state, origin = sidecar_path(output_dir, run.mode), run.state, run.state.origin
    try:
        earlier = read_sidecar(path)
    except InputError:  # there is none, or it is damaged and replaced
        earlier = None
    scales = dict.fromkeys(files, scale)
    if earlier and earlier.run == origin.run:
        files, epochs = earlier.files | files, earlier.merged_epoch | epochs
        scales = earlier.merged_scale | scales
    progress = {part: state.progress[part] for part in run.parts}
    content = {
        "version": VERSION,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": run.mode,
        "speaker": origin.speaker,
        "run": origin.run,
        "files": {part: _relative(file, output_dir) for part, file in files.items()},
        "merged_epoch": epochs,
        "merged_scale": scales,
        "base": origin.base,
        "seed": state.seed,
        "epochs_trained": state.epochs,
        "losses": {part: [losses.content() for losses in own.history] for part, own in progress.items()},
        "stopped": {part: own.stopped for part, own in progress.items()},
        "settings": run.config,
        **({} if origin.pace is None else {PACE: origin.pace}),
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
