"""The four commands in a folder of their own, as processes."""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.random_model import make_random_model
from voices.run import read_run

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = ROOT / "examples" / "raw_audio"
CLIPS = 8
COMMANDS = {  # run inside the job's folder
    "prepare": "prepare_joint_data.py --model-dir model --data-dir data --input-dir raw --workers 1 --device cpu",
    "train": "train_joint.py --model-dir model --data-dir data --output-dir output --device cpu --resume auto --set",
    "merge": "merge_joint_weights.py --model-dir model --output-dir output",
    "speak": "inference_joint.py --model-dir model --output-dir output --text-file raw/lines --device cpu",
}
COMMANDS["speak"] += " --batch-size 1"
COMMANDS["train"] += " batch_size=1 accumulate_grad_batches=4 max_feat_len=40 learning_rate=0.01 max_epochs=2"


@dataclass
class Job:
    """The whole job in one folder, whose commands can be run, stopped and compared."""

    folder: Path

    def start(self, name: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        """Start a command. before: called in its process first."""
        script, *options = COMMANDS[name].split()
        command = [sys.executable, str(ROOT / script), *options]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=before
        )

    def run(self, name: str) -> float:
        """Run to the end. Returns the seconds that it took."""
        started = time.perf_counter()
        process = self.start(name)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        return time.perf_counter() - started

    def stop(self, name: str, seconds: float, kind: signal.Signals) -> None:
        """Start the command and stop it after so many seconds; a signal that can be caught leaves no traceback."""
        process = self.start(name)
        time.sleep(seconds)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=120)
        assert seconds < 1 or "Traceback" not in errors, errors  # before that, Python itself is interrupted

    def result(self) -> dict[str, str]:
        """Return what the job has made: contents by name, without what tells the time."""
        found = {}
        for path in sorted([*(self.folder / "data").rglob("*"), *(self.folder / "output").rglob("*")]):
            if path.is_file() and path.suffix in (".parquet", ".csv", ".pt", ".wav"):
                found[str(path.relative_to(self.folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.name.endswith("_last.ckpt"):
                progress = read_run(path).state.progress
                found[path.name] = str([(part, state.history, state.stopped) for part, state in progress.items()])
        return found

    def copy(self, folder: Path) -> "Job":
        for name in ("data", "output"):
            shutil.copytree(self.folder / name, folder / name)
        for name in ("model", "raw"):
            (folder / name).symlink_to(self.folder / name)
        return Job(folder)


@dataclass
class Stage:
    """One command of a job that was run to its end."""

    job: Job
    before: Job  # a copy from just before the command
    seconds: float  # that it takes
    result: dict[str, str]  # what is there after it


def new_job(folder: Path) -> Job:
    """Make a small random model and some recordings."""
    make_random_model(folder / "model", seed=7)
    for name in ("raw", "data", "output"):
        (folder / name).mkdir()
    for number in range(1, CLIPS + 1):
        for suffix in ("wav", "txt"):
            shutil.copy(RECORDINGS / f"{number:03d}.{suffix}", folder / "raw")
    (folder / "raw" / "lines").write_text("One.\nTwo words.\nThree more words.\n")
    return Job(folder)
