"""Makes a model folder in a public model's format with random weights, which speaks noise.

    python tools/random_model.py --output pretrained_models/random --seed 1

Classes, file names and interfaces are the public model's, and so are the speech tokens and the 80 mels. CosyVoice-300M
keeps its text vocabulary; CosyVoice2 gets a small byte-pair tokenizer of our own. Equal seeds give equal files.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from cosyvoice.model_folder.folder import ModelFolder

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "libritts"


@dataclass(frozen=True)
class Size:
    """A size of a generation's models."""

    config: Path  # in the sizes of the public model
    speech_tokens: int
    changes: Mapping[str, Any] = field(default_factory=dict)  # to the configuration, by the path of the key
    text_model: Mapping[str, Any] = field(default_factory=dict)  # sizes of its Qwen2 model, if it has one


COSYVOICE_300M, COSYVOICE2 = (CONFIGS / name / "conf" / f"{name}.yaml" for name in ("cosyvoice", "cosyvoice2"))
SMALL_FLOW = {
    "flow.decoder.estimator.attention_head_dim": 16,
    "flow.decoder.estimator.num_heads": 2,
    "flow.decoder.estimator.n_blocks": 1,
    "flow.decoder.estimator.num_mid_blocks": 2,
    "hift.f0_predictor.cond_channels": 32,
}
QWEN2 = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "hidden_act": "silu", "tie_word_embeddings": True}
SIZES = {
    "300m": Size(COSYVOICE_300M, 4096),
    "small": Size(
        COSYVOICE_300M,
        4096,
        {
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
            "hift.base_channels": 64,
            **SMALL_FLOW,
        },
    ),
    "cosyvoice2-0.5b": Size(
        COSYVOICE2,
        6561,
        text_model=QWEN2
        | {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    ),
    "small2": Size(
        COSYVOICE2,
        6561,
        {
            "llm_input_size": 64,
            "llm_output_size": 64,
            "flow.input_size": 48,
            "flow.encoder.input_size": 48,
            "flow.encoder.output_size": 48,
            "flow.encoder.attention_heads": 4,
            "flow.encoder.linear_units": 96,
            "flow.encoder.num_blocks": 2,
            "flow.decoder.estimator.channels": [48],
            "hift.base_channels": 48,
            **SMALL_FLOW,
        },
        QWEN2
        | {
            "vocab_size": 600,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
}
# The end token's logit at every step, while those of speech are about 0, so that speech ends soon after its minimum
# length.
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
        help="for CosyVoice-300M: small trains in seconds on a CPU, 300m has the real sizes, 1.8 GB; for CosyVoice2: "
        "small2, and cosyvoice2-0.5b, 2.6 GB (default: small)",
    )
    args = parser.parse_args(argv)
    make_random_model(args.output, args.seed, args.size)
    print(f"{args.output}: a model folder of size {args.size!r}, random weights, seed {args.seed}. It speaks noise.")


def make_random_model(folder: Path, seed: int, size: str = "small") -> Path:
    """Write the YAML, the weights of all parts, the two encoders and the text model's files, and return the folder."""
    import numpy as np

    from cosyvoice.model_folder.folder import ModelFolder
    from cosyvoice.utils.file_utils import atomic_write
    from tools.blank_en import write_blank_en
    from tools.random_onnx import write_speaker_encoder, write_speech_tokenizer

    chosen = SIZES[size]
    with atomic_write(folder / chosen.config.name) as temporary:
        temporary.write_text(resized(chosen.config.read_text(encoding="utf-8"), chosen.changes), encoding="utf-8")
    model = ModelFolder(folder)
    if model.text_model:
        write_blank_en(model.text_model, dict(chosen.text_model))
    write_weights(model, seed)
    random = np.random.default_rng(seed)
    write_speech_tokenizer(model.speech_tokenizer, random, model.rates.token_rate, chosen.speech_tokens)
    write_speaker_encoder(model.speaker_encoder, random)
    return folder


def resized(text: str, sizes: Mapping[str, Any]) -> str:
    """Return the configuration with the values of `sizes`, whose keys are paths such as `llm.llm.num_blocks`."""
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
    """Write random weights of llm, flow and hift. The caller's random state does not change."""
    import torch

    from cosyvoice.utils.file_utils import save_tensors

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in ("llm", "flow", "hift"):
            module = model.parts([part])[part]
            if part == "llm":
                set_end_logit(module.llm_decoder, module.speech_token_size)
            save_tensors(module.state_dict(), model.weights(part))


def set_end_logit(decoder: "nn.Linear", end_token: int) -> None:
    decoder.weight.data[end_token] = 0
    decoder.bias.data[end_token] = END_LOGIT


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
