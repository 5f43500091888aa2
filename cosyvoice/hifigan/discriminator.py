"""The discriminators of the vocoder's training, in time (multi-period) and in frequency (multi-resolution)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from cosyvoice.runtime.errors import InputError

LRELU_SLOPE = 0.1
MAGNITUDE_FLOOR = 1e-7  # added to the power, so that the root has a gradient at silence

Scored = tuple[Tensor, list[Tensor]]  # scores (B, N), and every hidden layer


class SpecDiscriminator(nn.Module):
    """Judges the magnitudes of one short-time Fourier transform (UnivNet, Jang et al. 2021, section 2.2)."""

    def __init__(self, fft_size: int, shift_size: int, win_length: int, channels: int) -> None:
        super().__init__()
        self.fft_size, self.shift_size, self.win_length = fft_size, shift_size, win_length
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)

        def conv(inputs: int, outputs: int, width: int, stride: int = 1) -> nn.Module:
            return weight_norm(nn.Conv2d(inputs, outputs, (3, width), (1, stride), padding=(1, width // 2)))

        narrowing = [conv(channels, channels, width=9, stride=2) for _ in range(3)]  # in frequency, never in time
        self.discriminators = nn.ModuleList([conv(1, channels, 9), *narrowing, conv(channels, channels, 3)])
        self.out = conv(channels, 1, 3)

    def forward(self, speech: Tensor) -> Scored:
        """Score speech (B, samples)."""
        spectrum = torch.stft(
            speech, self.fft_size, self.shift_size, self.win_length, self.window, return_complex=True
        )
        magnitude = (spectrum.real**2 + spectrum.imag**2 + MAGNITUDE_FLOOR).sqrt()
        x = magnitude.transpose(1, 2).unsqueeze(1)  # (B, F, T) -> (B, 1, T, F)
        layers = []
        for layer in self.discriminators:
            x = F.leaky_relu(layer(x), LRELU_SLOPE)
            layers.append(x)
        x = self.out(x)
        return x.flatten(1), [*layers, x]


class MultiResSpecDiscriminator(nn.Module):
    """A discriminator for each resolution. The defaults are UnivNet's resolutions, in samples."""

    def __init__(
        self,
        fft_sizes: Sequence[int] = (1024, 2048, 512),
        hop_sizes: Sequence[int] = (120, 240, 50),
        win_lengths: Sequence[int] = (600, 1200, 240),
        window: str = "hann_window",
        channels: int = 32,
    ) -> None:
        super().__init__()
        if window != "hann_window":
            raise InputError(f"MultiResSpecDiscriminator: window {window!r} is not implemented; use 'hann_window'")
        self.discriminators = nn.ModuleList(
            SpecDiscriminator(*sizes, channels) for sizes in zip(fft_sizes, hop_sizes, win_lengths, strict=True)
        )

    def forward(self, speech: Tensor) -> list[Scored]:
        """Return the scores and hidden layers of each discriminator for speech (B, samples)."""
        return [discriminator(speech) for discriminator in self.discriminators]


class MultipleDiscriminator(nn.Module):
    """All discriminators as one."""

    def __init__(self, mpd: nn.Module, mrd: nn.Module) -> None:
        super().__init__()
        self.mpd, self.mrd = mpd, mrd

    def forward(self, speech: Tensor) -> list[Scored]:
        """Return the scores and hidden layers of each discriminator for speech (B, samples)."""
        return [*self.mpd(speech), *self.mrd(speech)]
