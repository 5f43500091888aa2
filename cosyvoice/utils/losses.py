"""The losses of adversarial vocoder training, over lists with an entry per discriminator, and the preference loss."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def discriminator_loss(real: Sequence[Tensor], generated: Sequence[Tensor]) -> Tensor:
    """Return the squared distances of real scores to 1 and generated ones to 0 (HiFi-GAN, Kong et al. 2020, eq. 3)."""
    return sum(((r - 1) ** 2).mean() + (g**2).mean() for r, g in zip(real, generated, strict=True))


def generator_loss(generated: Sequence[Tensor]) -> Tensor:
    """Return the squared distance of generated scores to 1 (HiFi-GAN, equation 4)."""
    return sum(((g - 1) ** 2).mean() for g in generated)


def feature_loss(real: Sequence[Sequence[Tensor]], generated: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the L1 distance of the discriminators' hidden layers, summed over layers (HiFi-GAN, equation 6)."""
    layers = [pair for maps in zip(real, generated, strict=True) for pair in zip(*maps, strict=True)]
    return sum(F.l1_loss(g, r.detach()) for r, g in layers)


def tpr_loss(better: Sequence[Tensor], worse: Sequence[Tensor], tau: float) -> Tensor:
    """Return the truncated pointwise relativistic least squares (Li and Wang 2022, "Improve GAN-based Neural Vocoder
    using Truncated Pointwise Relativistic Least Square GAN").

    For each discriminator, the better scores that exceed the worse ones by less than the median difference are pulled
    up to it. A discriminator's loss is at most `tau`.
    """

    def of_one(better: Tensor, worse: Tensor) -> Tensor:
        gap = better - worse
        margin = gap.median()
        short = gap < margin
        error = ((gap - margin).square() * short).sum() / short.sum().clamp(min=1)
        return tau - F.relu(tau - error)

    return sum(of_one(b, w) for b, w in zip(better, worse, strict=True))


def mel_loss(real: Tensor, generated: Tensor, mel_transforms: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Return the L1 distance of log-mels of waveforms (B, samples), summed over transforms (HiFi-GAN, equation 5)."""
    distances = [F.l1_loss(transform(generated), transform(real)) for transform in mel_transforms]
    return torch.stack(distances).sum()


def pitch_loss(real: Tensor, predicted: Tensor, floor: float | None) -> Tensor:
    """Return the L1 distance of pitch in Hz, which is 0 in unvoiced frames; with a floor, that of log(Hz + floor)."""
    if floor is None:
        return F.l1_loss(predicted, real)
    return F.l1_loss((predicted + floor).log(), (real + floor).log())


class DPOLoss(nn.Module):
    """Direct preference optimisation (Rafailov et al., 2023, equation 7).

    The policy should prefer the chosen over the rejected by more than the reference does. `label_smoothing` is the
    share of pairs that may be swapped (Mitchell, 2023). `ipo` is the squared form, whose best margin is finite (Azar et
    al., 2023, equation 17).
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss and the rewards (B,) of chosen and rejected, which carry no gradient.

        All arguments are log-probabilities (B,).
        """
        chosen = policy_chosen_logps - reference_chosen_logps
        rejected = policy_rejected_logps - reference_rejected_logps
        margin = chosen - rejected
        if self.ipo:
            losses = (margin - 1 / (2 * self.beta)) ** 2
        else:
            right, wrong = (-F.logsigmoid(sign * self.beta * margin) for sign in (1, -1))
            losses = (1 - self.label_smoothing) * right + self.label_smoothing * wrong
        return losses.mean(), self.beta * chosen.detach(), self.beta * rejected.detach()
