#!/usr/bin/env python3
"""Make a folder of recordings and texts for each speaker of a Kaldi-style folder, for tools/evaluate.py.

    examples/mini/voice_folders.py --src_dir data/mini/voices/dev --des_dir data/mini/base_voices

Each text lies beside its recording.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src_dir", type=Path, required=True, help="folder with wav.scp, text and utt2spk")
    parser.add_argument("--des_dir", type=Path, required=True, help="gets SPEAKER/UTT.wav and SPEAKER/UTT.txt")
    options = parser.parse_args(argv)

    from cosyvoice.runtime.errors import InputError
    from cosyvoice.utils.file_utils import atomic_write, copy_file
    from tools.kaldi_folder import read_table

    wavs, texts, speakers = (read_table(options.src_dir / name) for name in ("wav.scp", "text", "utt2spk"))
    if unknown := wavs.keys() - (texts.keys() & speakers.keys()):
        raise InputError(f"{options.src_dir}: {min(unknown)} is not in text or utt2spk. Run make_corpus.py again")
    for utt, wav in wavs.items():
        target = options.des_dir / speakers[utt] / f"{utt}.wav"
        copy_file(Path(wav), target)
        with atomic_write(target.with_suffix(".txt")) as temporary:
            temporary.write_text(texts[utt] + "\n", encoding="utf-8")
    print(f"{options.des_dir}: {len(wavs)} recordings of {', '.join(sorted(set(speakers.values())))}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
