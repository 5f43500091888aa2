"""Prepared clips on disk: the columns of the parquet files, and how a run's files replace those before."""

import hashlib
import shutil
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.model_yaml import spelled
from cosyvoice.model_folder.weights import fingerprint_file
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.file_utils import atomic_write

CLIPS_PER_FILE = 100
UNFINISHED = ".unfinished"  # folder of the rows that an interrupted run had made

_saving = threading.Lock()  # two copies of a recording are one file

SCHEMA = pa.schema(
    {
        "utt": pa.string(),  # the recording's file name without suffix
        "wav": pa.string(),  # path of the recording
        "audio_data": pa.binary(),  # its bytes
        "text": pa.string(),  # what is said, as written
        "spk": pa.string(),  # name of the speaker
        "utt_embedding": pa.list_(pa.float32(), 192),  # the clip's speaker vector, L2 norm 1
        "spk_embedding": pa.list_(pa.float32(), 192),  # mean of all utt_embedding, L2 norm 1
        "speech_token": pa.list_(pa.int32()),  # (N,), 50 a second
        "text_token": pa.list_(pa.int32()),  # (L,), of the normalised text
        "speech_feat": pa.list_(pa.float32()),  # (T, 80) natural log-mel at 22.05 kHz, hop 256, row after row
        "speech_feat_shape": pa.list_(pa.int32(), 2),  # [T, 80]
        "seconds": pa.float32(),
        "peak_dbfs": pa.float32(),  # 0 is full scale
        "silence_share": pa.float32(),  # of the frames of 20 ms: 40 dB or more below the loudest
        "content_hash": pa.string(),  # SHA-256 of what the row was made from
        "encoders": pa.string(),  # `encoders_of` the model folder that it was made with
    }
)


def encoders_of(model_dir: Path) -> str:
    """What tells apart models whose tokens and vectors mean different things: a SHA-256 of encoders and tokenizer.

    Raises InputError where one of the encoders' files is missing.
    """
    folder = ModelFolder(model_dir)
    encoders = folder.speech_tokenizer, folder.speaker_encoder
    for path in encoders:
        if not path.is_file():
            raise InputError(f"{path} does not exist; copy it from the {folder.generation.name} download")
    hashes = [fingerprint_file(path) for path in encoders]
    tokenizer = folder.parts(["get_tokenizer"])["get_tokenizer"]
    return hashlib.sha256(" ".join((*hashes, str(spelled(tokenizer)))).encode()).hexdigest()


def with_column(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    """The table with one column of SCHEMA replaced."""
    column = SCHEMA.field(name)
    return table.set_column(SCHEMA.get_field_index(name), column, pa.array(values, column.type))


def known_rows(data_dir: Path) -> dict[str, pa.Table]:
    """One-row tables of earlier runs, finished or not, by content hash. Unreadable files hold none."""
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
    """Keep a new row at once, so that a run that is interrupted can be taken up again."""
    content_hash = row["content_hash"][0].as_py()  # names of recordings can be too long for one more suffix
    with _saving, atomic_write(data_dir / UNFINISHED / f"{content_hash}.parquet") as path:
        pq.write_table(row, path)


def write_clips(rows: Sequence[pa.Table], speaker: str, data_dir: Path) -> None:
    """Write the one-row tables of one speaker to parquet files, in place of all clips of earlier runs."""
    # rows read from a file name the items of their lists differently: the bytes would tell which those were
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
