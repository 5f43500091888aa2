"""Writes files that appear whole or not at all, and reads the recipes' lists of files."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from cosyvoice.runtime.errors import DISK_TROUBLE, InputError
from cosyvoice.runtime.temporary_files import temporary_file
from cosyvoice.utils.audio import load_wav
from cosyvoice.utils.text_files import decode_lines

# load_wav, logging: servers and notebooks import them from here
__all__ = [
    "alone_in",
    "atomic_write",
    "copy_file",
    "load_wav",
    "logging",
    "read_json_lists",
    "read_lists",
    "save_tensors",
]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` if the block succeeds, and else is removed.

    The suffix is kept, since writers choose a format by it. Of several that write the same file at once, on whatever
    machines, each has its own temporary file, and the last to finish wins. Leftovers of killed runs are removed. Raises
    InputError if the folder cannot be written.
    """
    path = Path(path)
    with ExitStack() as temporaries:
        try:
            temporary = temporaries.enter_context(temporary_file(path))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another folder") from None
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if error.errno in DISK_TROUBLE or error.filename2 is not None:  # a second name: os.replace failed
                raise InputError(f"cannot write {path}: {error.strerror}; make room or choose another folder") from None
            raise


@contextmanager
def alone_in(folder: Path, command: str) -> Iterator[None]:
    """Keep a second `command` from working in the folder until the block ends. Raises InputError if one does already.

    The operating system holds the lock, so a killed run releases it.
    """
    from filelock import FileLock, Timeout

    path = folder / f".{command}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        problem = f"another {command} is at work in {folder}"
        raise InputError(f"{problem}; wait until it ends, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # another run has it already
            path.unlink()


def copy_file(source: Path, path: Path) -> None:
    """Copy the content of `source` to `path`, whole or not at all."""
    with atomic_write(path) as temporary:
        shutil.copyfile(source, temporary)


def save_tensors(content: Any, path: Path) -> None:
    """Write a file with torch.save, whole or not at all. Equal content gives equal bytes, whatever the file's name."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides the file's own error, a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_lists(list_file: str | Path) -> list[str]:
    """Return the non-empty lines of a text file, stripped.

    Raises InputError if the file is missing or not UTF-8.
    """
    path = Path(list_file)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a text file with one entry a line")
    return [line.strip() for line in decode_lines(path.read_bytes(), str(path)) if line.strip()]


def read_json_lists(list_file: str | Path) -> dict[str, Any]:
    """Return the merged entries of the JSON files that a text file lists, one a line; later entries win.

    Raises InputError if a file is missing, or is not a JSON object.
    """
    entries: dict[str, Any] = {}
    for name in read_lists(list_file):
        try:
            content = json.loads("\n".join(read_lists(name)))
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{name} is not JSON: {error}; write it again") from None
        if not isinstance(content, dict):
            raise InputError(f"{name} has no named values; write it again")
        entries |= content
    return entries
