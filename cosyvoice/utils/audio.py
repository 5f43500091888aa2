"""Reads recordings, and computes the features of the speech tokenizer and the speaker encoder."""

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

PROMPT_RATE_HZ = 16_000  # input rate of the speech tokenizer and the speaker encoder
MAX_PROMPT_SECONDS = 30  # Whisper's window

# What a header may claim; more is an error or an attack, and would take all memory.
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_CHANNELS = 64
MAX_SECONDS = 600
UNKNOWN_FRAMES = 2**62
WAV_HEADER_BYTES = 4096
UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # data sizes of wav headers written before the length was known
COMPLETE_SHARE = 0.95  # of the frames in an mp3's header, which are an estimate
FAINT = 0.01  # of the loudest channel's level
SILENT = 1e-3  # of full scale

# Formats that ffmpeg reads and libsndfile does not, by the bytes at an offset in the header.
MAX_FFMPEG_SECONDS = 2 * MAX_SECONDS
FFMPEG_SUFFIXES = (".m4a", ".mp4", ".aac", ".webm", ".wma")
FFMPEG_MARKS = ((4, b"ftyp"), (0, b"\xff\xf1"), (0, b"\xff\xf9"), (0, b"\x1a\x45\xdf\xa3"), (0, b"\x30\x26\xb2\x75"))

WHISPER_N_FFT = 400  # 25 ms at 16 kHz
WHISPER_HOP_SAMPLES = 160  # 10 ms at 16 kHz
WHISPER_MELS = 128
WHISPER_FLOOR = 1e-10
WHISPER_RANGE_LOG10 = 8.0  # the quietest cell kept lies 80 dB below the loudest

KALDI_MELS = 80
MAX_PHASES = 1000  # common rates need at most 441 for 22.05 kHz and 640 for 16 kHz

# torchaudio is imported at first use: it takes a second, and speaking with a stored voice does not need it. Its modules
# import each other in a circle, so two threads must not import it at once.
_IMPORT_LOCK = threading.Lock()


def read_wav(wav: str | Path | BinaryIO, max_seconds: float = MAX_SECONDS) -> tuple[Tensor, int]:
    """Decode a recording to mono: float32 (1, samples), nominally in [-1, 1], and its rate in Hz.

    Channels that carry sound are averaged; if they cancel each other, the loudest is taken. Raises InputError if the
    file is missing, cannot be decoded, or is empty or cut off. The rate, the number of channels and the length, which
    may be `max_seconds`, are checked before decoding.
    """
    name = _name(wav)
    if isinstance(wav, str | Path) and not Path(wav).is_file():
        raise InputError(f"{name} does not exist")
    try:
        with soundfile.SoundFile(_readable(wav, name)) as file:
            _check_header(file, name, max_seconds)
            samples = file.read(dtype="float32", always_2d=True)  # (samples, channels)
            header_frames, rate, is_mp3 = file.frames, file.samplerate, file.format == "MP3"
    except InputError:  # a ValueError that says what is wrong
        raise
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:  # the last two: an unknown length
        raise InputError(f"{name} cannot be decoded as audio; convert it to wav") from error
    if not len(samples):
        raise InputError(f"{name} has no samples")
    if is_mp3 and len(samples) < COMPLETE_SHARE * header_frames:
        raise _cut_off(name, header_frames / rate, len(samples) / rate)
    return torch.from_numpy(_mono(samples))[None], rate


def _check_header(file: soundfile.SoundFile, name: str, max_seconds: float) -> None:
    """Raise InputError if this cannot be a recording of speech, and ValueError if its length is unknown."""
    rate, channels = file.samplerate, file.channels
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        possible = f"{MIN_RATE_HZ} to {MAX_RATE_HZ} are possible"
        raise InputError(f"{name} claims to have {rate} samples a second; {possible}. Convert it again")
    if channels > MAX_CHANNELS:
        raise InputError(f"{name} claims to have {channels} channels; at most {MAX_CHANNELS} are possible")
    if file.frames >= UNKNOWN_FRAMES:
        raise ValueError("unknown length")
    if file.frames > max_seconds * rate:
        raise InputError(f"{name} lasts {file.frames / rate:.3f} s; it may last at most {max_seconds:g} s")


def _readable(wav: str | Path | BinaryIO, name: str) -> str | Path | BinaryIO:
    """Return a form that libsndfile can read: the file itself, or the bytes of a wav.

    A wav is made if the file needs ffmpeg, or if its header does not know the size of the samples, as in streams.
    Raises InputError if ffmpeg is missing, or if the header claims more samples than there are.
    """
    with nullcontext(wav) if hasattr(wav, "read") else open(wav, "rb") as file:
        start = file.tell()
        header = file.read(WAV_HEADER_BYTES)
        size = file.seek(0, SEEK_END) - start
        file.seek(start)
        if any(header[place:].startswith(mark) for place, mark in FFMPEG_MARKS):
            if file is not wav:
                return _with_ffmpeg(Path(wav), name)
            with tempfile.TemporaryDirectory() as folder:  # ffmpeg must be able to seek in the file
                copied = Path(folder) / "stream"
                copied.write_bytes(file.read())
                file.seek(start)
                return _with_ffmpeg(copied, name)
        place = _offset_of_size(header)
        if place is None:
            return wav
        claimed, actual = int.from_bytes(header[place : place + 4], "little"), size - place - 4
        if claimed not in UNKNOWN_SIZES:
            if claimed > actual:
                raise _cut_off(name, claimed, actual, "bytes")
            return wav
        content = file.read()
        file.seek(start)
    true_size = actual.to_bytes(4, "little")
    return BytesIO(content[:4] + (size - 8).to_bytes(4, "little") + content[8:place] + true_size + content[place + 4 :])


def _with_ffmpeg(path: Path, name: str) -> BytesIO:
    """Return the sound of a file as a wav of the same rate and channels. Raises InputError if it cannot be decoded."""
    if shutil.which("ffmpeg") is None:
        convert = f"ffmpeg -i {name} {Path(name).with_suffix('.wav')}"
        raise InputError(f"{name} needs ffmpeg, which is not installed. Install it, or convert the file: {convert}")
    only_this = ["-protocol_whitelist", "file,pipe", "-i", f"file:{path.absolute()}"]  # media files may refer to others
    command = ["ffmpeg", "-nostdin", "-v", "error", *only_this, "-vn", "-t", str(MAX_FFMPEG_SECONDS)]
    done = subprocess.run([*command, "-f", "wav", "-"], capture_output=True, check=False)
    if done.returncode != 0:
        raise InputError(f"{name} cannot be decoded as audio; convert it to wav")
    return _readable(BytesIO(done.stdout), name)  # a wav that went through a pipe does not know its size


def _offset_of_size(header: bytes) -> int | None:
    """Return the offset of the data size in a wav's header; None for other files."""
    if header[:4] != b"RIFF" or header[8:12] != b"WAVE":
        return None
    place = 12
    while place + 8 <= len(header):
        size = int.from_bytes(header[place + 4 : place + 8], "little")
        if header[place : place + 4] == b"data":
            return place + 4
        place += 8 + size + size % 2  # chunks begin at even offsets
    return None


def _cut_off(name: str, claimed: float, actual: float, unit: str = "s") -> InputError:
    return InputError(f"{name} is cut off: it claims {claimed:.10g} {unit} and has {actual:.10g}. Copy it again")


def _mono(samples: np.ndarray) -> np.ndarray:
    """Mix float32 (samples, channels) down to (samples,)."""
    if samples.shape[1] == 1:
        return samples[:, 0]
    levels = np.sqrt(np.square(samples).mean(axis=0))
    mean = samples[:, ~(levels < FAINT * levels.max())].mean(axis=1, dtype=np.float32)
    if np.sqrt(np.square(mean).mean()) < FAINT * levels.max():
        return np.ascontiguousarray(samples[:, levels.argmax()])
    return mean


def is_silent(wav: Tensor) -> bool:
    """Return whether (1, samples) are silent; a constant is silence."""
    return bool((wav - wav.mean()).abs().max() < SILENT)


def _name(wav: str | Path | BinaryIO) -> str:
    return str(wav) if isinstance(wav, str | Path) else getattr(wav, "name", "stream")


def resample(wav: Tensor, rate: int, target_rate: int) -> Tensor:
    """Resample (1, samples), band-limited, from rate to target_rate, both in Hz.

    The filter is a windowed sinc, whose table has an entry for each phase between the two rates. For rates without a
    large common factor it would take gigabytes, so these go through a Fourier transform.
    """
    if rate == target_rate:
        return wav
    if target_rate // math.gcd(rate, target_rate) > MAX_PHASES:
        return fourier_resample(wav, rate, target_rate)
    return _sinc_resampler(rate, target_rate)(wav)


@lru_cache(maxsize=8)
def _sinc_resampler(rate: int, target_rate: int) -> Callable[[Tensor], Tensor]:
    """Return a resampler, which is cached: making its table takes as long as resampling seconds of audio."""
    with _IMPORT_LOCK:
        from torchaudio.transforms import Resample

    return Resample(rate, target_rate)  # torchaudio's function computes the filter in float32


def fourier_resample(wav: Tensor, rate: int, target_rate: int) -> Tensor:
    """Resample (1, samples) from any rate to any other, keeping the frequencies that both rates can represent.

    The signal is padded with silence, because the transform is periodic and would join end and beginning, and so that
    it lasts a whole number of samples at both rates.
    """
    samples = wav.shape[1]
    common = rate // math.gcd(rate, target_rate)
    padded = F.pad(wav, (0, -(samples + rate // 10) % common + rate // 10))
    length = padded.shape[1] * target_rate // rate
    spectrum = torch.fft.rfft(padded)  # (1, bins)
    resampled = torch.fft.irfft(spectrum[:, : length // 2 + 1], n=length) * (length / padded.shape[1])
    return resampled[:, : -(-samples * target_rate // rate)]


def load_wav(wav: str | Path | BinaryIO, target_sr: int, min_sr: int = PROMPT_RATE_HZ) -> Tensor:
    """Read a recording as mono float32 (1, samples) at target_sr Hz.

    Raises InputError if it cannot be read, or would have to be resampled from a rate below min_sr Hz.
    """
    waveform, rate = read_wav(wav)
    if rate < min_sr and rate != target_sr:
        raise InputError(f"{_name(wav)} is sampled at {rate} Hz; at least {min_sr} Hz are needed")
    return resample(waveform, rate, target_sr)


def aligned(speech: Tensor, tokens: Tensor, token_samples: int) -> tuple[Tensor, Tensor]:
    """Return speech (1, samples) and tokens (N,) of equal duration, for models whose tokens last whole mel frames.

    `speech` is padded with zeros to whole tokens of `token_samples`; then the longer of the two is cut.
    """
    speech = F.pad(speech, (0, -speech.size(1) % token_samples))
    count = min(len(tokens), speech.size(1) // token_samples)
    return speech[:, : count * token_samples], tokens[:count]


def whisper_log_mel(wav_16k: Tensor, n_mels: int = WHISPER_MELS) -> Tensor:
    """Return Whisper's features (1, n_mels, T), 100 frames a second, of (1, samples) at 16 kHz, not padded to 30 s.

    They are log10 mel power, at most 8 below the recording's maximum, shifted and scaled to about [-1, 1]
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
    """Return Kaldi's log-mel filterbank (T, 80), 100 frames a second, of (1, samples) at 16 kHz, without dither.

    subtract_mean removes each bin's mean over time, as the speaker encoder expects.
    """
    with _IMPORT_LOCK:
        from torchaudio.compliance import kaldi

    features = kaldi.fbank(wav_16k, num_mel_bins=KALDI_MELS, dither=0.0, sample_frequency=PROMPT_RATE_HZ)
    return features - features.mean(dim=0, keepdim=True) if subtract_mean else features
