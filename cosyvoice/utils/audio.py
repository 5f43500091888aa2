"""Reading recordings, and the features of the speech tokenizer and of the speaker encoder."""

import math
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.runtime.errors import InputError
from matcha.utils.audio import mel_filters

PROMPT_RATE_HZ = 16_000  # what the speech tokenizer and the speaker encoder listen to
MAX_PROMPT_SECONDS = 30  # Whisper's window

# What a header may tell; more is an error or an attack, and would take all memory.
LEAST_RATE_HZ, MOST_RATE_HZ = 4_000, 384_000
MOST_CHANNELS = 64
MOST_SECONDS = 600
UNTOLD_FRAMES = 2**62
WAV_HEADER_BYTES = 4096
OPEN_SIZES = (0, 0xFFFFFFFF)  # of a wav's samples, whose writer did not know it yet
WHOLE_SHARE = 0.95  # of the frames that an mp3 tells of, which are an estimate
FAINT = 0.01  # of the loudest channel
SILENT = 1e-3  # of full scale: what stays below is no sound

# What libsndfile cannot read and ffmpeg can, by the bytes at a place near the beginning.
MOST_FFMPEG_SECONDS = 2 * MOST_SECONDS
FFMPEG_SUFFIXES = (".m4a", ".mp4", ".aac", ".webm", ".wma")
FFMPEG_MARKS = ((4, b"ftyp"), (0, b"\xff\xf1"), (0, b"\xff\xf9"), (0, b"\x1a\x45\xdf\xa3"), (0, b"\x30\x26\xb2\x75"))

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


def read_wav(wav: str | Path | BinaryIO, most_seconds: float = MOST_SECONDS) -> tuple[Tensor, int]:
    """Decode a recording to mono: float32 (1, samples), nominally in [-1, 1], and its rate in Hz.

    Channels that carry sound are averaged; where they cancel each other, the loudest is taken. Raises InputError where
    the file is missing, cannot be decoded, is empty or cut off, and, before it is decoded, for a rate or a number of
    channels that no recording has and for one of more than `most_seconds`.
    """
    name = _name(wav)
    if isinstance(wav, str | Path) and not Path(wav).is_file():
        raise InputError(f"{name} does not exist")
    try:
        with soundfile.SoundFile(_readable(wav, name)) as file:
            _check_header(file, name, most_seconds)
            samples = file.read(dtype="float32", always_2d=True)  # (samples, channels)
            told, rate, is_mp3 = file.frames, file.samplerate, file.format == "MP3"
    except InputError:  # a ValueError that says what is wrong
        raise
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:  # the last two: an untold length
        raise InputError(f"{name} cannot be decoded as audio; convert it to wav") from error
    if not len(samples):
        raise InputError(f"{name} holds no samples")
    if is_mp3 and len(samples) < WHOLE_SHARE * told:
        raise _cut_off(name, told / rate, len(samples) / rate)
    return torch.from_numpy(_mono(samples))[None], rate


def _check_header(file: soundfile.SoundFile, name: str, most_seconds: float) -> None:
    """Raises InputError for what cannot be a recording of speech, and ValueError where the length is not told."""
    rate, channels = file.samplerate, file.channels
    if not LEAST_RATE_HZ <= rate <= MOST_RATE_HZ:
        possible = f"{LEAST_RATE_HZ} to {MOST_RATE_HZ} are possible"
        raise InputError(f"{name} claims to have {rate} samples a second; {possible}. Convert it anew")
    if channels > MOST_CHANNELS:
        raise InputError(f"{name} claims to have {channels} channels; at most {MOST_CHANNELS} are possible")
    if file.frames >= UNTOLD_FRAMES:
        raise ValueError("untold length")
    if file.frames > most_seconds * rate:
        raise InputError(f"{name} lasts {file.frames / rate:.3f} s; at most {most_seconds:g} s are possible")


def _readable(wav: str | Path | BinaryIO, name: str) -> str | Path | BinaryIO:
    """Return what libsndfile can read: the file itself, or the bytes of a wav.

    A wav is made if the file needs ffmpeg, or if its own header leaves the size of the samples open, as streams do.
    Raises InputError if there is no ffmpeg, and if the header tells of more samples than there are.
    """
    with nullcontext(wav) if hasattr(wav, "read") else open(wav, "rb") as file:
        start = file.tell()
        header = file.read(WAV_HEADER_BYTES)
        size = file.seek(0, SEEK_END) - start
        file.seek(start)
        if any(header[place:].startswith(mark) for place, mark in FFMPEG_MARKS):
            if file is not wav:
                return _with_ffmpeg(Path(wav), name)
            with tempfile.TemporaryDirectory() as folder:  # ffmpeg must be able to jump in the file
                copied = Path(folder) / "stream"
                copied.write_bytes(file.read())
                file.seek(start)
                return _with_ffmpeg(copied, name)
        place = _place_of_size(header)
        if place is None:
            return wav
        told, there = int.from_bytes(header[place : place + 4], "little"), size - place - 4
        if told not in OPEN_SIZES:
            if told > there:
                raise _cut_off(name, told, there, "bytes")
            return wav
        content = file.read()
        file.seek(start)
    true_size = there.to_bytes(4, "little")
    return BytesIO(content[:4] + (size - 8).to_bytes(4, "little") + content[8:place] + true_size + content[place + 4 :])


def _with_ffmpeg(path: Path, name: str) -> BytesIO:
    """Return the sound of a file as a wav of its own rate and channels. Raises InputError if that is impossible."""
    if shutil.which("ffmpeg") is None:
        convert = f"ffmpeg -i {name} {Path(name).with_suffix('.wav')}"
        raise InputError(f"{name} needs ffmpeg, which is not installed. Install it, or convert the file: {convert}")
    only_this = ["-protocol_whitelist", "file,pipe", "-i", f"file:{path.absolute()}"]  # such files may name others
    command = ["ffmpeg", "-nostdin", "-v", "error", *only_this, "-vn", "-t", str(MOST_FFMPEG_SECONDS)]
    done = subprocess.run([*command, "-f", "wav", "-"], capture_output=True, check=False)
    if done.returncode != 0:
        raise InputError(f"{name} cannot be decoded as audio; convert it to wav")
    return _readable(BytesIO(done.stdout), name)  # the size of a wav that went through a pipe is open


def _place_of_size(header: bytes) -> int | None:
    """Where the beginning of a wav tells how many bytes of samples follow; None for other files."""
    if header[:4] != b"RIFF" or header[8:12] != b"WAVE":
        return None
    place = 12
    while place + 8 <= len(header):
        size = int.from_bytes(header[place + 4 : place + 8], "little")
        if header[place : place + 4] == b"data":
            return place + 4
        place += 8 + size + size % 2  # parts begin at even places
    return None


def _cut_off(name: str, told: float, there: float, unit: str = "s") -> InputError:
    return InputError(f"{name} is cut off: it tells of {told:.10g} {unit} and holds {there:.10g}. Copy it again")


def _mono(samples: np.ndarray) -> np.ndarray:
    """(samples, channels) float32 -> (samples,)."""
    if samples.shape[1] == 1:
        return samples[:, 0]
    levels = np.sqrt(np.square(samples).mean(axis=0))
    mean = samples[:, ~(levels < FAINT * levels.max())].mean(axis=1, dtype=np.float32)
    if np.sqrt(np.square(mean).mean()) < FAINT * levels.max():
        return np.ascontiguousarray(samples[:, levels.argmax()])
    return mean


def is_silent(wav: Tensor) -> bool:
    """Return whether (1, samples) hold no sound; a constant is none."""
    return bool((wav - wav.mean()).abs().max() < SILENT)


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


def aligned(speech: Tensor, tokens: Tensor, token_samples: int) -> tuple[Tensor, Tensor]:
    """Return speech (1, samples) and tokens (N,) that end together, for models whose tokens last whole mel frames.

    `speech` gets zeros up to the end of its last token of `token_samples`; then both are cut to the shorter.
    """
    speech = F.pad(speech, (0, -speech.size(1) % token_samples))
    count = min(len(tokens), speech.size(1) // token_samples)
    return speech[:, : count * token_samples], tokens[:count]


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
