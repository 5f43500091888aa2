"""The vocoder against recorded numbers: pitch, harmonic source, decoder and gradients."""

import pytest
import torch
from models import tiny
from parity import arrays, assert_close, cases, meta
from torch import Tensor

from cosyvoice.hifigan.generator import HiFTGenerator
from cosyvoice.hifigan.source import SineGen
from cosyvoice.utils.errors import InputError

# A float32 running phase drifts (3e-4 of the amplitude in 600 frames): looser bounds for whole chains.
F0 = {"atol": 2e-3}
SINES = {"atol": 5e-5}
WAVE = {"atol": 5e-5}
CHAIN = {"atol": 5e-4}


def inject_draws(sine_gen: SineGen, phase: Tensor, noise: Tensor) -> None:
    """Use recorded random numbers in place of drawn ones."""
    sine_gen.draw = lambda f0: (phase.clone(), noise)


def per_sample(hift: HiFTGenerator, f0: Tensor) -> Tensor:
    return f0.unsqueeze(1).repeat_interleave(hift.samples_per_frame, dim=-1)  # (B, T) -> (B, 1, N)


def nested(case: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    prefix = f"{prefix}/"
    return {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}


@pytest.mark.parametrize("name", cases("hift"))
def test_each_stage(name: str) -> None:
    hift, case = tiny("hift"), arrays(name)
    assert_close(hift.f0_predictor(case["mel"]), case["f0"], **F0)

    inject_draws(hift.m_source.l_sin_gen, case["draw/phase_uniform"], case["draw/sine_noise"])
    sines, voiced = hift.m_source.l_sin_gen(per_sample(hift, case["f0"]))
    assert_close(sines.transpose(1, 2), case["sine_waves"], **SINES)
    assert torch.equal(voiced.transpose(1, 2), case["uv"])
    assert_close(hift.m_source(per_sample(hift, case["f0"])), case["s"], **SINES)
    assert_close(hift.conv_pre(case["mel"]), case["conv_pre_out"], **WAVE)

    head = []
    hift.conv_post.register_forward_hook(lambda module, inputs, output: head.append(output))
    assert_close(hift.decode(x=case["mel"], s=case["s"]), case["wav"], **WAVE)
    assert_close(head[0], case["conv_post_out"], **WAVE)


@pytest.mark.parametrize("name", cases("hift"))
def test_source_spectrum(name: str) -> None:
    hift, case = tiny("hift"), arrays(name)
    seen = []
    hift.source_downs[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    hift.decode(x=case["mel"], s=case["s"])
    assert_close(seen[0], torch.cat([case["s_stft_real"], case["s_stft_imag"]], dim=1), **WAVE)


@pytest.mark.parametrize("name", cases("hift"))
def test_whole_chain(name: str) -> None:
    hift, case = tiny("hift"), arrays(name)
    inject_draws(hift.m_source.l_sin_gen, case["draw/phase_uniform"], case["draw/sine_noise"])
    wav, source = hift.inference(speech_feat=case["mel"])
    assert_close(wav, case["wav"], **CHAIN)
    assert_close(source, case["s"], **CHAIN)
    assert wav.abs().max() == pytest.approx(hift.audio_limit)  # the recording reaches the clamp


@pytest.mark.parametrize("name", cases("hift"))
def test_a_seed_gives_the_recorded_draws(name: str) -> None:
    hift, case = tiny("hift"), arrays(name)
    torch.manual_seed(meta(name)["seed"])
    phase, noise = hift.m_source.l_sin_gen.draw(per_sample(hift, case["f0"]))
    assert_close(phase, case["draw/phase_uniform"], atol=1e-6)
    assert torch.equal(noise, case["draw/sine_noise"])


@pytest.mark.parametrize("name", cases("hift_more"))
def test_carried_over_source(name: str) -> None:
    hift, case = tiny("hift"), arrays(name)
    mel, cache = case["mel"].clone(), case["cache_source"].clone()
    torch.manual_seed(meta(name)["cache_seed"])
    wav, source = hift.inference(speech_feat=mel, cache_source=cache)
    assert_close(source, case["s"], **CHAIN)
    assert_close(source[..., cache.shape[-1] :], case["s_generated_tail"], **CHAIN)
    assert_close(wav, case["wav"], **CHAIN)
    assert torch.equal(source[..., : cache.shape[-1]], case["cache_source"])
    assert torch.equal(mel, case["mel"]) and torch.equal(cache, case["cache_source"])


@pytest.mark.parametrize("name", cases("hift_more"))
def test_training_call(name: str) -> None:
    hift, case = tiny("hift"), nested(arrays(name), "batch")
    torch.manual_seed(meta(name)["batch_seed"])
    wav, f0 = hift.forward({"speech_feat": case["speech_feat"]}, "cpu")
    assert_close(f0, case["f0"], **F0)
    assert_close(wav, case["wav"], **CHAIN)
    assert_close(hift.decode(x=case["speech_feat"].transpose(1, 2), s=case["s"]), case["wav"], **WAVE)


@pytest.mark.parametrize("name", cases("hift_more"))
def test_decode_of_special_sources(name: str) -> None:
    hift, case = tiny("hift"), arrays(name)
    blocks = sorted({key.split("/")[0] for key in case if key.startswith("decode")})
    assert blocks
    for block in blocks:
        mel, source, wav = (case[f"{block}/{key}"] for key in ("mel", "s", "wav"))
        assert_close(hift.decode(x=mel, s=source), wav, **WAVE)


@pytest.mark.parametrize("name", cases("hift_more"))
def test_sine_generator_alone(name: str) -> None:
    sine_gen, case = tiny("hift").m_source.l_sin_gen, nested(arrays(name), "sinegen")
    inject_draws(sine_gen, case["phase_uniform"], case["noise_normal"])
    sines, voiced = sine_gen(case["f0"].transpose(1, 2))
    assert_close(sines.transpose(1, 2), case["sine_waves"], **SINES)
    assert torch.equal(voiced.transpose(1, 2), case["uv"])

    inject_draws(sine_gen, case["phase_uniform"], torch.zeros_like(case["noise_normal"]))
    without_noise, _ = sine_gen(case["f0"].transpose(1, 2))
    assert_close(sines - without_noise, case["noise_scaled"], atol=1e-6)


@pytest.mark.parametrize("name", cases("hift_grad"))
def test_gradients(name: str) -> None:
    hift, case = tiny("hift"), arrays(name)
    wav = hift.decode(x=case["mel"], s=case["s"])
    loss = wav.square().mean()
    loss.backward()
    assert_close(wav, case["wav"], **WAVE)
    assert_close(loss, case["loss"], rtol=1e-4)
    gradients = {key: parameter.grad for key, parameter in hift.named_parameters()}
    names = meta(name)["grad_norm_names"]
    assert gradients.keys() == set(names)
    norms = [0.0 if gradients[key] is None else gradients[key].double().norm().item() for key in names]
    assert_close(torch.tensor(norms), case["grad_norm_values"], rtol=1e-3, atol=1e-8)


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


def test_another_sampling_rate_is_refused() -> None:
    with pytest.raises(InputError, match="sampling_rate 24000"):
        HiFTGenerator(
            sampling_rate=24000, istft_params={"n_fft": 16, "hop_len": 4}, f0_predictor=torch.nn.Identity()
        )
