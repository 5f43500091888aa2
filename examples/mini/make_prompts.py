#!/usr/bin/env python3
"""Make a Kaldi-style corpus of the telephone prompts of Debian's Asterisk, spoken by three people.

    examples/mini/make_prompts.py --des_dir data/mini/prompts
    examples/mini/make_prompts.py --des_dir data/mini/judging --judging

They speak French, Italian and Russian. There are no transcripts, so each text is the name of the prompt, and the
folders serve training that needs no texts. The English prompts, which have transcripts, are never trained on;
--judging writes 24 of them for tools/evaluate.py.
"""

import argparse
import gzip
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOUNDS = Path("/usr/share/asterisk/sounds")
SPEAKERS = {"june": "fr_CA_f_June", "carlo": "it_IT_m_Carlo", "maxim": "ru_RU_f_IvrvoiceRU"}
PACKAGES = "sudo apt-get install ffmpeg " + " ".join(f"asterisk-core-sounds-{code}-g722" for code in ("fr", "it", "ru"))
JUDGING_FOLDER = "en_US_f_Allison"
JUDGING_TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
JUDGING_PACKAGES = "sudo apt-get install ffmpeg asterisk-core-sounds-en asterisk-core-sounds-en-g722"
JUDGING_COUNT = 24
JUDGING_WORDS = range(8, 17)  # shorter prompts say little about a voice; longer ones list keys to press
MIN_SECONDS = 1.0
DEV_SHARE = 25  # one in this many is held out
NO_SPEECH = ("beep", "tone", "silence", "music", "monkeys", "tt-")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--des_dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--num_processes", type=int, default=2, help="decoders at a time (default: %(default)s)")
    parser.add_argument(
        "--judging", action="store_true", help="write NAME.wav and NAME.txt of 24 English prompts instead"
    )
    options = parser.parse_args(argv)

    from cosyvoice.runtime.command import check_least
    from examples.mini.voices import check_program
    from utils import check_writable

    check_least("--num_processes", options.num_processes)
    check_program("ffmpeg", JUDGING_PACKAGES if options.judging else PACKAGES)
    check_writable(options.des_dir)
    if options.judging:
        make_judging_clips(options.des_dir)
    else:
        make_corpus(options.des_dir.absolute(), options.num_processes)


def make_corpus(folder: Path, num_processes: int) -> None:
    """Write the decoded prompts of SPEAKERS and their tables, split into train and dev."""
    from cosyvoice.runtime.errors import InputError
    from tools.kaldi_folder import write_tables
    from utils import in_parallel

    wavs = folder / "wav"
    prompts = {}  # utterance: its speaker and source
    for speaker, sounds in SPEAKERS.items():
        sources = sorted((SOUNDS / sounds).rglob("*.g722"))
        if not sources:
            raise InputError(f"{SOUNDS / sounds} has no recording. Run: {PACKAGES}")
        for source in sources:
            if not any(word in source.stem for word in NO_SPEECH):
                name = "-".join(source.relative_to(SOUNDS / sounds).with_suffix("").parts)
                prompts[f"{speaker}_{name}"] = speaker, source
    utterances = sorted(prompts)
    decoded = in_parallel(lambda utt: decode(prompts[utt][1], wavs / f"{utt}.wav"), utterances, num_processes)
    good = [utt for utt, seconds in zip(utterances, decoded, strict=True) if seconds >= MIN_SECONDS]
    train = [utt for number, utt in enumerate(good) if number % DEV_SHARE]
    for split, part in {"dev": good[::DEV_SHARE], "train": train}.items():
        paths = {utt: str(wavs / f"{utt}.wav") for utt in part}
        names = {utt: utt.partition("_")[2].replace("-", " ") for utt in part}
        count = write_tables(paths, names, {utt: prompts[utt][0] for utt in part}, folder / split)
        print(f"{folder / split}: {len(part)} recordings of {count} speakers")


def make_judging_clips(folder: Path) -> None:
    """Write NAME.wav and NAME.txt of JUDGING_COUNT prompts, spread evenly over those that are sentences."""
    from cosyvoice.runtime.errors import InputError
    from cosyvoice.utils.file_utils import atomic_write

    sounds = SOUNDS / JUDGING_FOLDER
    if not (JUDGING_TEXTS.is_file() and sounds.is_dir()):
        raise InputError(f"{JUDGING_TEXTS} or {sounds} does not exist. Run: {JUDGING_PACKAGES}")
    names: dict[str, str] = {}  # by text, since several prompts say the same
    for line in gzip.decompress(JUDGING_TEXTS.read_bytes()).decode().splitlines():
        name, _, text = line.partition(": ")
        is_sentence = re.fullmatch(r"[A-Z][A-Za-z',. -]+\.", text) and len(text.split()) in JUDGING_WORDS
        if is_sentence and (sounds / f"{name}.g722").is_file():
            names.setdefault(" ".join(text.split()), name)
    texts = sorted(names, key=names.__getitem__)
    count = min(JUDGING_COUNT, len(texts))
    for text in (texts[number * len(texts) // count] for number in range(count)):
        decode(sounds / f"{names[text]}.g722", folder / f"{names[text]}.wav")
        with atomic_write(folder / f"{names[text]}.txt") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{folder}: {count} recordings")


def decode(source: Path, wav: Path) -> float:
    """Write a prompt as a 16 kHz wav, unless it exists, and return its duration in seconds."""
    import soundfile

    from cosyvoice.utils.file_utils import atomic_write

    if not wav.is_file():
        with atomic_write(wav) as temporary:
            command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-y", "-f", "g722", "-i", str(source)]
            subprocess.run([*command, "-bitexact", "-f", "wav", str(temporary)], check=True)
    return soundfile.info(wav).duration


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
