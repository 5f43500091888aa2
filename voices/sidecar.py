"""The file beside merged weights, which holds what a file of tensors cannot."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from config import MODES, PARTS
from cosyvoice.model_folder.weights import check_fields
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import atomic_write
from voices.run import PACE, Run, check_pace

VERSION = "0.1.0"
FIELDS = {"speaker": str, "run": str, "files": dict, "merged_epoch": dict, "base": dict}


def sidecar_path(output_dir: Path, mode: str) -> Path:
    return output_dir / f"voice_{mode}.json"


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
    check_fields(path, content, FIELDS, remedy)
    check_pace(path, content, remedy)
    if not content["files"].keys() <= set(PARTS):
        raise InputError(f"{path} is damaged: it names files of other parts than {' and '.join(PARTS)}; {remedy}")
    for name in content["files"]:
        check_fields(path, content["files"], {name: str}, remedy)
        check_fields(path, content["base"], {name: str}, remedy)
    return content


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
