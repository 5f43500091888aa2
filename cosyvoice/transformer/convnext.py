"""The ConvNeXt block in one dimension."""

from torch import Tensor, nn


class ConvNeXtBlock(nn.Module):
    """A residual depthwise convolution over time and a two-layer network at each frame (Liu et al. 2022, section 2).

    Where `condition_size` is not 0, a projection of the item's condition scales and shifts the hidden frames.
    """

    def __init__(self, channels: int, condition_size: int = 0, kernel_size: int = 5, expansion: int = 3) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pointwise = nn.Sequential(
            nn.Linear(channels, expansion * channels), nn.GELU(), nn.Linear(expansion * channels, channels)
        )
        self.adapt = nn.Linear(condition_size, 2 * channels) if condition_size else None

    def forward(self, hidden: Tensor, condition: Tensor | None = None) -> Tensor:
        """hidden (B, T, C) and, where it was asked for, condition (B, S) -> (B, T, C)."""
        nearby = self.norm(self.depthwise(hidden.transpose(1, 2)).transpose(1, 2))
        if self.adapt is not None:
            scale, shift = self.adapt(condition).unsqueeze(1).chunk(2, dim=2)  # (B, 1, C) each
            nearby = nearby * (1 + scale) + shift
        return hidden + self.pointwise(nearby)
