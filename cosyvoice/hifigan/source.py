"""The vocoder's excitation signal: harmonics and noise made from a pitch track.

Source module of the neural source-filter model (Wang, Takaki, Yamagishi 2019, "Neural source-filter-based
waveform model for statistical parametric speech synthesis", section III).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.runtime.draws import generator


class SineGen(nn.Module):
    """Sines at the multiples 1..harmonics of the pitch plus weak noise; noise alone in unvoiced parts.

    The phase is accumulated sample by sample, from a random start. This is the source of 22.05 kHz models.

    Args:
        samp_rate: samples per second
        harmonic_num: harmonics above the fundamental
        sine_amp: amplitude of each sine; the standard deviation of unvoiced noise is a third of it
        noise_std: standard deviation of the noise added to voiced samples
        voiced_threshold: Hz; a sample is voiced if its pitch is above it
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
        """Draw phases U(-pi, pi) (B, H, 1) and standard normal noise (B, H, N) for a pitch track (B, 1, N).

        The order of the draws is upstream's, so that a seed gives the same waveform; on the CPU, see `draw_noise` of
        `flow_matching.py`.
        """
        batch, _, samples = f0.shape
        phase = (torch.rand(batch, self.harmonics, 1, generator=generator()) * 2 - 1) * math.pi
        noise = self.normal(batch, samples)
        torch.randn(batch, samples, 1, generator=generator())  # upstream's unused branch: advances the generator
        return phase.to(f0.device), noise.to(f0.device)

    def normal(self, batch: int, samples: int) -> Tensor:
        """Draw standard normal noise (B, H, N)."""
        return torch.randn(batch, self.harmonics, samples, generator=generator())

    def phases(self, turns: Tensor, start: Tensor) -> Tensor:
        """Return the phases (B, H, N) in radians.

        turns: (B, H, N), each sample's phase step, in turns; start: (B, H, 1), radians.
        """
        start[:, 0] = 0  # the fundamental starts at zero
        return 2 * math.pi * (torch.cumsum(turns, dim=-1) % 1) + start

    @torch.no_grad()
    def forward(self, f0: Tensor) -> tuple[Tensor, Tensor]:
        """Return sines (B, H, N) and voicing, 1.0 or 0.0 (B, 1, N), for a pitch in Hz per sample (B, 1, N)."""
        start, noise = self.draw(f0)
        k = torch.arange(1, self.harmonics + 1, device=f0.device).view(1, -1, 1)
        sines = self.sine_amp * torch.sin(self.phases(f0 * k / self.sampling_rate, start))
        voiced = (f0 > self.voiced_threshold).to(f0.dtype)
        noise_std = voiced * self.noise_std + (1 - voiced) * self.sine_amp / 3
        return sines * voiced + noise_std * noise, voiced


class FrameSineGen(SineGen):
    """A SineGen whose phase is accumulated frame by frame, and interpolated linearly between the frames' centres.

    The phase is constant before the first centre and after the last. This is the source of 24 kHz models.

    The start phase is drawn but has no effect: upstream adds it to the first sample only, which its interpolation
    never reads. Without the draw a seed would give a different waveform.

    Args:
        samples_per_frame: the pitch must be constant within a frame
        options: those of SineGen, in its order
    """

    def __init__(self, samples_per_frame: int, *options: float) -> None:
        super().__init__(*options)
        self.samples_per_frame = samples_per_frame

    def normal(self, batch: int, samples: int) -> Tensor:
        """Draw standard normal noise (B, H, N).

        Upstream's tensor is transposed. torch fills such a tensor with different numbers than a contiguous one.
        """
        noise = torch.empty(batch, self.harmonics, samples).transpose(1, 2)  # (B, N, H)
        return noise.normal_(generator=generator()).transpose(1, 2)  # (B, N, H) -> (B, H, N)

    def phases(self, turns: Tensor, start: Tensor) -> Tensor:
        """Return the phases (B, H, N) in radians.

        turns: (B, H, N), each sample's phase step, in turns; start: not used.
        """
        per_frame = turns[..., :: self.samples_per_frame] % 1  # (B, H, T)
        # float64: the sum counts thousands of turns, of which only the fractional part matters
        total = torch.cumsum(per_frame.double(), dim=-1) * self.samples_per_frame
        total = F.interpolate(total, size=turns.shape[-1], mode="linear")  # (B, H, T) -> (B, H, N)
        return 2 * math.pi * (total % 1).to(turns.dtype)


class SourceModuleHnNSF(nn.Module):
    """A layer that mixes the harmonics into one excitation signal."""

    def __init__(self, sine_gen: SineGen) -> None:
        super().__init__()
        self.l_sin_gen = sine_gen
        self.l_linear = nn.Linear(sine_gen.harmonics, 1)

    def forward(self, f0: Tensor) -> Tensor:
        """Return the source (B, 1, N), within (-1, 1), for a pitch in Hz per sample (B, 1, N)."""
        sines, _ = self.l_sin_gen(f0)
        mixed = self.l_linear(sines.transpose(1, 2))  # (B, H, N) -> (B, N, 1)
        return torch.tanh(mixed).transpose(1, 2)
