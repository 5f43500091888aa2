"""Adversarial training of the vocoder."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.utils.errors import InputError
from cosyvoice.utils.losses import discriminator_loss, feature_loss, generator_loss, mel_loss, tpr_loss

Losses = dict[str, Tensor]  # `loss`, which is minimised, and its terms, all 0-d


class HiFiGan(nn.Module):
    """A generator from mel to waveform and pitch, its discriminators, and the losses of both.

    Generator: least-squares GAN + 45 mel distance + 2 feature matching (HiFi-GAN, Kong et al. 2020, section 2.4) +
    truncated relativistic loss + L1 distance of the pitch in Hz. The weights are keywords.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        mel_spec_transform: Sequence[Callable[[Tensor], Tensor]],
        multi_mel_spectral_recon_loss_weight: float = 45,
        feat_match_loss_weight: float = 2.0,
        tpr_loss_weight: float = 1.0,
        tpr_loss_tau: float = 0.04,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.mel_spec_transform = mel_spec_transform
        self.multi_mel_spectral_recon_loss_weight = multi_mel_spectral_recon_loss_weight
        self.feat_match_loss_weight = feat_match_loss_weight
        self.tpr_loss_weight = tpr_loss_weight
        self.tpr_loss_tau = tpr_loss_tau

    def forward(self, batch: dict[str, Any], device: Any) -> Losses:
        """The losses of one side: `batch["turn"]` is `generator` or `discriminator`.

        batch: `speech` (B, samples), `speech_feat` (B, T, 80) of the same samples, `pitch_feat` (B, T).
        """
        if batch["turn"] == "generator":
            return self.forward_generator(batch, device)
        if batch["turn"] == "discriminator":
            return self.forward_discriminator(batch, device)
        raise InputError(f"HiFiGan: turn {batch['turn']!r} is not known; use 'generator' or 'discriminator'")

    def forward_generator(self, batch: dict[str, Any], device: Any) -> Losses:
        generated, f0 = self.generator(batch, device)
        return self.generator_losses(batch["speech"].to(device), batch["pitch_feat"].to(device), generated, f0)

    def forward_discriminator(self, batch: dict[str, Any], device: Any) -> Losses:
        generated, _ = self.generator(batch, device)
        return self.discriminator_losses(batch["speech"].to(device), generated)

    def generator_losses(self, speech: Tensor, pitch: Tensor, generated: Tensor, f0: Tensor) -> Losses:
        """speech, generated: (B, samples). pitch, f0: (B, T) in Hz."""
        real, real_layers = zip(*self.discriminator(speech), strict=True)
        fake, fake_layers = zip(*self.discriminator(generated), strict=True)
        terms = {
            "loss_gen": generator_loss(fake),
            "loss_fm": feature_loss(real_layers, fake_layers),
            "loss_mel": mel_loss(speech, generated, self.mel_spec_transform),
            "loss_tpr": tpr_loss(fake, [scores.detach() for scores in real], self.tpr_loss_tau),
            "loss_f0": F.l1_loss(f0, pitch),
        }
        loss = (
            terms["loss_gen"]
            + self.feat_match_loss_weight * terms["loss_fm"]
            + self.multi_mel_spectral_recon_loss_weight * terms["loss_mel"]
            + self.tpr_loss_weight * terms["loss_tpr"]
            + terms["loss_f0"]
        )
        return {"loss": loss, **terms}

    def discriminator_losses(self, speech: Tensor, generated: Tensor) -> Losses:
        """speech, generated: (B, samples); the generator gets no gradient."""
        real, _ = zip(*self.discriminator(speech), strict=True)
        fake, _ = zip(*self.discriminator(generated.detach()), strict=True)
        terms = {"loss_disc": discriminator_loss(real, fake), "loss_tpr": tpr_loss(real, fake, self.tpr_loss_tau)}
        return {"loss": terms["loss_disc"] + self.tpr_loss_weight * terms["loss_tpr"], **terms}
