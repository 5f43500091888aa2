"""Places that fail while a command is at work: a full disk, and folders that somebody deletes."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from jobs import COMMANDS, Job, Stage

resource = pytest.importorskip("resource")  # which Windows lacks
FULL_BYTES = 4_000  # no file may grow beyond this


def files(folder: Path) -> dict[str, bytes]:
    """Return the finished files of a job, without logs."""
    found = [*(folder / "data").rglob("*"), *(folder / "output").rglob("*")]
    kept = [path for path in found if path.is_file() and path.suffix in (".parquet", ".csv", ".pt", ".wav", ".ckpt")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def fill_up() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))


@pytest.mark.parametrize("name", COMMANDS)
def test_on_a_full_disk_a_command_says_so_in_one_line_and_old_files_stay(
    name: str, finished: Job, tmp_path: Path
) -> None:
    job = finished.copy(tmp_path)
    before = files(tmp_path)
    (tmp_path / "raw").unlink()
    shutil.copytree(finished.folder / "raw", tmp_path / "raw")
    (tmp_path / "raw" / "001.txt").write_text("Other words are to be said here.")  # there is something to do again
    if name == "train":
        for path in (tmp_path / "output").glob("*last.ckpt"):
            path.unlink()
            del before[str(path.relative_to(tmp_path))]
    process = job.start(name, fill_up)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in errors, errors
    assert "File too large" in errors.splitlines()[-1], errors
    after = files(tmp_path)
    assert {path: after[path] for path in before if not path.endswith("report.csv")} == {
        path: content for path, content in before.items() if not path.endswith("report.csv")
    }
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize(("name", "folder"), [("prepare", "raw"), ("prepare", "data"), ("train", "output")])
def test_a_folder_that_is_deleted_under_a_command_leaves_no_traceback(
    name: str, folder: str, stages: dict[str, Stage], finished: Job, tmp_path: Path
) -> None:
    job = stages[name].before.copy(tmp_path)
    (tmp_path / "raw").unlink()
    shutil.copytree(finished.folder / "raw", tmp_path / "raw")
    process = job.start(name)
    waits_for = {"raw": "data/.prepare_joint_data.py.lock", "data": "data/.unfinished", "output": "output/*.ckpt"}
    while process.poll() is None and not list(tmp_path.glob(waits_for[folder])):
        time.sleep(0.01)
    shutil.rmtree(tmp_path / folder, ignore_errors=True)
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode in (0, 2) and "Traceback" not in errors, errors
