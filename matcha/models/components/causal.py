"""Convolutions that see the present and the past only, and the block made of one."""

from torch import Tensor, nn
from torch.nn import functional as F

from matcha.models.components.decoder import Block1D
from matcha.models.components.past import Past


class CausalConv1d(nn.Conv1d):
    """A convolution over a frame and the `kernel_size` - 1 frames before it, which are zero at the start."""

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x (B, C, T) -> (B, C_out, T). past: the earlier frames of a stream."""
        before = self.kernel_size[0] - 1
        x = F.pad(x, (before, 0)) if past is None else past.with_context(self, x, before)
        return super().forward(x)


class CausalBlock1D(Block1D):
    """Causal convolution over three frames, layer norm over the channels, Mish.

    Padded frames are zero before and after. A frame does not depend on padding, nor on later frames.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        nn.Module.__init__(self)  # the other block's layers are of no use here
        # the checkpoints number these so
        self.block = nn.ModuleDict({"0": CausalConv1d(dim, dim_out, kernel_size=3), "2": nn.LayerNorm(dim_out)})

    def forward(self, x: Tensor, mask: Tensor, past: Past | None = None) -> Tensor:
        """x (B, dim, T), mask (B, 1, T) of zeros and ones -> (B, dim_out, T). past: the earlier frames of a stream."""
        frames = self.block["0"](x * mask, past).transpose(1, 2)  # (B, C, T) -> (B, T, C)
        return F.mish(self.block["2"](frames)).transpose(1, 2) * mask
