"""Resampling, mel, Whisper and Kaldi features of the recordings that the parity folder holds."""

import pytest
from feature_parity import FeatureParity
from parity import V1
from torch import Tensor

from matcha.utils.audio import mel_spectrogram


def training_mel(wav: Tensor, fmax: float | None) -> Tensor:
    return mel_spectrogram(wav, 1024, 80, 22050, 256, 1024, 0, fmax)[0].T


CHECKS = FeatureParity(V1, 22050, training_mel, mel_tolerance=1e-3)


@pytest.mark.parametrize("case,name", CHECKS.named("/column_sum"))
def test_feature(case: str, name: str) -> None:
    CHECKS.feature(case, name)


@pytest.mark.parametrize("case,name", CHECKS.named("/head"))
def test_resampled(case: str, name: str) -> None:
    CHECKS.resampled(case, name)


@pytest.mark.parametrize("key", CHECKS.named_filters())
def test_mel_filters(key: str) -> None:
    CHECKS.filters(key)
