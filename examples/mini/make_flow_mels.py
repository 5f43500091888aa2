#!/usr/bin/env python3
"""Write beside each recording of a corpus the mel that a flow makes of its tokens, for the vocoder to learn from.

    examples/mini/make_flow_mels.py --dir data/mini/voices/train --config data/mini/cosyvoice.yaml --flow flow.pt

A flow's mels are smoother than those of recordings. A vocoder that has never met one answers with a rough voice.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tools.kaldi_folder import Numbers

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="Kaldi-style folder with tokens and vectors")
    parser.add_argument("--config", type=Path, required=True, help="YAML of the model")
    parser.add_argument("--flow", type=Path, required=True, help="weights of the flow")
    options = parser.parse_args(argv)

    import numpy as np
    from tqdm import tqdm

    from cosyvoice.model_folder.model_yaml import load_model_yaml
    from cosyvoice.model_folder.weights import load_strict, read_state_dict
    from cosyvoice.runtime.errors import InputError
    from cosyvoice.utils.file_utils import atomic_write
    from tools.kaldi_folder import read_numbers, read_table

    flow = load_model_yaml(options.config, parts=("flow",))["flow"].eval()
    load_strict(flow, read_state_dict(options.flow), str(options.flow))
    wavs = read_table(options.dir / "wav.scp")
    tokens, vectors = (read_numbers(options.dir / f"utt2{kind}.pt") for kind in ("speech_token", "embedding"))
    known = sorted(wavs.keys() & tokens.keys() & vectors.keys())  # no encoder takes those that are too long
    if not known:
        raise InputError(f"{options.dir} has no tokens and vectors of its recordings. Run stage 2 of run.sh again")
    for utt in tqdm(known, unit="utt", disable=None):
        mel = predict_mel(flow, tokens[utt], vectors[utt])
        with atomic_write(Path(wavs[utt]).with_suffix(".mel.npy")) as temporary, temporary.open("wb") as file:
            np.save(file, mel.half().numpy())


def predict_mel(flow: "nn.Module", tokens: "Numbers", vector: "Numbers") -> "Tensor":
    """Return the mel (T, 80) of speech tokens and a speaker vector."""
    import torch

    from cosyvoice.utils.frames import MEL_BINS

    token, embedding, nothing = torch.tensor([tokens]), torch.tensor([vector]), torch.zeros(1, 0, dtype=torch.int64)
    lengths = torch.tensor([len(tokens)]), torch.tensor([0])
    mel, _ = flow.inference(
        token, lengths[0], nothing, lengths[1], torch.zeros(1, 0, MEL_BINS), lengths[1], embedding, None
    )
    return mel[0].T  # (80, T) -> (T, 80)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
