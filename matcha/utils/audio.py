"""Log-mel spectrograms: the Slaney filterbank, and the features of the flow and the vocoder."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_FLOOR = 1e-5  # mel amplitudes below it count as silence: log -11.5
MAGNITUDE_FLOOR = 1e-9  # added to the power, so that the root has a gradient at silence

# Slaney's mel scale (Auditory Toolbox, 1998): linear up to 1 kHz, then 27 mels per factor of 6.4.
LINEAR_LIMIT_HZ = 1000.0
HZ_PER_MEL = 200.0 / 3.0
LINEAR_LIMIT_MEL = LINEAR_LIMIT_HZ / HZ_PER_MEL
LOG_STEP = torch.log(torch.tensor(6.4, dtype=torch.float64)).item() / 27.0


def hz_to_mel(hz: Tensor) -> Tensor:
    above = LINEAR_LIMIT_MEL + torch.log(hz.clamp(min=LINEAR_LIMIT_HZ) / LINEAR_LIMIT_HZ) / LOG_STEP
    return torch.where(hz < LINEAR_LIMIT_HZ, hz / HZ_PER_MEL, above)


def mel_to_hz(mel: Tensor) -> Tensor:
    above = LINEAR_LIMIT_HZ * torch.exp(LOG_STEP * (mel - LINEAR_LIMIT_MEL))
    return torch.where(mel < LINEAR_LIMIT_MEL, mel * HZ_PER_MEL, above)


@lru_cache(maxsize=16)
def mel_filters(
    sampling_rate: int,
    n_fft: int,
    num_mels: int,
    fmin: float = 0.0,
    fmax: float | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return triangular mel filters of equal area, float32 (num_mels, n_fft // 2 + 1). fmax None is half the rate."""
    limits_hz = torch.tensor([fmin, sampling_rate / 2 if fmax is None else fmax], dtype=torch.float64)
    low_mel, high_mel = hz_to_mel(limits_hz).tolist()
    edges = mel_to_hz(torch.linspace(low_mel, high_mel, num_mels + 2, dtype=torch.float64))  # (num_mels + 2,)
    bins = torch.linspace(0, sampling_rate / 2, n_fft // 2 + 1, dtype=torch.float64)  # (n_fft // 2 + 1,)

    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (right - left)).to(device, torch.float32)


def mel_spectrogram(
    y: Tensor,
    n_fft: int,
    num_mels: int,
    sampling_rate: int,
    hop_size: int,
    win_size: int,
    fmin: float,
    fmax: float | None,
    center: bool = False,
) -> Tensor:
    """Return natural-log mel amplitudes (B, num_mels, T) of waveforms y (B, samples) in [-1, 1].

    The waveform is reflected by (n_fft - hop_size) / 2 samples at both ends, so that T = samples // hop_size.
    """
    margin = (n_fft - hop_size) // 2
    padded = F.pad(y.unsqueeze(1), (margin, margin), mode="reflect").squeeze(1)
    window = torch.hann_window(win_size, device=y.device)
    spectrum = torch.stft(padded, n_fft, hop_size, win_size, window, center=center, return_complex=True)
    magnitude = (spectrum.real**2 + spectrum.imag**2 + MAGNITUDE_FLOOR).sqrt()  # (B, n_fft // 2 + 1, T)
    mel = mel_filters(sampling_rate, n_fft, num_mels, fmin, fmax, y.device) @ magnitude  # (B, num_mels, T)
    return mel.clamp(min=LOG_FLOOR).log()
