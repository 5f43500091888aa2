"""From the rate of speech tokens to the rate of mel frames."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.mask import make_pad_mask
from cosyvoice.utils.rates_300m import OVERLAP_TOKENS, TOKEN_RATE_HZ, mel_frames


def stretch(x: Tensor, frames: int) -> Tensor:
    """Linear interpolation in time: (B, T, C) -> (B, C, frames)."""
    return interpolate(x.transpose(1, 2), size=frames, mode="linear")


class InterpolateRegulator(nn.Module):
    """Stretches encoded tokens linearly to mel frames and smooths them with convolutions."""

    def __init__(
        self, channels: int, sampling_ratios: Sequence[int], out_channels: int | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        if any(ratio != 1 for ratio in sampling_ratios):
            raise InputError(f"InterpolateRegulator: sampling_ratios {list(sampling_ratios)} must all be 1")
        layers: list[nn.Module] = []
        for _ in sampling_ratios:
            layers += [nn.Conv1d(channels, channels, kernel_size=3, padding=1)]
            layers += [nn.GroupNorm(groups, channels), nn.Mish()]
        self.model = nn.Sequential(*layers, nn.Conv1d(channels, out_channels or channels, kernel_size=1))

    def forward(self, x: Tensor, ylens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C) and mel lengths ylens (B,) -> (B, max(ylens), C), zero at padding, and ylens.

        All of x, padding too, is stretched to the longest mel: tokens and mel must be padded in proportion.
        """
        frames = int(ylens.max())
        out = self.model(stretch(x, frames)).transpose(1, 2)  # (B, C, T) -> (B, T, C)
        return out.masked_fill(make_pad_mask(ylens, frames)[:, :, None], 0.0), ylens

    def inference(
        self, x1: Tensor, x2: Tensor, mel_len1: int, mel_len2: int, input_frame_rate: int = TOKEN_RATE_HZ
    ) -> tuple[Tensor, int]:
        """Prompt x1 (1, T1, C) becomes mel_len1 frames, target x2 (1, T2, C) mel_len2 frames.

        Returns both, one after the other, as (1, mel_len1 + mel_len2, C), and that number of frames.
        """
        pieces = [stretch(x1, mel_len1)] if x1.shape[1] > 0 else []
        pieces += self._stretch_target(x2, mel_len2, input_frame_rate)
        out = self.model(torch.cat(pieces, dim=2)).transpose(1, 2)  # (1, C, T) -> (1, T, C)
        return out, mel_len1 + mel_len2

    @staticmethod
    def _stretch_target(x: Tensor, frames: int, input_frame_rate: int) -> list[Tensor]:
        """A long chunk in three pieces, so that tokens which two chunks share give both the same frames."""
        if x.shape[1] <= 2 * OVERLAP_TOKENS:
            return [stretch(x, frames)]
        overlap_frames = mel_frames(OVERLAP_TOKENS, input_frame_rate)
        head, middle, tail = x.tensor_split([OVERLAP_TOKENS, -OVERLAP_TOKENS], dim=1)
        return [
            stretch(head, overlap_frames),
            stretch(middle, frames - 2 * overlap_frames),
            stretch(tail, overlap_frames),
        ]
