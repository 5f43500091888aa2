"""Checks of audio features against a folder of recorded numbers, the same for each generation."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from parity import Recorded, assert_close
from torch import Tensor

from cosyvoice.utils.audio import PROMPT_RATE_HZ, kaldi_fbank, load_wav, whisper_log_mel
from matcha.utils.audio import mel_filters

NEAR_SILENT_LOG_POWER = -13.0  # Kaldi filterbank cells around it and below lie in rounding noise
TOLERANCE = {"whisper_128": 1e-4, "fbank_80": 1e-3, "fbank_80_raw": 1e-3}


@dataclass(frozen=True)
class FeatureParity:
    """Recorded features of the recordings beside them.

    training_mel: (1, samples) at `rate` Hz and the upper limit in Hz or None -> (T, 80), with the recipe's settings.
    """

    recorded: Recorded
    rate: int
    training_mel: Callable[[Tensor, float | None], Tensor]
    mel_tolerance: float

    def named(self, suffix: str) -> list[tuple[str, str]]:
        """Return (case, key without suffix) of every recorded array whose key ends in suffix."""
        keys = [(case, key) for case in self.recorded.cases("feat_*") for key in self.recorded.arrays(case)]
        return [(case, key.removesuffix(suffix)) for case, key in keys if key.endswith(suffix)]

    def waveform(self, case: str, rate: int) -> Tensor:
        return load_wav(self.recorded.folder / f"{case.removeprefix('feat_')}.wav", rate)

    def computed(self, case: str, name: str) -> Tensor:
        """Return one recorded feature of a case, computed here, time-major."""
        if name.startswith("mel_from_"):  # the training settings on audio of a rate they were not made for
            return self.training_mel(self.waveform(case, int(name.removeprefix("mel_from_"))), 8000)
        if name.startswith("mel_"):
            return self.training_mel(self.waveform(case, self.rate), None if "gan" in name else 8000)
        wav_16k = self.waveform(case, PROMPT_RATE_HZ)
        if name.startswith("whisper_"):
            return whisper_log_mel(wav_16k, int(name.removeprefix("whisper_")))[0].T
        return kaldi_fbank(wav_16k, subtract_mean=not name.endswith("raw"))

    def feature(self, case: str, name: str) -> None:
        expected = self.recorded.arrays(case)
        actual = self.computed(case, name)
        assert list(actual.shape) == self.recorded.meta(case)[name]["full_shape"]

        head = expected[name]
        atol = torch.full_like(head, TOLERANCE.get(name, self.mel_tolerance))
        if name.startswith("fbank"):
            raw = kaldi_fbank(self.waveform(case, PROMPT_RATE_HZ), subtract_mean=False)[: len(head)]
            atol[raw.min(dim=1).values < NEAR_SILENT_LOG_POWER] = 1e-2
        assert ((actual[: len(head)] - head).abs() <= atol).all()

        # a mean-free column sums to rounding noise: what its rtol is relative to is the sum of magnitudes
        sums, magnitudes = actual.double().sum(dim=0), actual.double().abs().sum(dim=0)
        scale = magnitudes if name == "fbank_80" else expected[f"{name}/column_sum"].abs()
        assert ((sums - expected[f"{name}/column_sum"]).abs() <= 1e-4 * scale).all()

    def resampled(self, case: str, name: str) -> None:
        expected, info = self.recorded.arrays(case), self.recorded.meta(case)[name]
        wav = self.waveform(case, int(name.removeprefix("wav_")))
        assert wav.shape == (1, info["samples"]) and wav.dtype == torch.float32
        head, tail = expected[f"{name}/head"], expected[f"{name}/tail"]
        assert_close(wav[:, : head.shape[1]], head, atol=1e-5)
        assert_close(wav[:, -tail.shape[1] :], tail, atol=1e-5)
        assert (wav.double() ** 2).sum().item() == pytest.approx(info["sum_sq"], rel=1e-4)

    def named_filters(self) -> list[str]:
        return [key for case in self.recorded.cases("mel_filters") for key in self.recorded.arrays(case)]

    def filters(self, key: str) -> None:
        kind, *numbers = key.split("_")
        if kind == "whisper":
            actual = mel_filters(PROMPT_RATE_HZ, 400, int(numbers[0]))
        else:
            rate, n_fft, num_mels, fmin = map(int, numbers[:4])
            actual = mel_filters(rate, n_fft, num_mels, fmin, None if numbers[4] == "none" else float(numbers[4]))
        assert_close(actual, self.recorded.arrays("mel_filters")[key], atol=1e-6)
