"""Turn recordings of one speaker and their texts into training data.

    python prepare_joint_data.py --input-dir raw_audio --speaker anna

Reads recordings of 0.5 to 30 s with a text of the same name (001.wav and 001.txt), or with a list of texts
(LJSpeech's metadata.csv, GPT-SoVITS's .list). Writes parquet files and report.csv, which says for every clip whether it
was kept, or why it was not. A second run processes only what has changed.
"""

if __name__ == "__main__":  # before the imports, which take a while
    from cosyvoice.runtime.startup import stop_silently

    stop_silently()

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config import find_input_dir, find_model_dir
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.command import check_least, run
from cosyvoice.runtime.errors import InputError
from utils import add_device, add_folders, check_writable, in_parallel, is_unicode, repeated

if TYPE_CHECKING:
    from clips.checks import Outcome
    from clips.maker import ClipMaker
    from clips.recordings import Recording

FORMULA_MARKS = ("=", "+", "-", "@", "\t")
REPORT_COLUMNS = {  # heading: digits after the point, or None if it is no fraction
    "utt": None,
    "seconds": 2,
    "cut_seconds": 2,
    "speech_tokens": None,
    "text_tokens": None,
    "characters_per_second": 1,
    "peak_dbfs": 1,
    "silence_share": 2,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_folders(parser, "model", "data")
    data = parser.add_argument_group("recordings")
    data.add_argument(
        "--input-dir", type=Path, help="recordings and texts (default: raw_audio/ here or one level up, "
        "or ../data_preparation/short_raw_data/)"
    )  # fmt: skip
    data.add_argument("--speaker", default="speaker", help="name of the speaker (default: %(default)s)")
    data.add_argument(
        "--edges", type=float, default=0.2, metavar="SECONDS",
        help="pause to keep before and after the speech (default: %(default)s; -1: keep all)",
    )  # fmt: skip
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="clips at a time (default: one per core, %(default)s)"
    )
    add_device(work)
    options = parser.parse_args(argv)
    check_least("--workers", options.workers)
    if not (options.edges == -1 or 0 <= options.edges <= 30):
        raise InputError(f"--edges is {options.edges:g}. Give 0 to 30 seconds, or -1 to cut nothing")
    if not options.speaker.strip():
        raise InputError("--speaker is empty. Give the speaker a name")
    if not is_unicode(options.speaker):
        raise InputError(f"--speaker {options.speaker!r} is not UTF-8. Give the speaker another name")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit code."""
    options = parse(argv)
    folder, input_dir = find_model_dir(options.model_dir), find_input_dir(options.input_dir)
    check_writable(options.data_dir, folder.path)
    from cosyvoice.utils.file_utils import alone_in

    with alone_in(options.data_dir, "prepare_joint_data.py"):
        prepare(options, folder, input_dir)
    next_command = f"python train_joint.py{repeated(options, 'model', 'data')}"
    print(f"Data and report.csv are in {options.data_dir}. Next: {next_command}")
    return 0


def prepare(options: argparse.Namespace, folder: ModelFolder, input_dir: Path) -> None:
    """Write the parquet files and the report, and print what was kept. Raises InputError if no clip can be used."""
    import torch

    from clips.checks import compare
    from clips.maker import ClipMaker
    from clips.recordings import find_recordings
    from clips.store import known_rows, write_clips

    torch.set_num_threads(1)  # the workers are the parallelism
    recordings = find_recordings(input_dir, options.speaker.strip())
    edge_seconds = None if options.edges == -1 else options.edges
    known = known_rows(options.data_dir)
    maker = ClipMaker(folder, options.device, known, edge_seconds)
    if others := sum(row["encoders"][0].as_py() != maker.encoders for row in known.values()):
        print(f"{options.data_dir} has {others} clips of another model than {folder.path}. They are made again.")
    outcomes = list(make_clips(maker, recordings, options.workers, options.data_dir))
    compare(outcomes)
    write_report(outcomes, options.data_dir / "report.csv")
    kept = [outcome for outcome in outcomes if outcome.row is not None]
    if not kept:
        example = f"{outcomes[0].utt}: {outcomes[0].reason}"
        raise InputError(f"none of {len(outcomes)} clips can be used ({example}). See {options.data_dir}/report.csv")
    write_clips([outcome.row for outcome in kept], options.speaker.strip(), options.data_dir)
    summarise(outcomes)


def make_clips(
    maker: "ClipMaker", recordings: Sequence["Recording"], workers: int, data_dir: Path
) -> Iterator["Outcome"]:
    """Yield the outcome of each recording, in their order, after saving its row if that is new."""
    from tqdm import tqdm

    from clips.store import save_unfinished

    def work(recording: "Recording") -> "Outcome":
        outcome = maker.make(recording)
        if outcome.row is not None and not outcome.reused:
            save_unfinished(outcome.row, data_dir)
        return outcome

    done = in_parallel(work, recordings, workers)
    yield from tqdm(done, total=len(recordings), desc="clips", unit="clip", disable=None)  # None: only on a terminal


def write_report(outcomes: Sequence["Outcome"], path: Path) -> None:
    """Write a line for each clip: its measures, whether it was kept, the reason if not, and warnings."""
    import csv

    from cosyvoice.utils.file_utils import atomic_write

    def cell(outcome: "Outcome", name: str) -> object:
        value, digits = getattr(outcome, name), REPORT_COLUMNS[name]
        if isinstance(value, str):
            return harmless(value)
        return value if digits is None or value is None else f"{value:.{digits}f}"

    def harmless(text: str) -> str:
        """Return the text so that no spreadsheet takes it for a formula."""
        return f"'{text}" if text.startswith(FORMULA_MARKS) else text

    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow([*REPORT_COLUMNS, "kept", "reason", "warnings"])
        for outcome in outcomes:
            kept = "no" if outcome.row is None else "yes"
            texts = [kept, outcome.reason, "; ".join(outcome.warnings)]
            table.writerow([cell(outcome, name) for name in REPORT_COLUMNS] + list(map(harmless, texts)))


def summarise(outcomes: Sequence["Outcome"]) -> None:
    """Print how many clips were kept, why others were not, and which ones to look at."""
    kept = [outcome for outcome in outcomes if outcome.row is not None]
    minutes = sum(outcome.seconds for outcome in kept) / 60
    unchanged = sum(outcome.reused for outcome in kept)
    print(f"Kept {len(kept)} of {len(outcomes)} clips, {minutes:.1f} minutes of speech ({unchanged} unchanged).")
    for outcome in outcomes:
        if outcome.row is None:
            print(f"  left out {outcome.utt}: {outcome.reason}")
        elif outcome.warnings:
            print(f"  kept {outcome.utt}, but {'; '.join(outcome.warnings)}")


if __name__ == "__main__":
    run(main)
