"""Reads files of CosyVoice-BlankEN, which holds configuration and tokenizer of the Qwen2 model in CosyVoice2."""

import json
from pathlib import Path
from typing import Any

from cosyvoice.runtime.errors import InputError

WEIGHTS = "model.safetensors"
REMEDY = "copy the folder CosyVoice-BlankEN again from the model's download"


def read_text(path: Path) -> str:
    """Return the text of a file. Raises InputError if it is missing or not UTF-8."""
    if not path.is_file():
        raise InputError(f"{path} does not exist, and the model needs it; {REMEDY}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the named values of a JSON file. Raises InputError if it is missing or holds something else."""
    text = read_text(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(values, dict):
        raise InputError(f"{path} has no named values; {REMEDY}")
    return values


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read: {' '.join(str(error).split())}; {REMEDY}")
