"""Temporary files whose names tell their writers, so that no two writers share one and abandoned ones are removed."""

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

STEM_LETTERS = 20  # of the file's own name, since the whole may not be too long
ABANDONED_SECONDS = 24 * 3600  # without a change; then a temporary file of another machine is nobody's

_NAME = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part.*", re.DOTALL)
_own_names: set[str] = set()  # of the files that this process is writing


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield the path of a new, empty file in the folder of `path`, which is removed in the end if it is still there.

    Its suffix is that of `path`. What killed writers left in the folder is removed when a process first comes here.
    Raises OSError if the folder cannot be written.
    """
    own = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.stem[:STEM_LETTERS]}.{own}.part{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent.resolve())
    _own_names.add(temporary.name)
    try:
        temporary.touch()
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _own_names.discard(temporary.name)


@cache  # once a process: to list a folder of many files for each of them would take long
def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of writers that no longer exist, as far as that can be known and is allowed."""
    for name in os.listdir(folder):
        with suppress(OSError):  # its writer has just renamed it, or it is another user's
            if (found := _NAME.fullmatch(name)) and _is_abandoned(folder / name, found[1], int(found[2])):
                (folder / name).unlink()


def _is_abandoned(path: Path, machine: str, process: int) -> bool:
    if path.name in _own_names:
        return False
    if machine == _machine() and not _is_running(process):
        return True
    return time.time() - path.stat().st_mtime > ABANDONED_SECONDS


def _is_running(process: int) -> bool:
    """Return whether another process with this number may be running on this machine."""
    if process == os.getpid():  # an earlier one had the same number
        return False
    if os.name != "posix":  # there os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True


@cache
def _machine() -> str:
    """Return eight digits that are the same only for processes that see each other's numbers."""
    marks = [socket.gethostname()]
    with suppress(OSError):  # machines may have the same name
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):  # containers of one machine number their processes separately
        marks.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:8]
