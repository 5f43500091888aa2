"""Kaldi-style corpus folders: tables with an utterance per line, vectors and tokens by utterance, and failures."""

import sys
from collections.abc import Mapping
from pathlib import Path

from cosyvoice.model_folder.weights import load_tensors
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import atomic_write
from cosyvoice.utils.text_files import decode_lines

TABLES = ("wav.scp", "text", "utt2spk", "spk2utt")
Numbers = list[float] | list[int]  # a speaker vector (192) or speech tokens (N)


def read_table(path: Path) -> dict[str, str]:
    """Return {first word of a line: the rest of it} in the file's order, without empty lines.

    Raises InputError if the file is missing, empty or not UTF-8, or if two lines have the same first word.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; local/prepare_data.py makes {', '.join(TABLES)}")
    table: dict[str, str] = {}
    for number, line in enumerate(decode_lines(path.read_bytes(), str(path)), start=1):
        key, value = [*line.strip().split(maxsplit=1), "", ""][:2]
        if key in table:
            raise InputError(f"{path}, line {number}: {key} is listed twice; give every utterance its own name")
        if key:
            table[key] = value
    if not table:
        raise InputError(f"{path} is empty; it needs one line for each utterance")
    return table


def write_table(table: Mapping[str, str], path: Path) -> None:
    """Write a file that `read_table` reads."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{key} {value}\n" for key, value in table.items()), encoding="utf-8")


def write_tables(
    wavs: Mapping[str, str], texts: Mapping[str, str], speakers: Mapping[str, str], folder: Path
) -> int:
    """Write the tables of a folder from recording, text and speaker by utterance. Return the number of speakers."""
    spk2utt: dict[str, list[str]] = {}
    for utt, spk in speakers.items():
        spk2utt.setdefault(spk, []).append(utt)
    utterances = {spk: " ".join(utts) for spk, utts in spk2utt.items()}
    for name, table in zip(TABLES, (wavs, texts, speakers, utterances), strict=True):
        write_table(table, folder / name)
    return len(spk2utt)


def read_numbers(path: Path) -> dict[str, Numbers]:
    """Read a file of `save_tensors({utterance or speaker: list of numbers})`. Raises InputError for any other file."""
    content = load_tensors(path, "run the stage before this one again")
    if not isinstance(content, dict) or not all(map(_is_entry, content.items())):
        raise InputError(f"{path} does not have lists of numbers by name; delete it and make it again")
    return content


def _is_entry(entry: tuple[object, object]) -> bool:
    """Return whether `entry` is a name and its numbers, which may follow a stamp."""
    name, values = entry
    if not isinstance(name, str) or not isinstance(values, list):
        return False
    numbers = values[1:] if values and isinstance(values[0], str) else values
    return {type(number) for number in numbers} <= {int, float}


def file_stamp(path: Path) -> str:
    """Return a stamp that changes when the file is moved or rewritten, and is the same for all missing files."""
    try:
        state = path.stat()
    except OSError:
        return "missing"
    return f"{state.st_mtime_ns} {state.st_size} {path}"


def report_failures(failures: Mapping[str, str], total: int, path: Path) -> None:
    """Write {utterance: reason} to `path`, even if it is empty, and print the number of failures on stderr.

    Raises InputError if all of `total` utterances failed.
    """
    write_table({utt: " ".join(reason.split()) for utt, reason in failures.items()}, path)
    if not failures:
        return
    utt, reason = next(iter(failures.items()))
    if len(failures) == total:
        raise InputError(f"none of {total} utterances can be used ({utt}: {reason}); see {path}")
    print(f"{len(failures)} of {total} utterances failed ({utt}: {reason}); see {path}", file=sys.stderr)
