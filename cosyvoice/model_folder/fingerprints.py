"""What tells files apart without reading more of them than is needed."""

import hashlib
import zipfile
from pathlib import Path


def fingerprint_file(path: Path) -> str:
    """SHA-256 of the file's content, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_weights(path: Path) -> str:
    """SHA-256, hexadecimal, of the names, sizes and checksums of all tensors, as a weights file's directory lists them.

    So a large model need not be read. A file without a directory (torch's format before 1.6) is, whole.
    """
    try:
        with zipfile.ZipFile(path) as file:
            listed = sorted((entry.filename.partition("/")[2], entry.file_size, entry.CRC) for entry in file.infolist())
    except zipfile.BadZipFile:
        return fingerprint_file(path)
    return hashlib.sha256(repr(listed).encode()).hexdigest()
