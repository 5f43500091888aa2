"""Spectral distances that train the vocoder without discriminators."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matcha.utils.audio import mel_filters

MAGNITUDE_FLOOR = 1e-2  # its square is added to the power, so that the logarithm ignores what nobody hears
MEL_FLOOR = 1e-5
MEL_N_FFT, MEL_BINS = 1024, 80
TIMBRE_SECONDS, TIMBRE_BINS, TIMBRE_HZ = 0.025, 40, 8000.0  # as in speaker encoders
TIMBRE_FLOOR = 1e-3


class SpectralLoss(nn.Module):
    """Multi-resolution spectral distance, with two terms on mel scales.

    It sums the following: the mean over `n_ffts` of spectral convergence and the L1 distance of log magnitudes
    ("Parallel WaveGAN", Yamamoto et al. 2020, section 2.3); `mel_weight` times the L1 distance of 80 log-mel bins up to
    half the rate (HiFi-GAN, Kong et al. 2020, equation 5); and `timbre_weight` times the relative L1 distance of 40
    mel *amplitudes* up to 8 kHz, in which loud harmonics count most, as they do for a speaker's identity.
    """

    def __init__(
        self,
        sampling_rate: int,
        n_ffts: Sequence[int] = (2048, 1024, 512, 256),
        mel_weight: float = 5.0,
        timbre_weight: float = 3.0,
    ) -> None:
        super().__init__()
        self.sampling_rate, self.n_ffts = sampling_rate, tuple(n_ffts)
        self.mel_weight, self.timbre_weight = mel_weight, timbre_weight

    def forward(self, real: Tensor, generated: Tensor) -> Tensor:
        """Return the loss of `generated` against `real`, both (B, samples) and at least half the largest transform."""
        powers = {n: (power(real, n), power(generated, n)) for n in {*self.n_ffts, MEL_N_FFT}}
        loss = torch.stack([magnitude_distance(*powers[n]) for n in self.n_ffts]).mean()
        loss = loss + self.mel_weight * self.mel_distance(*powers[MEL_N_FFT])
        return loss + self.timbre_weight * self.timbre_distance(real, generated)

    def mel_distance(self, real: Tensor, generated: Tensor) -> Tensor:
        """Return the L1 distance of the log-mels of powers (B, MEL_N_FFT // 2 + 1, T)."""
        filters = mel_filters(self.sampling_rate, MEL_N_FFT, MEL_BINS, device=real.device)
        logs = [(filters @ magnitude(x)).clamp(min=MEL_FLOOR).log() for x in (real, generated)]
        return (logs[0] - logs[1]).abs().mean()

    def timbre_distance(self, real: Tensor, generated: Tensor) -> Tensor:
        n_fft = 2 * round(TIMBRE_SECONDS * self.sampling_rate / 2)
        filters = mel_filters(self.sampling_rate, n_fft, TIMBRE_BINS, 0.0, TIMBRE_HZ, real.device)
        amplitudes = [(filters @ power(x, n_fft) + TIMBRE_FLOOR**2).sqrt() for x in (real, generated)]
        return (amplitudes[0] - amplitudes[1]).abs().sum() / amplitudes[0].sum()


def power(speech: Tensor, n_fft: int) -> Tensor:
    """Return the power spectrum (B, n_fft // 2 + 1, T) of (B, samples), with a hop of a quarter window."""
    window = torch.hann_window(n_fft, device=speech.device)
    spectrum = torch.stft(speech, n_fft, n_fft // 4, window=window, return_complex=True)
    return spectrum.real**2 + spectrum.imag**2


def magnitude(power: Tensor) -> Tensor:
    return (power + MAGNITUDE_FLOOR**2).sqrt()


def magnitude_distance(real: Tensor, generated: Tensor) -> Tensor:
    """Return the mean spectral convergence plus the L1 distance of log magnitudes of powers (B, F, T)."""
    real, generated = magnitude(real), magnitude(generated)
    error = (generated - real).square().sum((1, 2)) / real.square().sum((1, 2)).clamp(min=1)
    return error.sqrt().mean() + (generated.log() - real.log()).abs().mean()
