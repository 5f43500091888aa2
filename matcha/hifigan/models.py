"""The multi-period discriminator of HiFi-GAN (Kong, Kim, Bae 2020, section 2.3)."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

LRELU_SLOPE = 0.1
KERNEL, STRIDE = 5, 3  # in time, within a period's column

Scored = tuple[Tensor, list[Tensor]]  # scores (B, N), and every hidden layer


class DiscriminatorP(nn.Module):
    """A discriminator of waveforms folded into rows of `period` samples, whose columns are one period apart."""

    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        strides = [STRIDE] * (len(channels) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, (KERNEL, 1), (stride, 1), padding=(KERNEL // 2, 0)))
            for (before, after), stride in zip(pairwise([1, *channels]), strides, strict=True)
        )
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, speech: Tensor) -> Scored:
        """Score speech (B, samples)."""
        missing = -speech.size(1) % self.period
        x = F.pad(speech[:, None], (0, missing), mode="reflect").unflatten(2, (-1, self.period))  # (B, 1, rows, period)
        layers = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), LRELU_SLOPE)
            layers.append(x)
        x = self.conv_post(x)
        return x.flatten(1), [*layers, x]


class MultiPeriodDiscriminator(nn.Module):
    """A discriminator for each period. Prime periods overlap least. The defaults are the paper's."""

    def __init__(
        self, periods: Sequence[int] = (2, 3, 5, 7, 11), channels: Sequence[int] = (32, 128, 512, 1024, 1024)
    ) -> None:
        """Build the discriminators. channels: of the layers; fewer and narrower ones make CPU training bearable."""
        super().__init__()
        self.discriminators = nn.ModuleList(DiscriminatorP(period, channels) for period in periods)

    def forward(self, speech: Tensor) -> list[Scored]:
        """Return the scores and hidden layers of each discriminator for speech (B, samples)."""
        return [discriminator(speech) for discriminator in self.discriminators]
