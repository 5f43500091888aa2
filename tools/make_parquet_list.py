#!/usr/bin/env python3
"""Stage 3 of the recipe: parquet files of a Kaldi-style folder, as training reads them, and lists of them.

    tools/make_parquet_list.py --src_dir data/train --des_dir data/train/parquet

Reads wav.scp, text, utt2spk and what stages 1 and 2 made. Writes parquet_000000000.tar and so on (Parquet, for
all their name) and data.list, which names them; utt2data.list and spk2data.list name JSON files that tell where
an utterance or a speaker is. Utterances that lack something are listed in make_parquet_list.failed in the source
folder. A second run writes only the parquet files whose content changed. With --dpo the files also have the tokens that
preference training rejects: those of the utterances' samples in SRC_DIR_reject, where the failures are listed then.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
ROWS_AT_ONCE = 100  # of one file in memory, and in one row group
MADE_FROM = b"made_from"  # key in a file's metadata: digest of what its rows were made from
REJECTED = "reject_speech_token"  # the column that only preference training reads
LISTS = ("utt_embedding", "spk_embedding", "speech_token", REJECTED)  # columns of numbers
Row = dict[str, Any]


@dataclass
class Shard:
    """One parquet file and its rows, yet without their audio."""

    parquet: Path
    utt2parquet: Path
    spk2parquet: Path
    rows: list[Row]
    made_from: str


def main(argv: Sequence[str] | None = None) -> None:
    from tools.engines import add_engine, opened

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = parser.add_argument_group("folders")
    folders.add_argument("--src_dir", type=Path, required=True, help="what the stages before wrote")
    folders.add_argument("--des_dir", type=Path, required=True, help="for parquet files and lists; the lists name it")
    folders.add_argument("--dpo", action="store_true", help="add the tokens of SRC_DIR_reject/utt2speech_token.pt")
    work = parser.add_argument_group("work")
    work.add_argument("--num_utts_per_parquet", type=int, default=1000, help="in one file (default: %(default)s)")
    work.add_argument("--num_processes", type=int, default=1, help="files at a time in pool (default: %(default)s)")
    add_engine(parser)
    options = parser.parse_args(argv)

    from tqdm import tqdm

    from cosyvoice.runtime.command import check_least
    from tools.kaldi_folder import report_failures

    check_least("--num_utts_per_parquet", options.num_utts_per_parquet)
    check_least("--num_processes", options.num_processes)
    rejects = options.src_dir.with_name(f"{options.src_dir.name}_reject") if options.dpo else None
    rows, failures = collect(options.src_dir, rejects)
    report_failures(failures, len(rows) + len(failures), (rejects or options.src_dir) / "make_parquet_list.failed")
    shards = plan(rows, options.des_dir, options.num_utts_per_parquet)
    with opened(options.engine, options.num_processes) as spread:
        for _ in tqdm(spread(write_shard, shards), total=len(shards), desc="parquet", unit="file", disable=None):
            pass
    write_lists(shards, options.des_dir)
    remove_others(shards, options.des_dir)


def collect(folder: Path, rejects: Path | None) -> tuple[list[Row], dict[str, str]]:
    """Rows without audio of all complete utterances in the order of wav.scp, and {utterance: what it lacks}.

    rejects: the folder of samples to be rejected, if the rows are to have their tokens.
    """
    from tools.kaldi_folder import read_numbers, read_table

    wavs = read_table(folder / "wav.scp")
    texts, speakers = read_table(folder / "text"), read_table(folder / "utt2spk")
    utt_vectors, spk_vectors = (read_numbers(folder / f"{of}2embedding.pt") for of in ("utt", "spk"))
    tokens = read_numbers(folder / "utt2speech_token.pt")
    rejected = read_numbers(rejects / "utt2speech_token.pt") if rejects else {}
    rows, failures = [], {}
    for utt, wav in wavs.items():
        row = {
            "utt": utt,
            "wav": wav,
            "text": texts.get(utt),
            "spk": speakers.get(utt),
            "utt_embedding": utt_vectors.get(utt),
            "spk_embedding": spk_vectors.get(speakers.get(utt)),
            "speech_token": tokens.get(utt),
        }
        if rejects:
            row[REJECTED] = rejected.get(utt)
        lacking = [name for name, value in row.items() if not value]
        lacking += ["audio file"] * (not Path(wav).is_file())
        if lacking:
            failures[utt] = f"it has no {', no '.join(lacking)}"
        else:
            rows.append(row)
    return rows, failures


def plan(rows: Sequence[Row], des_dir: Path, size: int) -> list[Shard]:
    """Shards of `size` rows; the last may have fewer."""
    import numpy as np

    from tools.kaldi_folder import file_stamp

    shards = []
    for number, start in enumerate(range(0, len(rows), size)):
        shard_rows = rows[start : start + size]
        made_from = hashlib.sha256()
        for row in shard_rows:
            told = (row["utt"], file_stamp(Path(row["wav"])), row["text"], row["spk"])
            made_from.update(json.dumps(told).encode())
            for name in (name for name in LISTS if name in row):
                made_from.update(np.asarray(row[name]).tobytes())
        files = (f"parquet_{number:09d}.tar", f"utt2parquet_{number:09d}.json", f"spk2parquet_{number:09d}.json")
        shards.append(Shard(*(des_dir / name for name in files), shard_rows, made_from.hexdigest()))
    return shards


def schema(made_from: str, rejected: bool = False) -> "pa.Schema":
    """The columns of a file, in the order and of the types in which other readers of the format expect them."""
    import pyarrow as pa

    columns = {
        "utt": pa.string(),
        "wav": pa.string(),  # path of the recording
        "audio_data": pa.binary(),  # its bytes
        "text": pa.string(),
        "spk": pa.string(),
        "utt_embedding": pa.list_(pa.float64()),  # (192,), not normalised
        "spk_embedding": pa.list_(pa.float64()),  # (192,), mean of the speaker's utt_embedding
        "speech_token": pa.list_(pa.int64()),  # (N,), 50 a second, or 25 of CosyVoice2
    }
    if rejected:
        columns[REJECTED] = pa.list_(pa.int64())  # (N,)
    return pa.schema(columns, metadata={MADE_FROM: made_from})


def write_shard(shard: Shard) -> None:
    """Write the shard's parquet file, unless it is there and up to date, and its two JSON files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cosyvoice.utils.file_utils import atomic_write

    for key, path in (("utt", shard.utt2parquet), ("spk", shard.spk2parquet)):
        with atomic_write(path) as temporary:
            places = {row[key]: str(shard.parquet) for row in shard.rows}
            temporary.write_text(json.dumps(places, ensure_ascii=False, indent=2), encoding="utf-8")
    if is_up_to_date(shard):
        return
    columns = schema(shard.made_from, REJECTED in shard.rows[0])
    with atomic_write(shard.parquet) as temporary, pq.ParquetWriter(temporary, columns) as file:
        for start in range(0, len(shard.rows), ROWS_AT_ONCE):
            rows = [row | {"audio_data": read_audio(row)} for row in shard.rows[start : start + ROWS_AT_ONCE]]
            file.write_table(pa.Table.from_pylist(rows, columns))


def is_up_to_date(shard: Shard) -> bool:
    """Whether the file holds what it would hold if it were written now."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(shard.parquet).metadata or {}
    except (OSError, pa.ArrowException):  # none is there, or it is damaged
        return False
    return metadata.get(MADE_FROM) == shard.made_from.encode()


def read_audio(row: Row) -> bytes:
    from cosyvoice.runtime.errors import InputError

    try:
        return Path(row["wav"]).read_bytes()
    except OSError as error:
        raise InputError(f"{row['wav']} of {row['utt']} cannot be read: {error.strerror}; run this again") from error


def write_lists(shards: Sequence[Shard], des_dir: Path) -> None:
    """data.list, utt2data.list and spk2data.list: one path a line."""
    from cosyvoice.utils.file_utils import atomic_write

    lists = {"data": "parquet", "utt2data": "utt2parquet", "spk2data": "spk2parquet"}
    for name, kind in lists.items():
        with atomic_write(des_dir / f"{name}.list") as temporary:
            temporary.write_text("".join(f"{getattr(shard, kind)}\n" for shard in shards), encoding="utf-8")


def remove_others(shards: Sequence[Shard], des_dir: Path) -> None:
    """Delete the files of an earlier, larger run, which the lists no longer name."""
    named = {path for shard in shards for path in (shard.parquet, shard.utt2parquet, shard.spk2parquet)}
    for pattern in ("parquet_*.tar", "utt2parquet_*.json", "spk2parquet_*.json"):
        for path in set(des_dir.glob(pattern)) - named:
            path.unlink()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
