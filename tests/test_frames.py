"""How samples, mel frames and speech tokens convert, for both generations."""

from functools import partial

import pytest
from parity import PARITY_DIR
from tiny2 import write_config

from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.frames import Rates
from cosyvoice.utils.rates_300m import mel_frames

V1, V2 = Rates(22050, 256, 50), Rates(24000, 480, 25)


def test_mel_frames_of_tokens() -> None:
    assert [V1.mel_frames(tokens) for tokens in (0, 1, 2, 150)] == [0, 1, 3, 258]
    assert all(V1.mel_frames(tokens) == int(tokens / 50 * 22050 / 256) == mel_frames(tokens) for tokens in range(3000))
    assert all(V2.mel_frames(tokens) == 2 * tokens for tokens in range(3000))
    assert V1.token_mel_ratio is None and V2.token_mel_ratio == 2


@pytest.mark.parametrize("rates", [V1, V2], ids=["v1", "v2"])
def test_whole_tokens_is_the_inverse_of_mel_frames(rates: Rates) -> None:
    for frames in range(1000):
        assert rates.mel_frames(rates.whole_tokens(frames)) <= frames < rates.mel_frames(rates.whole_tokens(frames) + 1)


def test_samples() -> None:
    assert (V1.samples_per_token, V2.samples_per_token) == (441, 960)
    assert [V2.tokens(samples) for samples in (0, 1, 960, 961)] == [0, 1, 1, 2]
    assert all(rates.tokens(rates.token_samples(7)) == 7 for rates in (V1, V2))
    assert V2.token_samples(3) == V2.frame_samples(6) == 2880
    assert V1.frame_samples(2) == 512


def test_rates_of_a_yaml(tmp_path) -> None:
    entries = load_model_yaml(PARITY_DIR / "tiny.yaml", parts=("sample_rate", "feat_extractor", "flow"))
    rates = Rates.of_yaml(entries["sample_rate"], entries["feat_extractor"], entries["flow"].input_frame_rate)
    assert rates == V1
    names = ("sample_rate", "feat_extractor", "token_frame_rate")
    entries = load_model_yaml(write_config(tmp_path), parts=names)
    assert Rates.of_yaml(*(entries[name] for name in names)) == V2


@pytest.mark.parametrize("numbers", [(0, 480, 25), (24000, 0, 25), (24000, 480, -1)])
def test_rates_are_above_zero(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="above 0"):
        Rates(*numbers)


def test_a_token_is_a_whole_number_of_samples() -> None:
    with pytest.raises(InputError, match="token_frame_rate"):
        Rates(22050, 256, 40)


@pytest.mark.parametrize("function", [print, partial(print, n_fft=1024)])
def test_the_mel_function_must_tell_its_hop(function) -> None:
    with pytest.raises(InputError, match="hop_size"):
        Rates.of_yaml(24000, function, 25)
