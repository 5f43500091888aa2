"""The excitation of the vocoder: a pitch track becomes a mix of harmonics and noise.

Source module of the neural source-filter model (Wang, Takaki, Yamagishi 2019, "Neural source-filter-based
waveform model for statistical parametric speech synthesis", section III).
"""

import math

import torch
from torch import Tensor, nn

from cosyvoice.utils.draws import generator


class SineGen(nn.Module):
    """Sines at the multiples 1..harmonics of the pitch, with weak noise; noise alone where there is no voice.

    Args:
        samp_rate: samples per second
        harmonic_num: harmonics above the fundamental
        sine_amp: amplitude of each sine; unvoiced noise has a third of it as standard deviation
        noise_std: standard deviation of the noise added to voiced samples
        voiced_threshold: Hz; a sample is voiced where its pitch is above it
    """

    def __init__(
        self, samp_rate: int, harmonic_num: int, sine_amp: float, noise_std: float, voiced_threshold: float
    ) -> None:
        super().__init__()
        self.sampling_rate = samp_rate
        self.harmonics = harmonic_num + 1  # H
        self.sine_amp = sine_amp
        self.noise_std = noise_std
        self.voiced_threshold = voiced_threshold

    def draw(self, f0: Tensor) -> tuple[Tensor, Tensor]:
        """Random phases U(-pi, pi) (B, H, 1) and standard normal noise (B, H, N) for a pitch track (B, 1, N).

        The order of the draws is upstream's, so that a seed gives the same waveform; on the CPU, see `draw_noise` of
        `flow_matching.py`.
        """
        batch, _, samples = f0.shape
        phase = (torch.rand(batch, self.harmonics, 1, generator=generator()) * 2 - 1) * math.pi
        noise = torch.randn(batch, self.harmonics, samples, generator=generator())
        torch.randn(batch, samples, 1, generator=generator())  # upstream's unused branch: advances the generator
        return phase.to(f0.device), noise.to(f0.device)

    @torch.no_grad()
    def forward(self, f0: Tensor) -> tuple[Tensor, Tensor]:
        """Pitch per sample in Hz (B, 1, N) -> sines (B, H, N), voiced 1.0 or 0.0 (B, 1, N)."""
        phase, noise = self.draw(f0)
        phase[:, 0] = 0  # the fundamental starts at zero
        k = torch.arange(1, self.harmonics + 1, device=f0.device).view(1, -1, 1)
        turns = torch.cumsum(f0 * k / self.sampling_rate, dim=-1) % 1  # (B, H, N)
        sines = self.sine_amp * torch.sin(2 * math.pi * turns + phase)
        voiced = (f0 > self.voiced_threshold).to(f0.dtype)
        noise_std = voiced * self.noise_std + (1 - voiced) * self.sine_amp / 3
        return sines * voiced + noise_std * noise, voiced


class SourceModuleHnNSF(nn.Module):
    """Mixes the harmonics into one excitation signal."""

    def __init__(
        self,
        sampling_rate: int,
        harmonic_num: int = 0,
        sine_amp: float = 0.1,
        add_noise_std: float = 0.003,
        voiced_threshold: float = 0,
    ) -> None:
        super().__init__()
        self.l_sin_gen = SineGen(sampling_rate, harmonic_num, sine_amp, add_noise_std, voiced_threshold)
        self.l_linear = nn.Linear(harmonic_num + 1, 1)

    def forward(self, f0: Tensor) -> Tensor:
        """Pitch per sample in Hz (B, 1, N) -> source (B, 1, N), within (-1, 1)."""
        sines, _ = self.l_sin_gen(f0)
        mixed = self.l_linear(sines.transpose(1, 2))  # (B, H, N) -> (B, N, 1)
        return torch.tanh(mixed).transpose(1, 2)
