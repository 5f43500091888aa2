"""How commands start and end."""

import errno
import os
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
