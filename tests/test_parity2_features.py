"""CosyVoice2's features at 24 kHz, with the settings of its own configuration."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from feature_parity import FeatureParity
from parity import V2, assert_close
from tiny2 import write_config
from torch import Tensor

from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.speech_encoders.encoders import SpeakerEncoder, SpeechTokenizer
from cosyvoice.utils.audio import PROMPT_RATE_HZ, load_wav
from cosyvoice.utils.frames import Rates


@cache
def settings() -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return load_model_yaml(write_config(Path(folder)), parts=("feat_extractor", "mel_spec_transform1"))


def training_mel(wav: Tensor, fmax: float | None) -> Tensor:
    mel = settings()["feat_extractor" if fmax else "mel_spec_transform1"]
    assert mel.keywords["fmax"] == fmax
    return mel(wav)[0].T


CHECKS = FeatureParity(V2, 24000, training_mel, mel_tolerance=2e-3)


@pytest.mark.parametrize("case,name", CHECKS.named("/column_sum"))
def test_feature(case: str, name: str) -> None:
    CHECKS.feature(case, name)


@pytest.mark.parametrize("case,name", CHECKS.named("/head"))
def test_resampled(case: str, name: str) -> None:
    CHECKS.resampled(case, name)


@pytest.mark.parametrize("key", CHECKS.named_filters())
def test_mel_filters(key: str) -> None:
    CHECKS.filters(key)


@pytest.mark.parametrize("name", V2.cases("mel_filters"))
def test_frames_of_samples(name: str) -> None:
    for samples, frames in V2.meta(name)["frames_of_samples"].items():
        assert len(training_mel(torch.zeros(1, int(samples)), 8000)) == frames
    for samples in V2.meta(name)["too_short"]:
        with pytest.raises(RuntimeError):
            training_mel(torch.zeros(1, int(samples)), 8000)


RECORDINGS = {"prompt_wav": "flow_prompt_speech_token", "source_wav": "source_speech_token"}


@pytest.mark.parametrize("name", V2.cases("api"))
@pytest.mark.parametrize("recording", RECORDINGS)
def test_speech_tokens_at_25_hz(name: str, recording: str) -> None:
    tokenizer = SpeechTokenizer(V2.folder / "tiny2_speech_tokenizer.onnx", "cpu", token_rate_hz=25)
    wav_16k = load_wav(V2.folder / V2.meta(name)[recording], PROMPT_RATE_HZ)
    tokens = tokenizer(wav_16k)
    assert torch.equal(tokens, V2.arrays(name)[f"vc/in/{RECORDINGS[recording]}"])
    expected = Rates(PROMPT_RATE_HZ, 160, tokenizer.token_rate_hz).tokens(wav_16k.shape[1])
    assert tokens.shape[1] == expected


@pytest.mark.parametrize("name", V2.cases("api"))
def test_speaker_vector(name: str) -> None:
    encoder = SpeakerEncoder(V2.folder / "tiny2_campplus.onnx", "cpu")
    vector = encoder(load_wav(V2.folder / V2.meta(name)["prompt_wav"], PROMPT_RATE_HZ))
    assert_close(vector, V2.arrays(name)["vc/in/flow_embedding"], atol=1e-4)
