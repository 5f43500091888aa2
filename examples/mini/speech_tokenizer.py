"""A speech tokenizer that keeps the words: Whisper's first blocks, a small network, and 25 or 50 codes a second."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.convnext import ConvNeXtBlock
from examples.mini.whisper_encoder import WIDTH, To80Bins, WhisperEncoder

FIRST_BLOCKS = 2  # of Whisper, whose weights stay as they are
CHANNELS, DEPTH = 192, 4
NUMBERS = 4  # that a token stands for, each of as many levels
WHISPER_RATE = 50  # of its hidden frames, a second


def levels_of(codes: int) -> tuple[int, ...]:
    """Return the levels of each number. Raises InputError for codes that are no fourth power."""
    levels = round(codes ** (1 / NUMBERS))
    if levels < 2 or levels**NUMBERS != codes:
        raise InputError(f"speech_token_size is {codes}, and should be a fourth power: 256, 625, 1296, ...")
    return (levels,) * NUMBERS


class ScalarQuantiser(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023, section 3.1).

    Each number is squashed and rounded to the nearest of its levels, which lie evenly around zero; gradients pass
    unchanged.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.register_buffer("count", torch.tensor(levels, dtype=torch.float32), persistent=False)
        places = torch.tensor([1, *levels[:-1]]).cumprod(dim=0)
        self.register_buffer("places", places.to(torch.int32), persistent=False)

    @property
    def codes(self) -> int:
        return int(torch.tensor(self.levels).prod())

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> the same shape, each number between -1 and 1 and on one of its levels."""
        bounded = hidden.float().tanh() * (self.count / 2 - 1e-3)  # short of the edge, which rounds to one level more
        off = (self.count + 1) % 2 / 2  # of an even number of levels none lies on zero
        rounded = (bounded - off).round() + off
        return (bounded + (rounded - bounded).detach()) / self.half

    def indices(self, quantised: Tensor) -> Tensor:
        """(..., D) -> int32 (...), from 0 to codes - 1."""
        digits = (quantised * self.half + self.half).round().to(torch.int32)
        return (digits * self.places).sum(dim=-1).to(torch.int32)

    def numbers(self, indices: Tensor) -> Tensor:
        """(...) -> (..., D), what forward gave before indices()."""
        digits = indices[..., None] // self.places % self.count
        return (digits - self.half) / self.half

    @property
    def half(self) -> Tensor:
        """The largest level of each number before they are scaled to 1."""
        return (self.count - 1) / 2


class Encoder(nn.Module):
    """The trained part of the tokenizer: from Whisper's hidden frames to quantised ones."""

    def __init__(self, levels: Sequence[int], token_rate: int) -> None:
        """token_rate: tokens a second, a divisor of WHISPER_RATE."""
        super().__init__()
        self.frames = WHISPER_RATE // token_rate  # in a token
        self.normalise = nn.BatchNorm1d(WIDTH, affine=False)
        first = nn.Linear(self.frames * WIDTH, CHANNELS)
        self.blocks = nn.Sequential(first, *(ConvNeXtBlock(CHANNELS) for _ in range(DEPTH)))
        self.to_code = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, len(levels)))
        self.quantiser = ScalarQuantiser(levels)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, WIDTH) -> (B, N, D) of the quantiser's levels; the last token may stand for fewer frames."""
        normalised = self.normalise(hidden.transpose(1, 2))  # (B, T, C) -> (B, C, T)
        room = self.frames - 1
        tokens = (normalised.shape[2] + room) // self.frames
        whole = F.pad(normalised, (0, room), mode="replicate")[:, :, : tokens * self.frames]
        joined = whole.unflatten(2, (-1, self.frames)).permute(0, 2, 3, 1).flatten(2)  # (B, C, N F) -> (B, N, F C)
        return self.quantiser(self.to_code(self.blocks(joined)))


class TokenizerFile(nn.Module):
    """The interface of speech_tokenizer_v1.onnx and speech_tokenizer_v2.onnx."""

    def __init__(self, start: WhisperEncoder, encoder: Encoder) -> None:
        super().__init__()
        self.to_80_bins = To80Bins()
        self.start = start
        self.encoder = encoder

    def forward(self, feats: Tensor, feats_length: Tensor) -> Tensor:
        """`feats` (1, 128, T), of which the first `feats_length` (1,) count -> int32 (1, N)."""
        valid = feats[:, :, : feats_length[0].long()]
        return self.encoder.quantiser.indices(self.encoder(self.start(self.to_80_bins(valid))))
