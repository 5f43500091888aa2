"""Fundamental frequency from a mel spectrogram."""

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from cosyvoice.runtime.errors import InputError

NUM_LAYERS = 5


class ConvRNNF0Predictor(nn.Module):
    """Five convolutions and a linear head that predict a pitch in Hz, 0 or more, for each mel frame.

    The name is upstream's; the network is not recurrent.
    """

    def __init__(self, num_class: int = 1, in_channels: int = 80, cond_channels: int = 512) -> None:
        super().__init__()
        if num_class != 1:
            raise InputError(f"f0_predictor: num_class {num_class} is not supported, only 1 (pitch)")
        layers: list[nn.Module] = []
        for channels in [in_channels] + [cond_channels] * (NUM_LAYERS - 1):
            layers += [weight_norm(nn.Conv1d(channels, cond_channels, kernel_size=3, padding=1)), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(cond_channels, num_class)

    def forward(self, x: Tensor) -> Tensor:
        """Predict f0 in Hz (B, T) from a mel (B, M, T)."""
        hidden = self.condnet(x).transpose(1, 2)  # (B, C, T) -> (B, T, C)
        return self.classifier(hidden).squeeze(-1).abs()
