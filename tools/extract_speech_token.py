#!/usr/bin/env python3
"""Stage 2 of the recipe: the speech tokens, 50 or 25 a second, of every utterance of a Kaldi-style folder.

    tools/extract_speech_token.py --dir data/train --onnx_path speech_tokenizer_v1.onnx

Reads wav.scp. Writes utt2speech_token.pt, {utterance: list of token ids}, and extract_speech_token.failed, one
line for each utterance without tokens, such as those of more than 30 s. A second run does only what is new.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    from tools.engines import add_engine, opened

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="folder with wav.scp")
    parser.add_argument("--onnx_path", type=Path, required=True, help="speech_tokenizer_v1.onnx, or _v2.onnx")
    parser.add_argument("--num_thread", type=int, default=8, help="utterances at a time in pool (default: %(default)s)")
    add_engine(parser)
    options = parser.parse_args(argv)

    from cosyvoice.runtime.command import check_least
    from cosyvoice.speech_encoders.encoders import SpeechTokenizer
    from tools.extraction import Extraction

    check_least("--num_thread", options.num_thread)
    encoder = SpeechTokenizer(options.onnx_path)
    with opened(options.engine, options.num_thread) as spread:
        Extraction(options.dir, "utt2speech_token", encoder, spread).run("extract_speech_token.failed")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
