"""The convolution module of a conformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.runtime.errors import InputError


class ConvolutionModule(nn.Module):
    """Gated pointwise, depthwise and pointwise convolution (Gulati et al., 2020, section 2.2).

    Every frame sees `kernel_size` frames, half of them later ones. The norm between depthwise convolution and
    activation is a LayerNorm, which does not depend on the batch. Norm before and residual around are the block's.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"cnn_module_kernel must be odd and positive, not {kernel_size}")
        self.pointwise_conv1 = nn.Conv1d(channels, 2 * channels, 1)
        self.depthwise_conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.activation = nn.SiLU()
        self.pointwise_conv2 = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x: (B, T, C). valid: (B, 1, T), False at padding, which counts as silence. Returns (B, T, C)."""
        gated = F.glu(self.pointwise_conv1(x.transpose(1, 2)), dim=1)  # (B, C, T)
        mixed = self.depthwise_conv(gated.masked_fill(~valid, 0.0))
        mixed = self.activation(self.norm(mixed.transpose(1, 2)))  # (B, T, C)
        return self.pointwise_conv2(mixed.transpose(1, 2)).transpose(1, 2)
