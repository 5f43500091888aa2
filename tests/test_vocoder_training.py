"""What teaches the vocoder: the pitch of recordings, the discriminators, and the losses."""

import math

import pytest
import torch
from models import tiny
from parity import PARITY_DIR
from torch import nn

from cosyvoice.dataset import processor
from cosyvoice.hifigan.discriminator import MultipleDiscriminator, MultiResSpecDiscriminator
from cosyvoice.hifigan.hifigan import HiFiGan
from cosyvoice.hifigan.spectral_loss import MEL_N_FFT, SpectralLoss, power
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils import losses
from cosyvoice.utils.scheduler import CosineLR
from matcha.hifigan.models import MultiPeriodDiscriminator

RATE_HZ, HOP = 22050, 256
FRAMES = 60


def test_the_pitch_of_a_tone_and_none_of_silence() -> None:
    """A tone with harmonics that rises from 120 to 180 Hz, then silence."""
    voiced = torch.arange(FRAMES * HOP) / (FRAMES * HOP)  # 0 to 1
    pitch = 120 + 60 * voiced
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / RATE_HZ
    tone = sum(0.2 / k * torch.sin(k * phase) for k in range(1, 6))
    speech = torch.cat([tone, torch.zeros(FRAMES * HOP)])[None]
    (sample,) = processor.compute_f0([{"speech": speech}], sample_rate=RATE_HZ, hop_size=HOP)
    found = sample["pitch_feat"]
    assert found.shape == (2 * FRAMES,) and found.dtype == torch.float32
    at_the_middle = pitch.view(FRAMES, HOP).mean(dim=1)
    inside = slice(5, FRAMES - 5)
    torch.testing.assert_close(found[inside], at_the_middle[inside], rtol=0.02, atol=0)
    assert (found[FRAMES + 5 :] == 0).all()


def discriminator() -> MultipleDiscriminator:
    mrd = MultiResSpecDiscriminator(fft_sizes=[128, 64], hop_sizes=[16, 8], win_lengths=[96, 48], channels=3)
    return MultipleDiscriminator(MultiPeriodDiscriminator(periods=(2, 3), channels=(2, 3, 4)), mrd)


def test_discriminators_give_scores_and_layers() -> None:
    scored = discriminator()(torch.randn(2, 500))
    assert [len(layers) for _, layers in scored] == [4, 4, 6, 6]
    for scores, layers in scored:
        assert torch.equal(scores, layers[-1].flatten(1)) and len(scores) == 2
    default = MultiPeriodDiscriminator()
    assert [judge.period for judge in default.discriminators] == [2, 3, 5, 7, 11]
    with pytest.raises(InputError, match="window 'hamming'"):
        MultiResSpecDiscriminator(window="hamming")


def test_a_period_discriminator_sees_columns_of_one_phase() -> None:
    """Without kernels across columns, a change at one phase of the period moves scores of that phase only."""
    judge = MultiPeriodDiscriminator(periods=(4,), channels=(2, 2))
    speech = torch.randn(1, 64)
    changed = speech.clone()
    changed[0, 2::4] += 1
    before, after = (judge(wave)[0][0].view(-1, 4) for wave in (speech, changed))
    assert torch.equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]]) and not torch.equal(before[:, 2], after[:, 2])


def test_losses_in_closed_form() -> None:
    real, fake = [torch.tensor([[1.0, 0.5]])], [torch.tensor([[0.0, 0.5]])]
    assert losses.discriminator_loss(real, fake) == pytest.approx(0.125 + 0.125)
    assert losses.generator_loss(fake) == pytest.approx(0.625)
    assert losses.feature_loss([real, real], [fake, real]) == pytest.approx(0.5)
    double = [lambda speech: speech, lambda speech: 2 * speech]
    assert losses.mel_loss(real[0], fake[0], double) == pytest.approx(0.5 + 1.0)


def test_the_relativistic_loss_counts_what_falls_short_of_the_median() -> None:
    better, worse = [torch.tensor([[0.2, 0.1, 0.0]])], [torch.tensor([[0.0, 0.0, 0.0]])]  # gaps .2, .1, 0; median .1
    assert losses.tpr_loss(better, worse, tau=0.04) == pytest.approx(0.01)
    assert losses.tpr_loss(better, worse, tau=0.004) == pytest.approx(0.004)  # truncated
    assert losses.tpr_loss(worse, worse, tau=0.04) == 0


class Generator(nn.Module):
    """Echoes a learnt multiple of the speech, with a learnt pitch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.pitch = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(90.0))

    def forward(self, batch: dict, device: str, pitch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gain * batch["speech"], self.pitch.expand_as(batch["pitch_feat"])


def test_each_side_learns_from_its_own_turn() -> None:
    torch.manual_seed(0)
    model = HiFiGan(Generator(), discriminator(), [lambda speech: speech.abs()])
    batch = {"speech": torch.randn(2, 500), "pitch_feat": torch.full((2, 3), 100.0)}
    found = model(batch | {"turn": "generator"}, "cpu")
    terms = {name: value.item() for name, value in found.items()}
    weighted = terms["loss_gen"] + 2 * terms["loss_fm"] + 45 * terms["loss_mel"] + terms["loss_tpr"] + terms["loss_f0"]
    assert terms["loss"] == pytest.approx(weighted) and terms["loss_f0"] == pytest.approx(10.0)
    found["loss"].backward()
    assert model.generator.gain.grad < 0 and model.generator.pitch.grad == -1  # up, towards speech and pitch
    model.zero_grad()
    model(batch | {"turn": "discriminator"}, "cpu")["loss"].backward()
    assert model.generator.gain.grad is None
    assert all(parameter.grad is not None for parameter in model.discriminator.parameters())
    with pytest.raises(InputError, match="turn 'both'"):
        model(batch | {"turn": "both"}, "cpu")


def test_a_head_far_too_loud_still_has_a_gradient() -> None:
    """exp() of 1000 is infinite, and infinity times the clamp's zero is no number."""
    torch.manual_seed(0)
    hift = tiny("hift").train()
    with torch.no_grad():
        hift.conv_post.bias.fill_(1000.0)
    speech = hift.decode(torch.randn(1, 80, 4), torch.zeros(1, 1, 4 * 256))
    speech.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in hift.parameters() if parameter.grad is not None)


def test_without_discriminators_spectra_alone_teach() -> None:
    torch.manual_seed(0)
    model = HiFiGan(Generator(), None, [], spectral_loss=SpectralLoss(RATE_HZ), pitch_loss_floor=20.0)
    batch = {"speech": torch.randn(2, 4096), "pitch_feat": torch.tensor([[100.0, 0.0]])}
    found = model(batch | {"turn": "generator"}, "cpu")
    assert found.keys() == {"loss", "loss_spectral", "loss_f0"}
    assert torch.equal(found["loss"], found["loss_f0"] + found["loss_spectral"])
    assert found["loss_f0"].item() == pytest.approx((math.log(120 / 110) + math.log(110 / 20)) / 2)
    found["loss"].backward()
    assert model.generator.gain.grad < 0  # up, to the level of the speech
    with pytest.raises(InputError, match="turn 'discriminator'"):
        model(batch | {"turn": "discriminator"}, "cpu")


def test_the_spectral_loss_is_zero_at_the_truth_and_hears_level_and_colour() -> None:
    torch.manual_seed(0)
    speech = 0.1 * torch.randn(2, 8192)
    loss = SpectralLoss(RATE_HZ)
    assert loss(speech, speech) == 0
    louder = loss.timbre_distance(speech, 1.5 * speech)
    assert louder == pytest.approx(0.5, abs=0.01)  # relative amplitude
    mel_distance = loss.mel_distance(power(speech, MEL_N_FFT), power(1.5 * speech, MEL_N_FFT))
    assert mel_distance == pytest.approx(math.log(1.5), abs=0.02)
    assert loss(speech, speech.roll(1, dims=1)) < loss(speech, 1.5 * speech)  # phase is free


def test_the_source_may_follow_the_true_pitch() -> None:
    torch.manual_seed(0)
    hift = tiny("hift")
    heard = []
    hift.m_source.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    batch = {"speech_feat": torch.randn(1, 4, 80), "pitch_feat": torch.tensor([[100.0, 110.0, 0.0, 120.0]])}
    for true_pitch in (False, True):
        _, predicted = HiFiGan(hift, None, [], true_pitch=true_pitch).generate(batch, "cpu")
    per_frame = [pitch[0, 0, ::256] for pitch in heard]
    assert torch.equal(per_frame[0], predicted[0]) and torch.equal(per_frame[1], batch["pitch_feat"][0])


def test_a_new_vocoder_is_quiet_and_hears_its_source() -> None:
    torch.manual_seed(0)
    hift = load_model_yaml(PARITY_DIR / "tiny.yaml", parts=("hift",))["hift"]
    mel, pitch = torch.randn(1, 80, 20), torch.full((1, 20), 200.0)
    hift.eval()
    with torch.no_grad():
        speech = hift.decode(mel, hift._source(pitch))
        other = hift.decode(mel, hift._source(1.5 * pitch))
    assert speech.abs().max() < 0.5
    assert (speech - other).square().mean() > 1e-4 * speech.square().mean()


def test_equalize_colours_for_training_only() -> None:
    torch.manual_seed(0)
    noise = 0.05 * torch.randn(1, 8192)
    (same,) = processor.equalize([{"speech": noise}], sample_rate=RATE_HZ, mode="dev")
    assert same["speech"] is noise
    (coloured,) = processor.equalize([{"speech": noise}], sample_rate=RATE_HZ, bands=4)
    assert coloured["speech"].shape == noise.shape
    gain = 20 * (torch.fft.rfft(coloured["speech"]).abs() / torch.fft.rfft(noise).abs()).log10()
    assert gain.std() > 0.3 and gain.diff().abs().max() < 1  # dB; a curve without jumps
    (flat,) = processor.equalize([{"speech": noise}], sample_rate=RATE_HZ, spread_db=0.0)
    torch.testing.assert_close(flat["speech"], noise, atol=1e-6, rtol=0)


def test_the_cosine_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = CosineLR(optimizer, total_steps=10, warmup_steps=2, end=0.1)
    rates = []
    for _ in range(14):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half way
    assert rates[10:] == pytest.approx([0.2] * 4)
