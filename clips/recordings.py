"""The recordings of a folder and their texts, which are files beside them or a list like LJSpeech's or GPT-SoVITS's."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import FFMPEG_SUFFIXES
from cosyvoice.utils.text_files import decode_lines
from utils import is_unicode

LIBSNDFILE_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".oga", ".aiff", ".aif", ".caf", ".w64", ".au")
AUDIO_SUFFIXES = (*LIBSNDFILE_SUFFIXES, *FFMPEG_SUFFIXES)  # of two files with the same name, the first suffix wins
AUDIO_KINDS = "wav, flac, mp3, ogg, opus, aiff, m4a, aac, webm or wma"
TEXT_SUFFIXES = (".txt", ".normalized.txt")  # if both exist, the second is used
LJSPEECH_LIST = "metadata.csv"  # lines of name|text or name|text|normalised text
GPT_SOVITS_SUFFIX = ".list"  # lines of path|speaker|language|text


@dataclass
class Recording:
    """An audio file and its text, which is a file or a list's entry. One of the two may be missing."""

    utt: str
    audio: Path | None
    text: Path | str | None
    similar: Path | None = None  # a text file without a recording whose name resembles this one's

    def text_bytes(self) -> bytes:
        return self.text.encode() if isinstance(self.text, str) else self.text.read_bytes()


def find_recordings(folder: Path, speaker: str | None = None) -> list[Recording]:
    """Return the recordings and texts of a folder, paired and sorted by name.

    If no recording has a text file, the texts come from a list in the folder, whose recordings may lie in subfolders.
    From a list of several speakers only the recordings of `speaker` are taken. Names are compared in Unicode's composed
    form, since some programs write "é" as two characters. Raises InputError if there is no recording, if none has a
    text, or if a file name is not UTF-8.
    """
    files = _visible_files(folder)
    audio, texts = _audio_by_name(files), _texts_by_name(files)
    if not audio.keys() & texts.keys() and (found := _find_list(files)):
        nearby = files + [
            file for child in sorted(folder.iterdir()) if child.is_dir() for file in _visible_files(child)
        ]
        audio, texts = _audio_by_name(nearby), _read_list(found, speaker)
    if not audio:
        raise InputError(f"{folder} has no recording ({AUDIO_KINDS}). {_where_to_look(folder)}")
    unpaired = {_simplified(utt): text for utt, text in texts.items() if utt not in audio and isinstance(text, Path)}
    recordings = [
        Recording(utt, audio.get(utt), texts.get(utt), None if utt in texts else unpaired.get(_simplified(utt)))
        for utt in sorted(audio.keys() | texts.keys())
    ]
    if not audio.keys() & texts.keys():
        renamed = (f"Rename {found.similar.name} to {found.utt}.txt" for found in recordings if found.similar)
        raise InputError(f"no recording in {folder} has a text. {next(renamed, 'Put 001.txt beside 001.wav')}")
    return recordings


def _visible_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    for path in files:
        if not is_unicode(str(path)):
            raise InputError(f"the file name {path.name!r} in {folder} is not UTF-8. Rename it, for example to 001.wav")
    return files


def _audio_by_name(files: Sequence[Path]) -> dict[str, Path]:
    audio: dict[str, Path] = {}
    for path in (path for suffix in AUDIO_SUFFIXES for path in files if path.suffix.lower() == suffix):
        utt = _composed(path.stem)
        audio[_composed(path.name) if utt in audio else utt] = path  # the second file of a name gets no text
    return audio


def _texts_by_name(files: Sequence[Path]) -> dict[str, Path]:
    texts: dict[str, Path] = {}
    for suffix in TEXT_SUFFIXES:
        texts |= {_composed(path.name[: -len(suffix)]): path for path in files if path.name.lower().endswith(suffix)}
    return {utt: path for utt, path in texts.items() if not utt.lower().endswith(".normalized")}


def _find_list(files: Sequence[Path]) -> Path | None:
    lists = [path for path in files if path.name == LJSPEECH_LIST or path.suffix == GPT_SOVITS_SUFFIX]
    if len(lists) > 1:
        raise InputError(f"{lists[0]} and {lists[1].name} are both lists of recordings. Move one of them away")
    return lists[0] if lists else None


def _read_list(path: Path, speaker: str | None) -> dict[str, str]:
    """Return {name of a recording: its text}. Raises InputError for a line of another form."""
    texts: dict[str, str] = {}
    speakers: dict[str, str] = {}
    for number, columns in _split_lines(path):
        if path.suffix == GPT_SOVITS_SUFFIX and len(columns) == 4:
            name, spoken_by, _, text = columns
        elif path.suffix != GPT_SOVITS_SUFFIX and len(columns) in (2, 3):
            name, spoken_by, text = columns[0], "", columns[-1]
        else:
            form = "path|speaker|language|text" if path.suffix == GPT_SOVITS_SUFFIX else "name|text"
            raise InputError(f"{path}, line {number}, is not of the form {form}. Correct the line")
        file_name = PureWindowsPath(name).name  # of a Windows or POSIX path
        utt = _composed(Path(file_name).stem if file_name.lower().endswith(AUDIO_SUFFIXES) else file_name)
        if utt in texts:
            raise InputError(f"{path}, line {number}: {utt} is listed twice. Delete one of the lines")
        texts[utt], speakers[utt] = text, spoken_by
    names = sorted(set(speakers.values()))
    if len(names) > 1:
        if speaker not in names:
            raise InputError(f"{path} lists the speakers {', '.join(names)}. Choose one with --speaker")
        texts = {utt: text for utt, text in texts.items() if speakers[utt] == speaker}
    return texts


def _split_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(decode_lines(path.read_bytes(), str(path)), start=1):
        if line.strip():
            yield number, [column.strip() for column in line.split("|")]


def _where_to_look(folder: Path) -> str:
    for child in sorted(folder.iterdir()):
        if child.is_dir() and any(path.suffix.lower() in AUDIO_SUFFIXES for path in child.iterdir()):
            return f"Its subfolder {child.name} has some: give {child}"
    return "Put 001.wav and 001.txt there"


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _simplified(name: str) -> str:
    """Return a name in lower case, without leading zeros of numbers and without the audio file's suffix."""
    name = name.lower()
    for suffix in AUDIO_SUFFIXES:
        name = name.removesuffix(suffix)
    return re.sub(r"0+(?=\d)", "", name)
