#!/usr/bin/env python3
"""Stage 4: the speaker's vector in a spk2info.pt, beside the voices of the model.

    python local/write_speaker.py --dir data/train --model_dir CosyVoice2-0.5B --output exp/anna/spk2info.pt

Reads spk2embedding.pt, the mean of the clips' vectors. Training and speaking use this vector.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="what the stages before wrote of the training set")
    parser.add_argument("--model_dir", type=Path, required=True, help="model folder")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    options = parser.parse_args(argv)

    import torch
    import torch.nn.functional as F

    from cosyvoice.cli.frontend import read_spk2info
    from cosyvoice.model_folder.folder import ModelFolder
    from cosyvoice.utils.file_utils import save_tensors
    from tools.kaldi_folder import read_numbers

    vectors = read_numbers(options.dir / "spk2embedding.pt")
    voices = {name: {"embedding": F.normalize(torch.tensor([vector]))} for name, vector in vectors.items()}  # (1, 192)
    save_tensors(read_spk2info(ModelFolder(options.model_dir).stored_speakers) | voices, options.output)
    print(f"{options.output}: {', '.join(voices)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
