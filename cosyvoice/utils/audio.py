"""Reading recordings, and the features of the speech tokenizer and of the speaker encoder."""

import math
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.utils.errors import InputError
from matcha.utils.audio import mel_filters

PROMPT_RATE_HZ = 16_000  # what the speech tokenizer and the speaker encoder listen to
MAX_PROMPT_SECONDS = 30  # Whisper's window

WHISPER_N_FFT = 400  # 25 ms at 16 kHz
WHISPER_HOP_SAMPLES = 160  # 10 ms at 16 kHz
WHISPER_MELS = 128
WHISPER_FLOOR = 1e-10
WHISPER_RANGE_LOG10 = 8.0  # the quietest cell kept lies 80 dB below the loudest

KALDI_MELS = 80
MOST_PHASES = 1000  # common rates need at most 441 for 22.05 kHz and 640 for 16 kHz

# torchaudio is imported at first use: it takes a second, and speaking with a stored voice needs none of it. Its modules
# import each other in a circle, so two threads must not begin at once.
_IMPORTING = threading.Lock()


def read_wav(wav: str | Path | BinaryIO) -> tuple[Tensor, int]:
    """Decode a recording to mono: float32 (1, samples), nominally in [-1, 1], and its rate in Hz.

    Channels are averaged. Raises InputError where the file is missing, cannot be decoded or is empty.
    """
    if isinstance(wav, str | Path) and not Path(wav).is_file():
        raise InputError(f"{wav} does not exist")
    try:
        samples, rate = soundfile.read(wav, dtype="float32", always_2d=True)  # (samples, channels)
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:  # the last two: an untold length
        raise InputError(f"{_name(wav)} cannot be decoded as audio; convert it to wav") from error
    if not len(samples):
        raise InputError(f"{_name(wav)} holds no samples")
    return torch.from_numpy(samples.mean(axis=1, dtype=np.float32))[None], rate


def _name(wav: str | Path | BinaryIO) -> str:
    return str(wav) if isinstance(wav, str | Path) else getattr(wav, "name", "stream")


def resample(wav: Tensor, rate: int, target_rate: int) -> Tensor:
    """Band-limited resampling of (1, samples) from rate to target_rate, both in Hz.

    By a windowed sinc, whose table has an entry for each phase between the two rates; odd rates, which share no large
    factor, would need gigabytes for it and go through a Fourier transform.
    """
    if rate == target_rate:
        return wav
    if target_rate // math.gcd(rate, target_rate) > MOST_PHASES:
        return fourier_resample(wav, rate, target_rate)
    return _sinc_resampler(rate, target_rate)(wav)


@lru_cache(maxsize=8)
def _sinc_resampler(rate: int, target_rate: int) -> Callable[[Tensor], Tensor]:
    """Its table takes as long to make as seconds of audio to resample."""
    with _IMPORTING:
        from torchaudio.transforms import Resample

    return Resample(rate, target_rate)  # the function of that name would compute its filter in float32


def fourier_resample(wav: Tensor, rate: int, target_rate: int) -> Tensor:
    """(1, samples) at any rate to any other, by keeping the frequencies that both can hold.

    Silence at the end keeps the transform, which sees the signal as a circle, from joining end and beginning; it makes
    the whole last a whole number of samples at both rates.
    """
    samples = wav.shape[1]
    common = rate // math.gcd(rate, target_rate)
    padded = F.pad(wav, (0, -(samples + rate // 10) % common + rate // 10))
    length = padded.shape[1] * target_rate // rate
    spectrum = torch.fft.rfft(padded)  # (1, bins)
    resampled = torch.fft.irfft(spectrum[:, : length // 2 + 1], n=length) * (length / padded.shape[1])
    return resampled[:, : -(-samples * target_rate // rate)]


def load_wav(wav: str | Path | BinaryIO, target_sr: int, min_sr: int = PROMPT_RATE_HZ) -> Tensor:
    """A recording as mono float32 (1, samples) at target_sr Hz.

    Raises InputError where it cannot be read, or must be resampled from a rate below min_sr Hz.
    """
    waveform, rate = read_wav(wav)
    if rate < min_sr and rate != target_sr:
        raise InputError(f"{_name(wav)} is sampled at {rate} Hz; at least {min_sr} Hz are needed")
    return resample(waveform, rate, target_sr)


def whisper_log_mel(wav_16k: Tensor, n_mels: int = WHISPER_MELS) -> Tensor:
    """Whisper's features (1, n_mels, T), 100 frames a second, of (1, samples) at 16 kHz, not padded to 30 s.

    Log10 mel power, at most 8 below the recording's maximum, shifted and scaled to about [-1, 1]
    (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2).
    """
    window = torch.hann_window(WHISPER_N_FFT, device=wav_16k.device)
    spectrum = torch.stft(wav_16k, WHISPER_N_FFT, WHISPER_HOP_SAMPLES, window=window, return_complex=True)
    power = spectrum[..., :-1].abs() ** 2  # (1, 201, T): the last frame is mostly padding
    mel = mel_filters(PROMPT_RATE_HZ, WHISPER_N_FFT, n_mels, device=wav_16k.device) @ power  # (1, n_mels, T)
    log_mel = mel.clamp(min=WHISPER_FLOOR).log10()
    log_mel = log_mel.clamp(min=log_mel.max().item() - WHISPER_RANGE_LOG10)
    return (log_mel + 4) / 4


def kaldi_fbank(wav_16k: Tensor, subtract_mean: bool = True) -> Tensor:
    """Kaldi's log-mel filterbank (T, 80), 100 frames a second, of (1, samples) at 16 kHz; no dither.

    With subtract_mean each bin's mean over time is removed, as the speaker encoder expects.
    """
    with _IMPORTING:
        from torchaudio.compliance import kaldi

    features = kaldi.fbank(wav_16k, num_mel_bins=KALDI_MELS, dither=0.0, sample_frequency=PROMPT_RATE_HZ)
    return features - features.mean(dim=0, keepdim=True) if subtract_mean else features
