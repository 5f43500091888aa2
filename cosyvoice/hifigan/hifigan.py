"""Adversarial training of the vocoder."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.losses import discriminator_loss, feature_loss, generator_loss, mel_loss, pitch_loss, tpr_loss

Losses = dict[str, Tensor]  # `loss`, which is minimised, and its terms, all 0-d


class HiFiGan(nn.Module):
    """A generator from mel to waveform and pitch, its discriminators, and the losses of both.

    The generator's loss is least-squares GAN + 45 mel distance + 2 feature matching (HiFi-GAN, Kong et al. 2020,
    section 2.4) + truncated relativistic loss + L1 distance of the pitch in Hz. The weights are keywords.

    A small vocoder, which cannot afford adversarial training, uses these options:
    discriminator: None trains with spectral distances alone.
    spectral_loss: another distance of (real, generated) waveforms, with the weight 1.
    pitch_loss_floor: pitch is compared as log(Hz + floor), so that low voices count as much as high ones.
    true_pitch: in training the source follows the recording's pitch, not the predicted one.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module | None,
        mel_spec_transform: Sequence[Callable[[Tensor], Tensor]],
        multi_mel_spectral_recon_loss_weight: float = 45,
        feat_match_loss_weight: float = 2.0,
        tpr_loss_weight: float = 1.0,
        tpr_loss_tau: float = 0.04,
        spectral_loss: nn.Module | None = None,
        pitch_loss_floor: float | None = None,
        true_pitch: bool = False,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.mel_spec_transform = mel_spec_transform
        self.multi_mel_spectral_recon_loss_weight = multi_mel_spectral_recon_loss_weight
        self.feat_match_loss_weight = feat_match_loss_weight
        self.tpr_loss_weight = tpr_loss_weight
        self.tpr_loss_tau = tpr_loss_tau
        self.spectral_loss = spectral_loss
        self.pitch_loss_floor = pitch_loss_floor
        self.true_pitch = true_pitch

    def forward(self, batch: dict[str, Any], device: Any) -> Losses:
        """Return the losses of the generator or the discriminator, whichever `batch["turn"]` names.

        batch: `speech` (B, samples), `speech_feat` (B, T, 80) of the same samples, `pitch_feat` (B, T).
        """
        if batch["turn"] == "generator":
            return self.forward_generator(batch, device)
        if batch["turn"] == "discriminator" and self.discriminator is not None:
            return self.forward_discriminator(batch, device)
        raise InputError(f"HiFiGan has no turn {batch['turn']!r}; use 'generator', or 'discriminator' if it has one")

    def forward_generator(self, batch: dict[str, Any], device: Any) -> Losses:
        generated, f0 = self.generate(batch, device)
        return self.generator_losses(batch["speech"].to(device), batch["pitch_feat"].to(device), generated, f0)

    def forward_discriminator(self, batch: dict[str, Any], device: Any) -> Losses:
        generated, _ = self.generate(batch, device)
        return self.discriminator_losses(batch["speech"].to(device), generated)

    def generate(self, batch: dict[str, Any], device: Any) -> tuple[Tensor, Tensor]:
        """Return the generator's waveform (B, samples) and predicted pitch (B, T) in Hz."""
        return self.generator(batch, device, batch["pitch_feat"] if self.true_pitch else None)

    def generator_losses(self, speech: Tensor, pitch: Tensor, generated: Tensor, f0: Tensor) -> Losses:
        """Return the generator's losses. speech, generated: (B, samples). pitch, f0: (B, T) in Hz."""
        terms = {"loss_f0": pitch_loss(pitch, f0, self.pitch_loss_floor)}
        weights = {"loss_mel": self.multi_mel_spectral_recon_loss_weight}
        if self.mel_spec_transform:
            terms["loss_mel"] = mel_loss(speech, generated, self.mel_spec_transform)
        if self.spectral_loss is not None:
            terms["loss_spectral"] = self.spectral_loss(speech, generated)
        if self.discriminator is not None:
            real, real_layers = zip(*self.discriminator(speech), strict=True)
            fake, fake_layers = zip(*self.discriminator(generated), strict=True)
            terms["loss_gen"] = generator_loss(fake)
            terms["loss_fm"] = feature_loss(real_layers, fake_layers)
            terms["loss_tpr"] = tpr_loss(fake, [scores.detach() for scores in real], self.tpr_loss_tau)
            weights |= {"loss_fm": self.feat_match_loss_weight, "loss_tpr": self.tpr_loss_weight}
        return {"loss": sum(weights.get(name, 1.0) * term for name, term in terms.items()), **terms}

    def discriminator_losses(self, speech: Tensor, generated: Tensor) -> Losses:
        """Return the discriminators' losses, which have no gradient for the generator.

        speech, generated: (B, samples).
        """
        real, _ = zip(*self.discriminator(speech), strict=True)
        fake, _ = zip(*self.discriminator(generated.detach()), strict=True)
        terms = {"loss_disc": discriminator_loss(real, fake), "loss_tpr": tpr_loss(real, fake, self.tpr_loss_tau)}
        return {"loss": terms["loss_disc"] + self.tpr_loss_weight * terms["loss_tpr"], **terms}
