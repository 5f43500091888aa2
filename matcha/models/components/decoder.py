"""The convolutional blocks of the velocity network: residual blocks, resampling layers, and the time embedding.

Matcha-TTS (Mehta et al. 2024), section 3.2; the residual block with an added time embedding is that of
"Denoising Diffusion Probabilistic Models" (Ho et al. 2020), appendix B, in one dimension.
"""

import torch
from torch import Tensor, nn

from matcha.models.components.past import Past

NORM_GROUPS = 8
TIME_SCALE = 1000.0  # flow time runs from 0 to 1, but the wavelengths suit diffusion steps 0..1000
LONGEST_WAVELENGTH = 10_000.0


class SinusoidalPosEmb(nn.Module):
    """Sines, then cosines, at geometrically spaced frequencies ("Attention Is All You Need", section 3.5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Embed times (B,) as (B, dim), in float32 because half precision cannot tell step 999 from 1000."""
        half = self.dim // 2
        exponents = torch.arange(half, device=x.device, dtype=torch.float32) / (half - 1)
        angles = TIME_SCALE * x.float()[:, None] * LONGEST_WAVELENGTH**-exponents  # (B, dim / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers between the sinusoids and the residual blocks."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(sample)))  # (B, in_channels) -> (B, time_embed_dim)


class Block1D(nn.Module):
    """A convolution over three frames, group norm and Mish. Padded frames are zero before and after."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(dim, dim_out, kernel_size=3, padding=1), nn.GroupNorm(NORM_GROUPS, dim_out), nn.Mish()
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Apply the block to x (B, dim, T) with a mask (B, 1, T) of zeros and ones, giving (B, dim_out, T).

        The norm averages over padding too.
        """
        return self.block(x * mask) * mask


class ResnetBlock1D(nn.Module):
    """Two convolution blocks with the time embedding added between them, beside a 1x1 convolution."""

    def __init__(self, dim: int, dim_out: int, time_emb_dim: int, block: type[Block1D] = Block1D) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_emb_dim, dim_out))
        self.block1 = block(dim, dim_out)
        self.block2 = block(dim_out, dim_out)
        self.res_conv = nn.Conv1d(dim, dim_out, kernel_size=1)

    def forward(self, x: Tensor, mask: Tensor, time_emb: Tensor, *past: Past) -> Tensor:
        """Apply the block to x (B, dim, T) with mask (B, 1, T) and time_emb (B, time_emb_dim), giving (B, dim_out, T).

        past: the earlier frames of a stream, for causal blocks.
        """
        hidden = self.block1(x, mask, *past) + self.mlp(time_emb)[:, :, None]
        return self.block2(hidden, mask, *past) + self.res_conv(x * mask)


class Downsample1D(nn.Module):
    """A convolution that halves the frame rate: (B, dim, T) -> (B, dim, ceil(T / 2))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample1D(nn.Module):
    """A transposed convolution that doubles the frame rate: (B, dim, T) -> (B, dim, 2 T)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(dim, dim, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def init_kaiming(root: nn.Module) -> None:
    """Set Kaiming-normal weights and zero biases in every convolution and linear layer below `root`."""
    for module in root.modules():
        if isinstance(module, nn.Conv1d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
