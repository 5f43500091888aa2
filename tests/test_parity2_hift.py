"""The vocoder of 24 kHz against recorded numbers, and what its second sine generator does."""


import pytest
import torch
from parity import V1, V2, assert_close
from tiny2 import tiny_hift
from vocoder_parity import VocoderParity, inject_draws, per_sample

from cosyvoice.cli.model import fade_in_out
from cosyvoice.hifigan.f0_predictor import ConvRNNF0Predictor
from cosyvoice.hifigan.generator import HiFTGenerator
from cosyvoice.hifigan.source import FrameSineGen
from cosyvoice.runtime.draws import Draws

CHECKS = VocoderParity(V2, tiny_hift, "BNH", f0=3e-3, sines=3e-4, source=1e-3, wave=2e-5, chain=1e-3)
RATE_HZ, FRAME = 24000, 480


@pytest.mark.parametrize("name", V2.cases("hift"))
def test_each_stage(name: str) -> None:
    CHECKS.each_stage(name)


@pytest.mark.parametrize("name", V2.cases("hift"))
def test_source_spectrum(name: str) -> None:
    CHECKS.source_spectrum(name)


@pytest.mark.parametrize("name", V2.cases("hift"))
def test_whole_chain(name: str) -> None:
    CHECKS.whole_chain(name)


@pytest.mark.parametrize("name", V2.cases("hift"))
def test_a_seed_gives_the_recorded_draws(name: str) -> None:
    CHECKS.seeded_draws(name)


@pytest.mark.parametrize("name", V2.cases("hift_more"))
def test_carried_over_source(name: str) -> None:
    CHECKS.carried_over_source(name)


@pytest.mark.parametrize("name", V2.cases("hift_more"))
def test_training_call(name: str) -> None:
    CHECKS.training_call(name)


@pytest.mark.parametrize("name", V2.cases("hift_more"))
def test_decode_of_special_sources(name: str) -> None:
    CHECKS.special_sources(name)


@pytest.mark.parametrize("name", V2.cases("hift_more"))
def test_sine_generator_alone(name: str) -> None:
    f0 = V2.arrays(name)["sinegen/f0_frames"].view(1, -1)
    CHECKS.sine_generator(name, per_sample(tiny_hift(), f0))


@pytest.mark.parametrize("name", V2.cases("hift_grad"))
def test_gradients(name: str) -> None:
    CHECKS.gradients(name)


@pytest.mark.parametrize("name", [*V2.cases("stream_*"), *V2.cases("whole_*")])
def test_sources_of_a_stream(name: str) -> None:
    """Several seconds, drawn one after another, each chunk beginning with the source that the last one ended with."""
    hift, case, carried = tiny_hift(), V2.arrays(name), None
    torch.manual_seed(V2.meta(name)["seed"])
    for chunk in range(V2.meta(name)["num_chunks"]):
        _, source = hift.inference(speech_feat=case[f"chunk{chunk}/hift_mel"], cache_source=carried)
        assert_close(source, case[f"chunk{chunk}/source"], atol=CHECKS.source)
        carried = source[..., -V2.meta("windows")["source_cache_len"] :]


@pytest.mark.parametrize("name", V2.cases("windows"))
def test_cross_fade_of_chunks(name: str) -> None:
    case, numbers = V2.arrays(name), V2.meta(name)
    window = torch.hamming_window(2 * numbers["source_cache_len"], periodic=False, dtype=torch.float64)
    assert_close(window, case["speech_window"], atol=1e-12)
    faded = fade_in_out(case["fade/in"], case["fade/out_tail"], window)
    assert_close(faded, case["fade/result"], atol=1e-6)
    assert numbers["source_cache_len"] == numbers["mel_cache_len"] * tiny_hift().samples_per_frame


def test_full_size_state_dict_is_that_of_the_manifest() -> None:
    with torch.device("meta"):  # shapes without memory
        hift = HiFTGenerator(
            sampling_rate=RATE_HZ,
            upsample_rates=[8, 5, 3],
            upsample_kernel_sizes=[16, 11, 7],
            istft_params={"n_fft": 16, "hop_len": 4},
            source_resblock_kernel_sizes=[7, 7, 11],
            source_resblock_dilation_sizes=[[1, 3, 5]] * 3,
            f0_predictor=ConvRNNF0Predictor(),
        )
    expected = V1.table("manifest_cosyvoice2_05b")["hift"]
    found = {key: list(tensor.shape) for key, tensor in hift.state_dict().items()}
    assert found == {key: entry["shape"] for key, entry in expected["keys"].items()}
    assert sum(parameter.numel() for parameter in hift.parameters()) == expected["num_parameters"]


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_a_frame_is_480_samples(frames: int) -> None:
    speech, source = tiny_hift().inference(speech_feat=torch.randn(1, 80, frames))
    assert speech.shape == (1, FRAME * frames) and source.shape == (1, 1, FRAME * frames)


def test_the_phase_bends_between_the_middles_of_frames() -> None:
    """Without noise: constant up to the first middle and after the last, between them a straight line."""
    pitch = torch.tensor([100.0, 100.0, 250.0])
    sine_gen = FrameSineGen(FRAME, RATE_HZ, 0, 1.0, 0.003, 10)
    sine_gen.draw = lambda f0: (torch.zeros(1, 1, 1), torch.zeros_like(f0))
    sines, _ = sine_gen(pitch.repeat_interleave(FRAME).view(1, 1, -1))
    middles = torch.arange(3) * FRAME + (FRAME - 1) / 2
    turns = torch.cumsum(pitch.double() * FRAME / RATE_HZ, 0)
    for sample in range(0, 3 * FRAME, 7):
        place = min(max(sample, middles[0].item()), middles[2].item())
        left = 0 if place < middles[1] else 1
        share = (place - middles[left].item()) / FRAME
        expected = torch.sin(2 * torch.pi * (turns[left] + share * (turns[left + 1] - turns[left])))
        assert sines[0, 0, sample].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_long_steady_tone_keeps_its_pitch() -> None:
    """A running sum in float32 would be off by a tenth of the amplitude after 30 s."""
    sine_gen = FrameSineGen(FRAME, RATE_HZ, 8, 0.1, 0.003, 10)
    samples = 1500 * FRAME
    sine_gen.draw = lambda f0: (torch.zeros(1, 9, 1), torch.zeros(1, 9, samples))
    sines, _ = sine_gen(torch.full((1, 1, samples), 250.0))
    frame = sines[..., FRAME : 2 * FRAME]  # 250 Hz: five whole turns a frame
    assert_close(sines[..., -2 * FRAME : -FRAME], frame, atol=2e-3)


def test_the_phase_draw_changes_nothing_but_the_draws_after_it() -> None:
    hift = tiny_hift()
    f0 = per_sample(hift, torch.full((1, 4), 150.0))
    noise = torch.randn(1, 9, 4 * FRAME)
    inject_draws(hift.m_source.l_sin_gen, torch.zeros(1, 9, 1), noise)
    without, _ = hift.m_source.l_sin_gen(f0)
    inject_draws(hift.m_source.l_sin_gen, torch.rand(1, 9, 1), noise)
    assert torch.equal(hift.m_source.l_sin_gen(f0)[0], without)


def test_an_utterance_draws_from_its_own_generator() -> None:
    hift, mel = tiny_hift(), torch.randn(1, 80, 3)
    with Draws(1):
        first, _ = hift.inference(speech_feat=mel)
    torch.rand(3)
    with Draws(1):
        assert torch.equal(hift.inference(speech_feat=mel)[0], first)
    with Draws(2):
        assert not torch.equal(hift.inference(speech_feat=mel)[0], first)
