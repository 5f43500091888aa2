"""How commands start and end."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cosyvoice.runtime.command import EXIT_USER_ERROR, run
from cosyvoice.runtime.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("given", "expected"), [(None, "1000"), ("7", "7")])
def test_waiting_threads_leave_the_core_to_others(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user has chosen otherwise."""
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    seen = []
    with pytest.raises(SystemExit) as left:
        run(lambda argv: seen.append(os.environ["GOMP_SPINCOUNT"]))
    assert left.value.code == 0 and seen == [expected]


def test_a_users_mistake_is_one_line_and_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/speak.py"])

    def main(argv: object) -> int:
        raise InputError("no such voice; train one first")

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err == "speak.py: no such voice; train one first\n"


def test_a_full_disk_is_one_line_and_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main(argv: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "logs/events")

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("train.py: No space left on device (logs/events); make room")


def test_an_interrupt_while_python_clears_up_leaves_no_traceback() -> None:
    code = (
        "import atexit, os, signal\n"
        "from cosyvoice.runtime.command import run\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"  # before, as libraries do
        "run(lambda argv: 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


INTERRUPTED = (130, "-c: interrupted; what was finished is kept\n")


@pytest.mark.parametrize(
    "main",
    [
        # as numpy does where it is interrupted while it is loaded
        "    try:\n        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n        raise ImportError('numpy')\n",
        # in a callback that cannot raise
        "    Thing()\n    for _ in range(600):\n        time.sleep(0.1)\n",
        "    signal.raise_signal(signal.SIGINT)\n",
    ],
)
def test_an_interrupt_while_libraries_load_is_one_line(main: str) -> None:
    code = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also where tests ignore it
        "from cosyvoice.runtime.command import run\n"
        "class Thing:\n    def __del__(self):\n        signal.raise_signal(signal.SIGINT)\n"
        f"def main(argv):\n{main}"
        "run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == INTERRUPTED


@pytest.mark.skipif(os.name == "nt", reason="how a process ends by a signal is a matter of POSIX")
@pytest.mark.parametrize(("ignored", "expected"), [(False, -signal.SIGINT), (True, 0)])
def test_an_interrupt_during_the_imports_says_nothing(ignored: bool, expected: int) -> None:
    code = (
        f"import signal\nsignal.signal(signal.SIGINT, signal.{'SIG_IGN' if ignored else 'default_int_handler'})\n"
        "from cosyvoice.runtime.startup import stop_silently\nstop_silently()\nsignal.raise_signal(signal.SIGINT)\n"
        "from cosyvoice.runtime.command import run\nrun(lambda argv: signal.raise_signal(signal.SIGINT))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (expected, "")


@pytest.mark.parametrize("script", ["prepare_joint_data", "train_joint", "merge_joint_weights", "inference_joint"])
def test_scripts_stop_silently_before_they_import_the_suite(script: str) -> None:
    """Of all that imports the suite, it comes first."""
    lines = (ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()
    imports = [line.strip() for line in lines if re.match(r" *(from|import) ", line)]
    assert imports[0] == "from cosyvoice.runtime.startup import stop_silently"
