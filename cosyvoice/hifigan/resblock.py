"""Residual stack of the vocoder, with periodic activations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha, with a learnt alpha for each channel (Ziyin, Hartwig, Ueda 2020, equation 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to (B, C, T)."""
        alpha = self.alpha.unsqueeze(-1)
        return x + torch.sin(alpha * x).square() / (alpha + 1e-9)  # 1e-9: training may bring alpha to zero


class ResBlock(nn.Module):
    """A residual block of HiFi-GAN (Kong, Kim, Bae 2020, section 2.2) with snake in place of leaky ReLU.

    For each dilation it adds snake, dilated convolution, snake and plain convolution to its input.
    """

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Module:
            return weight_norm(nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding="same"))

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to (B, C, T)."""
        for snake1, conv1, snake2, conv2 in zip(
            self.activations1, self.convs1, self.activations2, self.convs2, strict=True
        ):
            x = x + conv2(snake2(conv1(snake1(x))))
        return x
