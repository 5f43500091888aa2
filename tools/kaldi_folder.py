"""Kaldi-style corpus folders: tables of one utterance a line, vectors and tokens by utterance, what failed."""

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
    """{first word of a line: the rest of it}, in the file's order; empty lines do not count.

    Raises InputError for a missing or empty file, one that is not UTF-8, and two lines with the same first word.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; local/prepare_data.py makes {', '.join(TABLES)}")
    table: dict[str, str] = {}
    for number, line in enumerate(decode_lines(path.read_bytes(), str(path)), start=1):
        key, value = [*line.strip().split(maxsplit=1), "", ""][:2]
        if key in table:
            raise InputError(f"{path}, line {number}: {key} is there twice; give every utterance its own name")
        if key:
            table[key] = value
    if not table:
        raise InputError(f"{path} is empty; it needs one line for each utterance")
    return table


def write_table(table: Mapping[str, str], path: Path) -> None:
    """The file that `read_table` reads."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{key} {value}\n" for key, value in table.items()), encoding="utf-8")


def write_tables(
    wavs: Mapping[str, str], texts: Mapping[str, str], speakers: Mapping[str, str], folder: Path
) -> int:
    """The four tables of a folder, of recording, text and speaker by utterance. Returns how many speakers there are."""
    spk2utt: dict[str, list[str]] = {}
    for utt, spk in speakers.items():
        spk2utt.setdefault(spk, []).append(utt)
    utterances = {spk: " ".join(utts) for spk, utts in spk2utt.items()}
    for name, table in zip(TABLES, (wavs, texts, speakers, utterances), strict=True):
        write_table(table, folder / name)
    return len(spk2utt)


def read_numbers(path: Path) -> dict[str, Numbers]:
    """A file of `save_tensors({utterance or speaker: list of numbers})`. Raises InputError where it is none."""
    content = load_tensors(path, "run the stage before this one again")
    if not isinstance(content, dict) or not all(map(_is_entry, content.items())):
        raise InputError(f"{path} does not hold a list of numbers by name; delete it and make it anew")
    return content


def _is_entry(entry: tuple[object, object]) -> bool:
    """Return whether it is a name and its numbers, which may follow a stamp."""
    name, values = entry
    if not isinstance(name, str) or not isinstance(values, list):
        return False
    numbers = values[1:] if values and isinstance(values[0], str) else values
    return {type(number) for number in numbers} <= {int, float}


def file_stamp(path: Path) -> str:
    """Changes when the file is moved or written anew; the same for every file that does not exist."""
    try:
        state = path.stat()
    except OSError:
        return "missing"
    return f"{state.st_mtime_ns} {state.st_size} {path}"


def report_failures(failures: Mapping[str, str], total: int, path: Path) -> None:
    """Write {utterance: reason} to `path`, empty where there is none, and say on stderr how many there are.

    Raises InputError where all of `total` utterances failed.
    """
    write_table({utt: " ".join(reason.split()) for utt, reason in failures.items()}, path)
    if not failures:
        return
    utt, reason = next(iter(failures.items()))
    if len(failures) == total:
        raise InputError(f"none of {total} utterances can be used ({utt}: {reason}); see {path}")
    print(f"{len(failures)} of {total} utterances failed ({utt}: {reason}); see {path}", file=sys.stderr)
