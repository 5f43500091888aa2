"""The vocoder against recorded numbers: pitch, harmonic source, decoder and gradients."""

from functools import partial

import pytest
import torch
from models import tiny
from parity import V1, arrays, assert_close, cases
from vocoder_parity import VocoderParity, inject_draws

from cosyvoice.hifigan.source import SineGen

# The phase drifts by 3e-4 of the amplitude in 600 frames.
CHECKS = VocoderParity(V1, partial(tiny, "hift"), "BHN", f0=2e-3, sines=5e-5, source=5e-5, wave=5e-5, chain=5e-4)


@pytest.mark.parametrize("name", cases("hift"))
def test_each_stage(name: str) -> None:
    CHECKS.each_stage(name)


@pytest.mark.parametrize("name", cases("hift"))
def test_source_spectrum(name: str) -> None:
    CHECKS.source_spectrum(name)


@pytest.mark.parametrize("name", cases("hift"))
def test_whole_chain(name: str) -> None:
    CHECKS.whole_chain(name)


@pytest.mark.parametrize("name", cases("hift"))
def test_a_seed_gives_the_recorded_draws(name: str) -> None:
    assert_close(CHECKS.seeded_draws(name), arrays(name)["draw/phase_uniform"], atol=1e-6)


@pytest.mark.parametrize("name", cases("hift_more"))
def test_carried_over_source(name: str) -> None:
    CHECKS.carried_over_source(name)


@pytest.mark.parametrize("name", cases("hift_more"))
def test_training_call(name: str) -> None:
    CHECKS.training_call(name)


@pytest.mark.parametrize("name", cases("hift_more"))
def test_decode_of_special_sources(name: str) -> None:
    CHECKS.special_sources(name)


@pytest.mark.parametrize("name", cases("hift_more"))
def test_sine_generator_alone(name: str) -> None:
    CHECKS.sine_generator(name, arrays(name)["sinegen/f0"].transpose(1, 2))


@pytest.mark.parametrize("name", cases("hift_grad"))
def test_gradients(name: str) -> None:
    CHECKS.gradients(name)


def test_removing_weight_norm_keeps_the_waveform() -> None:
    hift = tiny("hift")
    mel = torch.randn(1, 80, 12)
    source = 0.1 * torch.randn(1, 1, 12 * hift.samples_per_frame)
    with torch.no_grad():
        before, pitch = hift.decode(x=mel, s=source), hift.f0_predictor(mel)
        hift.remove_weight_norm()
        assert_close(hift.decode(x=mel, s=source), before, atol=1e-5)
        assert_close(hift.f0_predictor(mel), pitch, atol=1e-4)
    assert not [key for key in hift.state_dict() if "parametrizations" in key]


def test_a_steady_pitch_gives_sines_at_its_multiples() -> None:
    """Without noise and phase, harmonic k of f0 is amp * sin(2 pi k f0 n / rate), n counted from 1."""
    rate, amp, hertz, samples = 8000, 0.1, 125.0, 64
    sine_gen = SineGen(rate, harmonic_num=2, sine_amp=amp, noise_std=0.003, voiced_threshold=10)
    inject_draws(sine_gen, torch.zeros(1, 3, 1), torch.zeros(1, 3, samples))
    sines, _ = sine_gen(torch.full((1, 1, samples), hertz))
    k = torch.arange(1, 4).view(1, 3, 1)
    n = torch.arange(1, samples + 1)
    assert_close(sines, amp * torch.sin(2 * torch.pi * k * hertz * n / rate), atol=1e-5)
