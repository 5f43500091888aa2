"""Reads the rows of a corpus's parquet files, and checks the values of each column."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from cosyvoice.runtime.errors import InputError

ROWS_AT_ONCE = 64
VECTORS = ("utt_embedding", "spk_embedding")


def rows(file: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file. Raises InputError if it cannot be read."""
    with readable_parquet(file):
        for group in pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE):
            columns = [column.to_numpy(zero_copy_only=False) for column in group.columns]
            for values in zip(*columns, strict=True):
                yield dict(zip(group.schema.names, values, strict=True))


@contextmanager
def readable_parquet(file: str) -> Iterator[None]:
    """Turn errors of reading inside the block into an InputError that names the file."""
    try:
        yield
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:  # the last: column names
        reason = " ".join(str(error).split())
        remedy = "make it again, or start in the folder that its path is relative to"
        raise InputError(f"{file} is not a readable parquet file: {reason}; {remedy}") from error


def is_intact(name: str, value: Any) -> bool:
    """Return whether a value is of the type that `make_parquet_list.py` writes into the column."""
    if name in ("utt", "spk", "text", "wav"):
        return isinstance(value, str)
    if name == "audio_data":
        return isinstance(value, bytes)
    numbers = value if isinstance(value, np.ndarray) else np.empty(0, dtype=object)
    if name in VECTORS:
        return len(numbers) > 0 and numbers.dtype.kind == "f" and bool(np.isfinite(numbers).all())
    if name == "reject_speech_token" and value is None:
        return True  # only preference training needs it
    if name in ("speech_token", "reject_speech_token"):
        return numbers.dtype.kind in "iu" and bool((numbers >= 0).all())
    return True  # nothing here reads the column
