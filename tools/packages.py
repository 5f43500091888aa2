"""The packages of requirements-eval.txt, which the suite itself does without."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

from cosyvoice.utils.errors import InputError

REINSTALL = "Run: python -m pip install --force-reinstall --no-deps -r requirements-eval.txt"


@contextmanager
def optional() -> Iterator[None]:
    """Import a judge's package inside this. Raises InputError with the remedy where the package is missing."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"a package of the judges is missing ({error}). Run: make eval") from None


def packaged_file(package: str, path: str) -> Path:
    """Return where an installed package keeps a file, without importing the package.

    Raises InputError where the package or the file is missing.
    """
    with optional():
        file = Path(distribution(package).locate_file(path))
    if not file.is_file():
        raise InputError(f"the package {package} has no {path}. {REINSTALL}")
    return file
