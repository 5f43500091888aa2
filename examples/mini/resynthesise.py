#!/usr/bin/env python3
"""Pass recordings through the vocoder alone, or through tokens, flow and vocoder, to hear what these lose.

    examples/mini/resynthesise.py --src_dir data/mini/base_voices/slt --des_dir output/slt_mel --through mel
    python tools/evaluate.py --wavs output/slt_mel --reference data/mini/base_voices/slt

The language model is not used, so the results show the best quality that speech from text can reach.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cosyvoice.cli.base import FolderVoice

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    from config import find_model_dir
    from cosyvoice.runtime.command import seed_all
    from utils import add_folders, add_seed, limit_threads

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src_dir", type=Path, required=True, help="recordings NNN.wav and their texts NNN.txt")
    parser.add_argument("--des_dir", type=Path, required=True, help="folder to write: the same names")
    parser.add_argument("--through", choices=("mel", "tokens"), required=True, help="the part of a recording used")
    add_folders(parser, "model")
    add_seed(parser)
    options = parser.parse_args(argv)

    from tqdm import tqdm

    from clips.recordings import find_recordings
    from cosyvoice.cli.cosyvoice import AutoModel
    from cosyvoice.utils.file_utils import atomic_write
    from cosyvoice.utils.wav_files import write_wav

    folder = find_model_dir(options.model_dir)
    limit_threads(folder)
    cosyvoice = AutoModel(folder)
    recordings = [found for found in find_recordings(options.src_dir) if found.audio and found.text]
    pass_through = from_mel if options.through == "mel" else from_tokens
    for recording in tqdm(recordings, unit="clip", disable=None):
        seed_all(options.seed)
        speech = pass_through(cosyvoice, recording.audio)
        write_wav(options.des_dir / f"{recording.utt}.wav", speech, cosyvoice.sample_rate, f"from {options.through}")
        with atomic_write(options.des_dir / f"{recording.utt}.txt") as temporary:
            temporary.write_bytes(recording.text_bytes())


def from_mel(cosyvoice: "FolderVoice", audio: Path) -> "Tensor":
    """Return the vocoder's speech (1, samples) for the recording's own mel."""
    from cosyvoice.utils.audio import load_wav

    mel = cosyvoice.frontend.feat_extractor(load_wav(audio, cosyvoice.sample_rate))  # (1, 80, T)
    speech, _ = cosyvoice.model.hift.inference(mel)
    return speech


def from_tokens(cosyvoice: "FolderVoice", audio: Path) -> "Tensor":
    """Return the speech (1, samples) of flow and vocoder for the recording's own tokens and speaker vector."""
    from cosyvoice.utils.audio import PROMPT_RATE_HZ, load_wav

    wav_16k = load_wav(audio, PROMPT_RATE_HZ)
    tokens, embedding = cosyvoice.frontend.speech_tokenizer(wav_16k), cosyvoice.frontend.speaker_encoder(wav_16k)
    (piece,) = cosyvoice.model.tts(source_speech_token=tokens, flow_embedding=embedding)
    return piece["tts_speech"]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
