"""The texts that are spoken, and the file each is spoken into."""

import sys
from dataclasses import dataclass
from pathlib import Path

from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.frontend_utils import has_words
from cosyvoice.utils.text_files import decode_lines


@dataclass
class Line:
    """One text and the file it is spoken into."""

    number: int  # line of the text file, from 1
    text: str
    output: Path


def read_lines(text: str | None, text_file: Path | None, output: Path) -> list[Line]:
    """What to speak and where to; lines of a file without words are left out, and said to be.

    Raises InputError where nothing is left, or the wav cannot be written there.
    """
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; give a file, {output / 'result.wav'} for one")
    if output.suffix.lower() != ".wav":
        raise InputError(f"--output {output} is not a .wav file; only wav is written")
    if text_file is None:
        if not has_words(text):
            raise InputError(f"--text has nothing to speak: {text!r}; give it words or numbers")
        return [Line(1, text, output)]
    lines = []
    for number, line in enumerate(read_text(text_file), start=1):
        if has_words(line):
            lines.append(Line(number, line, output.with_stem(f"{output.stem}_{number:03d}")))
        elif line.strip():
            print(f"left out: line {number} of {text_file} has nothing to speak: {line.strip()!r}", file=sys.stderr)
    if not lines:
        raise InputError(f"{text_file} has nothing to speak; write one sentence or paragraph a line")
    return lines


def read_text(path: Path) -> list[str]:
    """Return the lines of a file. Raises InputError if it cannot be read or is not UTF-8 text."""
    try:
        return decode_lines(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"the text file {path} cannot be read: {error.strerror}") from None
