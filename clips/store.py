"""Prepared clips on disk, and how a run's parquet files replace those of earlier runs."""

import shutil
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosyvoice.utils.file_utils import atomic_write
from dataset import SCHEMA

CLIPS_PER_FILE = 100
UNFINISHED = ".unfinished"  # folder with the rows of an interrupted run

_saving = threading.Lock()  # two copies of a recording share one file


def with_column(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    """Return the table with one column of SCHEMA replaced."""
    column = SCHEMA.field(name)
    return table.set_column(SCHEMA.get_field_index(name), column, pa.array(values, column.type))


def known_rows(data_dir: Path) -> dict[str, pa.Table]:
    """Return one-row tables of earlier runs, finished or not, by content hash. Unreadable files are skipped."""
    rows = {}
    for path in [*data_dir.glob("clips-*.parquet"), *(data_dir / UNFINISHED).glob("*.parquet")]:
        try:
            table = pq.read_table(path, partitioning=None)
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            continue
        if table.schema.equals(SCHEMA):
            hashes = table["content_hash"].to_pylist()
            rows |= {content_hash: table.slice(i, 1) for i, content_hash in enumerate(hashes)}
    return rows


def save_unfinished(row: pa.Table, data_dir: Path) -> None:
    """Save a new row at once, so that an interrupted run can be resumed."""
    content_hash = row["content_hash"][0].as_py()  # a recording's name may be too long for another suffix
    with _saving, atomic_write(data_dir / UNFINISHED / f"{content_hash}.parquet") as path:
        pq.write_table(row, path)


def write_clips(rows: Sequence[pa.Table], speaker: str, data_dir: Path) -> None:
    """Write the one-row tables of one speaker to parquet files, which replace all clips of earlier runs."""
    # rows read from a file name their list items differently; without the cast the new file's bytes would differ
    table = pa.concat_tables([row.cast(SCHEMA) for row in rows])
    mean = np.mean(table["utt_embedding"].to_pylist(), axis=0)  # (192,)
    table = with_column(table, "spk", [speaker] * len(table))
    table = with_column(table, "spk_embedding", [mean / np.linalg.norm(mean)] * len(table))

    starts = range(0, len(table), CLIPS_PER_FILE)
    files = [data_dir / f"clips-{number:05d}.parquet" for number in range(len(starts))]
    with ExitStack() as renaming:  # all at the end, so that a killed run mixes no old clips with new ones
        for file, start in zip(files, starts, strict=True):
            temporary = renaming.enter_context(atomic_write(file))
            pq.write_table(table.slice(start, CLIPS_PER_FILE), temporary)
    left_by_killed_runs = data_dir.glob(".clips-*.parquet")
    for stale in {*data_dir.glob("clips-*.parquet"), *left_by_killed_runs} - set(files):
        stale.unlink()
    shutil.rmtree(data_dir / UNFINISHED, ignore_errors=True)
