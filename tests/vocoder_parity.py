"""Checks of a vocoder against a folder of recorded numbers, the same for each generation."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from parity import Recorded, assert_close
from torch import Tensor

from cosyvoice.hifigan.generator import HiFTGenerator
from cosyvoice.hifigan.source import SineGen


def inject_draws(sine_gen: SineGen, phase: Tensor, noise: Tensor) -> None:
    """Use recorded random numbers in place of drawn ones."""
    sine_gen.draw = lambda f0: (phase.clone(), noise)


def per_sample(hift: HiFTGenerator, f0: Tensor) -> Tensor:
    return f0.unsqueeze(1).repeat_interleave(hift.samples_per_frame, dim=-1)  # (B, T) -> (B, 1, N)


def nested(case: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    prefix = f"{prefix}/"
    return {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class VocoderParity:
    """A recorded vocoder and the largest deviations that rounding explains.

    A float32 running phase drifts, so `sines`, `source` and `chain` are looser than `wave`.
    """

    recorded: Recorded
    build: Callable[[], HiFTGenerator]
    noise_shape: str  # of the recorded sine noise: "BHN" or "BNH"
    f0: float  # Hz
    sines: float
    source: float  # of a given pitch
    wave: float  # of a given source
    chain: float

    def noise(self, recorded: Tensor) -> Tensor:
        """Return the noise as (B, H, N)."""
        return recorded if self.noise_shape == "BHN" else recorded.transpose(1, 2)

    def with_draws(self, case: dict[str, Tensor]) -> HiFTGenerator:
        """Return the vocoder with the recorded random numbers."""
        hift = self.build()
        inject_draws(hift.m_source.l_sin_gen, case["draw/phase_uniform"], self.noise(case["draw/sine_noise"]))
        return hift

    def each_stage(self, name: str) -> None:
        case = self.recorded.arrays(name)
        hift = self.with_draws(case)
        assert_close(hift.f0_predictor(case["mel"]), case["f0"], atol=self.f0)
        sines, voiced = hift.m_source.l_sin_gen(per_sample(hift, case["f0"]))
        assert_close(sines.transpose(1, 2), case["sine_waves"], atol=self.sines)
        assert torch.equal(voiced.transpose(1, 2), case["uv"])
        assert_close(hift.m_source(per_sample(hift, case["f0"])), case["s"], atol=self.source)
        assert_close(hift.conv_pre(case["mel"]), case["conv_pre_out"], atol=self.wave)

        seen = {}
        inner = {"conv_post_out": hift.conv_post, "ups0_out": hift.ups[0]}
        inner |= {f"source_res{i}_out": block for i, block in enumerate(hift.source_resblocks)}
        for key, module in inner.items():
            module.register_forward_hook(lambda module, inputs, output, key=key: seen.update({key: output}))
        assert_close(hift.decode(x=case["mel"], s=case["s"]), case["wav"], atol=self.wave)
        assert "conv_post_out" in case
        for key in seen.keys() & case.keys():
            assert_close(seen[key], case[key], atol=self.wave)

    def source_spectrum(self, name: str) -> None:
        hift, case = self.build(), self.recorded.arrays(name)
        seen = []
        hift.source_downs[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        hift.decode(x=case["mel"], s=case["s"])
        assert_close(seen[0], torch.cat([case["s_stft_real"], case["s_stft_imag"]], dim=1), atol=self.wave)

    def whole_chain(self, name: str) -> None:
        case = self.recorded.arrays(name)
        hift = self.with_draws(case)
        wav, source = hift.inference(speech_feat=case["mel"])
        assert_close(wav, case["wav"], atol=self.chain)
        assert_close(source, case["s"], atol=self.chain)
        assert wav.abs().max() == pytest.approx(hift.audio_limit)  # the recording reaches the clamp

    def seeded_draws(self, name: str) -> Tensor:
        """Return the phases that the recorded seed gives, whose distribution differs."""
        hift, case = self.build(), self.recorded.arrays(name)
        torch.manual_seed(self.recorded.meta(name)["seed"])
        phase, noise = hift.m_source.l_sin_gen.draw(per_sample(hift, case["f0"]))
        assert torch.equal(noise, self.noise(case["draw/sine_noise"]))
        return phase

    def carried_over_source(self, name: str) -> None:
        hift, case = self.build(), self.recorded.arrays(name)
        mel, cache = case["mel"].clone(), case["cache_source"].clone()
        torch.manual_seed(self.recorded.meta(name)["cache_seed"])
        wav, source = hift.inference(speech_feat=mel, cache_source=cache)
        assert_close(source, case["s"], atol=self.chain)
        assert_close(wav, case["wav"], atol=self.chain)
        assert torch.equal(source[..., : cache.shape[-1]], case["cache_source"])
        assert torch.equal(mel, case["mel"]) and torch.equal(cache, case["cache_source"])

    def training_call(self, name: str) -> None:
        hift, case = self.build(), nested(self.recorded.arrays(name), "batch")
        torch.manual_seed(self.recorded.meta(name)["batch_seed"])
        wav, f0 = hift.forward({"speech_feat": case["speech_feat"]}, "cpu")
        assert_close(f0, case["f0"], atol=self.f0)
        assert_close(wav, case["wav"], atol=self.chain)
        decoded = hift.decode(x=case["speech_feat"].transpose(1, 2), s=case["s"])
        assert_close(decoded, case["wav"], atol=self.wave)

    def special_sources(self, name: str) -> None:
        hift, case = self.build(), self.recorded.arrays(name)
        blocks = sorted({key.split("/")[0] for key in case if key.startswith("decode")})
        assert blocks
        for block in blocks:
            mel, source, wav = (case[f"{block}/{key}"] for key in ("mel", "s", "wav"))
            assert wav.shape[1] == mel.shape[2] * hift.samples_per_frame
            assert_close(hift.decode(x=mel, s=source), wav, atol=self.wave)

    def sine_generator(self, name: str, f0: Tensor) -> None:
        """f0: the recorded pitch per sample (1, 1, N)."""
        sine_gen, case = self.build().m_source.l_sin_gen, nested(self.recorded.arrays(name), "sinegen")
        noise = self.noise(case["noise_normal"])
        inject_draws(sine_gen, case["phase_uniform"], noise)
        sines, voiced = sine_gen(f0)
        assert_close(sines.transpose(1, 2), case["sine_waves"], atol=self.sines)
        assert torch.equal(voiced.transpose(1, 2), case["uv"])
        inject_draws(sine_gen, case["phase_uniform"], torch.zeros_like(noise))
        without_noise, _ = sine_gen(f0)
        assert_close(sines - without_noise, self.noise(case["noise_scaled"]), atol=1e-6)

    def gradients(self, name: str) -> None:
        hift, case = self.build(), self.recorded.arrays(name)
        wav = hift.decode(x=case["mel"], s=case["s"])
        loss = wav.square().mean()
        loss.backward()
        assert_close(wav, case["wav"], atol=self.wave)
        assert_close(loss, case["loss"], rtol=1e-4)
        gradients = {key: parameter.grad for key, parameter in hift.named_parameters()}
        names = self.recorded.meta(name)["grad_norm_names"]
        assert gradients.keys() == set(names)
        norms = [0.0 if gradients[key] is None else gradients[key].double().norm().item() for key in names]
        assert_close(torch.tensor(norms), case["grad_norm_values"], rtol=1e-3, atol=1e-8)
