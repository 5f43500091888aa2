#!/usr/bin/env python3
"""Make a Kaldi-style corpus of the telephone prompts of Debian's Asterisk, which three people speak.

    examples/mini/make_prompts.py --des_dir data/mini/prompts

They speak French, Italian and Russian. There are no transcripts, so each text is the name of the prompt: these folders
are for training that needs no texts. The English and Spanish prompts are left out. They are for judging.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOUNDS = Path("/usr/share/asterisk/sounds")
SPEAKERS = {"june": "fr_CA_f_June", "carlo": "it_IT_m_Carlo", "maxim": "ru_RU_f_IvrvoiceRU"}
PACKAGES = "sudo apt-get install ffmpeg " + " ".join(f"asterisk-core-sounds-{code}-g722" for code in ("fr", "it", "ru"))
MIN_SECONDS = 1.0
DEV_SHARE = 25  # one in so many is held out
NO_SPEECH = ("beep", "tone", "silence", "music", "monkeys", "tt-")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--des_dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--num_processes", type=int, default=2, help="decoders at a time (default: %(default)s)")
    options = parser.parse_args(argv)

    from cosyvoice.utils.command import check_least
    from cosyvoice.utils.errors import InputError
    from examples.mini.voices import check_program
    from tools.kaldi_folder import write_tables
    from utils import check_writable, in_parallel

    check_least("--num_processes", options.num_processes)
    check_program("ffmpeg", PACKAGES)
    wavs = options.des_dir.absolute() / "wav"
    check_writable(wavs)
    prompts = {}  # utterance: its speaker and source
    for speaker, folder in SPEAKERS.items():
        sources = sorted((SOUNDS / folder).rglob("*.g722"))
        if not sources:
            raise InputError(f"{SOUNDS / folder} has no recording. Run: {PACKAGES}")
        for source in sources:
            if not any(word in source.stem for word in NO_SPEECH):
                name = "-".join(source.relative_to(SOUNDS / folder).with_suffix("").parts)
                prompts[f"{speaker}_{name}"] = speaker, source
    utterances = sorted(prompts)
    decoded = in_parallel(lambda utt: decode(prompts[utt][1], wavs / f"{utt}.wav"), utterances, options.num_processes)
    good = [utt for utt, seconds in zip(utterances, decoded, strict=True) if seconds >= MIN_SECONDS]
    train = [utt for number, utt in enumerate(good) if number % DEV_SHARE]
    for split, part in {"dev": good[::DEV_SHARE], "train": train}.items():
        paths = {utt: str(wavs / f"{utt}.wav") for utt in part}
        names = {utt: utt.partition("_")[2].replace("-", " ") for utt in part}
        count = write_tables(paths, names, {utt: prompts[utt][0] for utt in part}, options.des_dir / split)
        print(f"{options.des_dir / split}: {len(part)} recordings of {count} speakers")


def decode(source: Path, wav: Path) -> float:
    """Write a prompt as 16 kHz wav, unless it is there, and return its duration in seconds."""
    import soundfile

    from cosyvoice.utils.file_utils import atomic_write

    if not wav.is_file():
        with atomic_write(wav) as temporary:
            command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-y", "-f", "g722", "-i", str(source)]
            subprocess.run([*command, "-bitexact", "-f", "wav", str(temporary)], check=True)
    return soundfile.info(wav).duration


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.utils.command import run

    run(main)
