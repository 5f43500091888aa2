"""Makes a model folder in CosyVoice-300M's exact format with random weights: everything runs, and speaks noise.

    python tools/random_model.py --output pretrained_models/random --seed 1

Classes, file names and interfaces are the real ones, and so are the text vocabulary, the 4096 speech tokens
and the 80 mels. The same seed gives the same files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from cosyvoice.model_folder.folder import ModelFolder

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "libritts" / "cosyvoice" / "conf" / "cosyvoice.yaml"
# What each size changes in the 300M configuration, by the path of the key.
SIZES: dict[str, dict[str, Any]] = {
    "300m": {},
    "small": {
        "text_encoder_input_size": 32,
        "llm_input_size": 64,
        "llm_output_size": 64,
        "llm.text_encoder.output_size": 64,
        "llm.text_encoder.attention_heads": 4,
        "llm.text_encoder.linear_units": 128,
        "llm.text_encoder.num_blocks": 2,
        "llm.llm.attention_heads": 4,
        "llm.llm.linear_units": 128,
        "llm.llm.num_blocks": 2,
        "flow.input_size": 64,
        "flow.encoder.input_size": 64,
        "flow.encoder.output_size": 64,
        "flow.encoder.attention_heads": 4,
        "flow.encoder.linear_units": 128,
        "flow.encoder.num_blocks": 2,
        "flow.decoder.estimator.channels": [64, 64],
        "flow.decoder.estimator.attention_head_dim": 16,
        "flow.decoder.estimator.num_heads": 2,
        "flow.decoder.estimator.n_blocks": 1,
        "flow.decoder.estimator.num_mid_blocks": 2,
        "hift.base_channels": 64,
        "hift.f0_predictor.cond_channels": 32,
    },
}
# The end token's logit at every step, where the 4096 others lie about 0: speech ends soon after its least
# length, and does not run to the limit.
END_LOGIT = 2.5


def main(argv: Sequence[str] | None = None) -> None:
    from utils import add_seed

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    add_seed(parser)
    parser.add_argument(
        "--size",
        choices=sorted(SIZES),
        default="small",
        help="small: trains in seconds on a CPU; 300m: the real sizes, 1.8 GB (default: small)",
    )
    args = parser.parse_args(argv)
    make_random_model(args.output, args.seed, args.size)
    print(f"{args.output}: a model folder of size {args.size!r}, random weights, seed {args.seed}. It speaks noise.")


def make_random_model(folder: Path, seed: int, size: str = "small") -> Path:
    """Write the YAML, the weights of all parts and the two encoders into `folder`, and return it."""
    import numpy as np

    from cosyvoice.model_folder.folder import COSYVOICE_300M, ModelFolder
    from cosyvoice.utils.file_utils import atomic_write
    from tools.random_onnx import write_speaker_encoder, write_speech_tokenizer

    with atomic_write(folder / COSYVOICE_300M.yaml) as temporary:
        temporary.write_text(resized(CONFIG.read_text(encoding="utf-8"), SIZES[size]), encoding="utf-8")
    model = ModelFolder(folder)
    write_weights(model, seed)
    random = np.random.default_rng(seed)
    write_speech_tokenizer(model.speech_tokenizer, random)
    write_speaker_encoder(model.speaker_encoder, random)
    return folder


def resized(text: str, sizes: dict[str, Any]) -> str:
    """The configuration with other values for the keys in `sizes`, e.g. `llm.llm.num_blocks`; all else stays."""
    lines, path, left = [], [], dict(sizes)
    for line in text.splitlines():
        content = line.lstrip()
        name, colon, _ = content.partition(":")
        if colon and not content.startswith("#"):
            indent = len(line) - len(content)
            path[indent // 4 :] = [name]
            key = ".".join(path)
            if key in left:
                line = f"{' ' * indent}{name}: {left.pop(key)}"
        lines.append(line)
    assert not left, f"the configuration has no {', '.join(left)}"
    return "\n".join(lines) + "\n"


def write_weights(model: "ModelFolder", seed: int) -> None:
    """Write fresh weights of llm, flow and hift. The caller's random state stays as it was."""
    import torch

    from cosyvoice.utils.file_utils import save_tensors

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in ("llm", "flow", "hift"):
            module = model.parts([part])[part]
            if part == "llm":
                set_end_logit(module.llm_decoder)
            save_tensors(module.state_dict(), model.weights(part))


def set_end_logit(decoder: "nn.Linear") -> None:
    decoder.weight.data[-1] = 0
    decoder.bias.data[-1] = END_LOGIT


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.utils.command import run

    run(main)
