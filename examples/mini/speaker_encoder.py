"""A small speaker encoder: Kaldi filterbank to a vector of 192 numbers, the same whatever is said."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.utils.audio import KALDI_MELS

SPEAKER_SIZE = 192
ATTENTION_CHANNELS = 64
LEAST_VARIANCE = 1e-5  # below it a channel counts as constant


class SpeakerNetwork(nn.Module):
    """A time-delay network (Snyder et al. 2018, x-vectors) with attentive statistics pooling (Okabe et al. 2018)."""

    def __init__(self, channels: int = 256, pooled_channels: int = 384) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            *_layer(KALDI_MELS, channels, kernel=5, stride=2),  # 10 ms -> 20 ms
            *_layer(channels, channels, kernel=3, dilation=2),
            *_layer(channels, channels, kernel=3, dilation=3),
            *_layer(channels, pooled_channels, kernel=1),
        )
        self.attention = nn.Sequential(
            nn.Conv1d(pooled_channels, ATTENTION_CHANNELS, 1),
            nn.Tanh(),
            nn.Conv1d(ATTENTION_CHANNELS, pooled_channels, 1),
        )
        self.project = nn.Sequential(nn.BatchNorm1d(2 * pooled_channels), nn.Linear(2 * pooled_channels, SPEAKER_SIZE))

    def forward(self, fbank: Tensor) -> Tensor:
        """(B, T, 80) less its mean over time -> (B, SPEAKER_SIZE)."""
        hidden = self.frames(fbank.transpose(1, 2))  # (B, C, T / 2)
        weights = self.attention(hidden).softmax(dim=2)
        mean = (weights * hidden).sum(dim=2)  # (B, C)
        variance = (weights * hidden**2).sum(dim=2) - mean**2
        return self.project(torch.cat([mean, variance.clamp(min=LEAST_VARIANCE).sqrt()], dim=1))


class AdditiveMarginSoftmax(nn.Module):
    """Cross-entropy on cosines, of which the right speaker's must lead by a margin (Wang et al. 2018, section 3)."""

    def __init__(self, speakers: int, margin: float, scale: float) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(speakers, SPEAKER_SIZE))
        self.margin, self.scale = margin, scale

    def forward(self, vectors: Tensor, speakers: Tensor) -> Tensor:
        """(B, SPEAKER_SIZE) and numbers of speakers (B,) -> a scalar."""
        cosines = F.normalize(vectors) @ F.normalize(self.centres).T  # (B, speakers)
        handicap = self.margin * F.one_hot(speakers, len(self.centres))
        return F.cross_entropy(self.scale * (cosines - handicap), speakers)


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel // 2)  # even the shortest recording leaves frames
    return [nn.Conv1d(inputs, outputs, kernel, stride, padding, dilation), nn.ReLU(), nn.BatchNorm1d(outputs)]
