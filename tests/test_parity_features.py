"""Resampling, mel, Whisper and Kaldi features of the recordings that the parity folder holds."""

import pytest
import torch
from parity import PARITY_DIR, arrays, assert_close, cases, meta
from torch import Tensor

from cosyvoice.utils.audio import PROMPT_RATE_HZ, kaldi_fbank, load_wav, whisper_log_mel
from matcha.utils.audio import mel_filters, mel_spectrogram

NEAR_SILENT_LOG_POWER = -13.0  # Kaldi filterbank cells around it and below lie in rounding noise
TOLERANCE = {"whisper_128": 1e-4, "fbank_80": 1e-3, "fbank_80_raw": 1e-3}
MEL_TOLERANCE = 1e-3


def waveform(case: str, rate: int) -> Tensor:
    return load_wav(PARITY_DIR / f"{case.removeprefix('feat_')}.wav", rate)


def training_mel(wav: Tensor, fmax: float | None = 8000) -> Tensor:
    """The recipe's mel settings, time-major (T, 80)."""
    return mel_spectrogram(wav, 1024, 80, 22050, 256, 1024, 0, fmax)[0].T


def feature(case: str, name: str) -> Tensor:
    """One recorded feature of a case, computed here, time-major."""
    if name.startswith("mel_from_"):  # the training settings on audio of a rate they were not made for
        return training_mel(waveform(case, int(name.removeprefix("mel_from_"))))
    if name.startswith("mel_"):
        return training_mel(waveform(case, 22050), fmax=None if "gan" in name else 8000)
    wav_16k = waveform(case, PROMPT_RATE_HZ)
    if name.startswith("whisper_"):
        return whisper_log_mel(wav_16k, int(name.removeprefix("whisper_")))[0].T
    return kaldi_fbank(wav_16k, subtract_mean=not name.endswith("raw"))


def recorded(suffix: str) -> list[tuple[str, str]]:
    """(case, key without suffix) of every recorded array whose key ends in suffix."""
    keys = [(case, key) for case in cases("feat_*") for key in arrays(case)]
    return [(case, key.removesuffix(suffix)) for case, key in keys if key.endswith(suffix)]


@pytest.mark.parametrize("case,name", recorded("/column_sum"))
def test_feature(case: str, name: str) -> None:
    expected = arrays(case)
    actual = feature(case, name)
    assert list(actual.shape) == meta(case)[name]["full_shape"]

    head = expected[name]
    atol = torch.full_like(head, TOLERANCE.get(name, MEL_TOLERANCE))
    if name.startswith("fbank"):
        raw = kaldi_fbank(waveform(case, PROMPT_RATE_HZ), subtract_mean=False)[: len(head)]
        atol[raw.min(dim=1).values < NEAR_SILENT_LOG_POWER] = 1e-2
    assert ((actual[: len(head)] - head).abs() <= atol).all()

    # a mean-free column sums to rounding noise: what its rtol is relative to is the sum of magnitudes
    sums, magnitudes = actual.double().sum(dim=0), actual.double().abs().sum(dim=0)
    scale = magnitudes if name == "fbank_80" else expected[f"{name}/column_sum"].abs()
    assert ((sums - expected[f"{name}/column_sum"]).abs() <= 1e-4 * scale).all()


@pytest.mark.parametrize("case,name", recorded("/head"))
def test_resampled(case: str, name: str) -> None:
    expected, info = arrays(case), meta(case)[name]
    wav = waveform(case, int(name.removeprefix("wav_")))
    assert wav.shape == (1, info["samples"]) and wav.dtype == torch.float32
    head, tail = expected[f"{name}/head"], expected[f"{name}/tail"]
    assert_close(wav[:, : head.shape[1]], head, atol=1e-5)
    assert_close(wav[:, -tail.shape[1] :], tail, atol=1e-5)
    assert (wav.double() ** 2).sum().item() == pytest.approx(info["sum_sq"], rel=1e-4)


def recorded_filters() -> list[str]:
    return [key for case in cases("mel_filters") for key in arrays(case)]


@pytest.mark.parametrize("key", recorded_filters())
def test_mel_filters(key: str) -> None:
    kind, *numbers = key.split("_")
    if kind == "whisper":
        actual = mel_filters(PROMPT_RATE_HZ, 400, int(numbers[0]))
    else:
        rate, n_fft, num_mels, fmin = map(int, numbers[:4])
        actual = mel_filters(rate, n_fft, num_mels, fmin, None if numbers[4] == "none" else float(numbers[4]))
    assert_close(actual, arrays("mel_filters")[key], atol=1e-6)
