"""A small supervised speech tokenizer: log-mel to 256 codes at 50 a second, which phones can be read from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cosyvoice.utils.audio import WHISPER_MELS
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.frames import TOKEN_RATE_HZ

VOWELS = "aa ae ah ao aw ax ay eh er ey ih iy ow oy uh uw"
CONSONANTS = "b ch d dh f g hh jh k l m n ng p r s sh t th v w y z zh"
PHONES = tuple(f"pau {VOWELS} {CONSONANTS}".split())  # flite's and festival's names
LEVELS, DIMENSIONS = 4, 4  # 4^4 = 256 codes
CODES = LEVELS**DIMENSIONS
STRIDE = 2  # frames of 10 ms in a token


class ScalarQuantiser(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023, section 3.1) with an even number of levels.

    Each number is squashed and rounded to the nearest of LEVELS half-integers around zero; gradients pass unchanged.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., DIMENSIONS) -> the same shape, of -1.5, -0.5, 0.5, 1.5."""
        bounded = hidden.tanh() * (LEVELS / 2 - 1e-3)  # short of the edge, which would round to one level more
        quantised = (bounded - 0.5).round() + 0.5  # half a step off, as no level lies on zero
        return bounded + (quantised - bounded).detach()

    @staticmethod
    def indices(quantised: Tensor) -> Tensor:
        """(..., DIMENSIONS) -> int32 (...), 0 to CODES - 1."""
        digits = (quantised + (LEVELS - 1) / 2).round().to(torch.int32)
        places = torch.tensor([LEVELS**place for place in range(DIMENSIONS)], dtype=torch.int32)
        return (digits * places).sum(dim=-1).to(torch.int32)


class Block(nn.Module):
    """A residual depthwise convolution over time and a two-layer network at each token (Liu et al. 2022, ConvNeXt)."""

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.depthwise = nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding, groups=channels)
        self.pointwise = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        nearby = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden + self.pointwise(nearby)


class Tokenizer(nn.Module):
    """Log-mel to quantised vectors, and phones from those: cross-entropy on the phones trains all of it."""

    def __init__(self, channels: int = 176, dilations: Sequence[int] = (1, 2, 4, 1), kernel: int = 5) -> None:
        super().__init__()
        self.downsample = nn.Conv1d(WHISPER_MELS, channels, 5, stride=STRIDE, padding=2)
        self.blocks = nn.Sequential(nn.LayerNorm(channels), *(Block(channels, kernel, d) for d in dilations))
        self.to_code = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, DIMENSIONS))
        self.quantiser = ScalarQuantiser()
        # of each token by itself: one that saw several would let them share a phone among them, and then a language
        # model finds them hard to predict
        self.to_phones = nn.Sequential(nn.Linear(DIMENSIONS, 128), nn.GELU(), nn.Linear(128, len(PHONES)))

    def encode(self, feats: Tensor) -> Tensor:
        """(B, 128, T) log-mel -> quantised (B, N, DIMENSIONS), N = T / 2 rounded up."""
        centred = feats - feats.mean(dim=2, keepdim=True)  # without the voice's and the microphone's mean spectrum
        hidden = self.downsample(2 * centred).transpose(1, 2)  # (B, 128, T) -> (B, N, C)
        return self.quantiser(self.to_code(self.blocks(hidden)))

    def forward(self, feats: Tensor) -> Tensor:
        """(B, 128, T) -> scores (B, N, phones)."""
        return self.to_phones(self.encode(feats))


class TokenizerFile(nn.Module):
    """The interface of speech_tokenizer_v1.onnx."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, feats: Tensor, feats_length: Tensor) -> Tensor:
        """`feats` (1, 128, T), of which `feats_length` (1,) frames count -> int32 (1, N)."""
        valid = feats[:, :, : feats_length[0].long()]
        return ScalarQuantiser.indices(self.tokenizer.encode(valid))


def read_phones(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ends of a recording's phones in seconds and their numbers in PHONES, (P,) each.

    Raises InputError for a missing file, a line that is not "end_seconds phone" and an unknown phone.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; make_corpus.py makes it, where the voice tells its phones")
    ends, phones = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            end, phone = line.split()
            ends.append(float(end))
            phones.append(PHONES.index(phone))
        except ValueError:
            raise InputError(f'{path}, line {number}: "{line}" is not "end_seconds phone"; make it anew') from None
    if not phones:
        raise InputError(f"{path} is empty; delete it, and its recording is not used")
    return np.array(ends), np.array(phones)


def phone_of_each(ends: np.ndarray, tokens: int) -> np.ndarray:
    """The number, in order of time, of the phone at the centre of each token: (tokens,)."""
    centres = (np.arange(tokens) + 0.5) / TOKEN_RATE_HZ  # s
    return np.searchsorted(ends, centres, side="right").clip(max=len(ends) - 1)


def token_phones(path: Path, tokens: int) -> Tensor:
    """The phone at the centre of each token, int64 (tokens,)."""
    ends, phones = read_phones(path)
    return torch.from_numpy(phones[phone_of_each(ends, tokens)])
