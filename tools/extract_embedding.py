#!/usr/bin/env python3
"""Stage 1 of the recipe: a speaker vector for every utterance of a Kaldi-style folder, and their mean by speaker.

    tools/extract_embedding.py --dir data/train --onnx_path campplus.onnx

Reads wav.scp and utt2spk. Writes utt2embedding.pt and spk2embedding.pt, {name: list of 192 floats}, and
extract_embedding.failed, one line for each utterance without a vector. A second run does only what is new.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    from tools.engines import add_engine, opened

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="folder with wav.scp and utt2spk")
    parser.add_argument("--onnx_path", type=Path, required=True, help="campplus.onnx")
    parser.add_argument("--num_thread", type=int, default=8, help="utterances at a time in pool (default: %(default)s)")
    add_engine(parser)
    options = parser.parse_args(argv)

    from cosyvoice.runtime.command import check_least
    from cosyvoice.speech_encoders.encoders import SpeakerEncoder
    from cosyvoice.utils.file_utils import save_tensors
    from tools.extraction import Extraction
    from tools.kaldi_folder import read_table

    check_least("--num_thread", options.num_thread)
    utt2spk = read_table(options.dir / "utt2spk")
    encoder = SpeakerEncoder(options.onnx_path, device="cpu")  # CUDA would tune itself anew for every length
    with opened(options.engine, options.num_thread) as spread:
        vectors = Extraction(options.dir, "utt2embedding", encoder, spread).run("extract_embedding.failed")
    save_tensors(speaker_means(vectors, utt2spk), options.dir / "spk2embedding.pt")


def speaker_means(vectors: dict[str, list[float]], utt2spk: dict[str, str]) -> dict[str, list[float]]:
    """{speaker: mean of the vectors of all their utterances}, not normalised."""
    import numpy as np

    of_speaker: dict[str, list[list[float]]] = {}
    for utt, vector in vectors.items():
        if utt in utt2spk:
            of_speaker.setdefault(utt2spk[utt], []).append(vector)
    return {spk: np.mean(several, axis=0).tolist() for spk, several in of_speaker.items()}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
