#!/usr/bin/env python3
"""Stage 0 of the recipe: Kaldi-style tables of a folder of recordings and their texts.

    python local/prepare_data.py --src_dir corpus/train --des_dir data/train

Takes SPEAKER/CHAPTER/NAME.wav, as in LibriTTS, and NAME.wav, each with NAME.normalized.txt beside it. The speaker
is what stands before the first underscore of NAME (1_12 belongs to 1), or, where there is none, the folder below
which everything lies; --speaker says who speaks in all of them. Writes wav.scp, text, utt2spk, spk2utt, and
prepare_data.failed, which tells what was left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
LAYOUTS = ("*/*/*.wav", "*.wav")
TEXT_SUFFIX = ".normalized.txt"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src_dir", type=Path, required=True, help="folder of recordings and texts")
    parser.add_argument("--des_dir", type=Path, required=True, help="folder to write the tables to")
    parser.add_argument("--speaker", help="name of the only speaker (default: from the names of the recordings)")
    options = parser.parse_args(argv)

    from tools.kaldi_folder import report_failures, write_tables

    recordings = find_recordings(options.src_dir.absolute())
    texts, failures = read_texts(recordings)
    failures |= texts_alone(options.src_dir.absolute(), recordings)
    report_failures(failures, len(texts) + len(failures), options.des_dir / "prepare_data.failed")
    wavs = {utt: str(recordings[utt]) for utt in texts}
    speakers = {utt: options.speaker or speaker_of(utt, options.src_dir.absolute().name) for utt in texts}
    count = write_tables(wavs, texts, speakers, options.des_dir)
    print(f"{options.des_dir}: {len(texts)} utterances of {count} speakers")


def find_recordings(folder: Path) -> dict[str, Path]:
    """{utterance: wav file}, by name. Raises InputError where there is none, or a name cannot be used."""
    from cosyvoice.runtime.errors import InputError

    recordings: dict[str, Path] = {}
    for wav in (path for layout in LAYOUTS for path in folder.glob(layout) if not path.name.startswith(".")):
        if wav.stem in recordings:
            raise InputError(f"{recordings[wav.stem]} and {wav} have the same name; rename one and its text")
        if wav.stem.split() != [wav.stem] or not str(wav).isprintable():
            raise InputError(f"{str(wav)!r} has a blank or an unreadable letter in its name; rename it and its text")
        recordings[wav.stem] = wav
    if not recordings:
        raise InputError(f"{folder} holds no recording ({' or '.join(LAYOUTS)})")
    return dict(sorted(recordings.items()))


def read_texts(recordings: dict[str, Path]) -> tuple[dict[str, str], dict[str, str]]:
    """{utterance: its text}, and {utterance: why it has none}."""
    from cosyvoice.runtime.errors import InputError
    from cosyvoice.utils.frontend_utils import has_words
    from utils import decode_text

    texts, failures = {}, {}
    for utt, wav in recordings.items():
        file = wav.with_name(f"{utt}{TEXT_SUFFIX}")
        try:
            texts[utt] = decode_text(file.read_bytes())
        except InputError as error:
            failures[utt] = str(error)
        except OSError as error:
            failures[utt] = f"{file} cannot be read: {error.strerror}"
        if utt in texts and not has_words(texts[utt]):
            failures[utt] = f"{file} has nothing to speak: {texts[utt]!r}" if texts[utt] else f"{file} is empty"
            del texts[utt]
    return texts, failures


def texts_alone(folder: Path, recordings: dict[str, Path]) -> dict[str, str]:
    """{utterance: what it lacks} of all texts without a recording."""
    layouts = (layout.replace(".wav", TEXT_SUFFIX) for layout in LAYOUTS)
    found = sorted(path for layout in layouts for path in folder.glob(layout) if not path.name.startswith("."))
    wavs = ((path, path.with_name(path.name.removesuffix(TEXT_SUFFIX) + ".wav")) for path in found)
    return {"_".join(wav.stem.split()): f"{path} has no recording {wav.name}" for path, wav in wavs if not wav.exists()}


def speaker_of(utt: str, folder: str) -> str:
    speaker, underscore, _ = utt.partition("_")
    return speaker if underscore and speaker else "_".join(folder.split())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
