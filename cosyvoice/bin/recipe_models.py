"""How the parts of the model are trained: steps, validation, optimisers."""

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from cosyvoice.bin import optimizers
from cosyvoice.hifigan.hifigan import HiFiGan, Losses
from cosyvoice.runtime.command import VALIDATION, seed_all
from cosyvoice.runtime.errors import InputError


class RecipeModel(pl.LightningModule):
    """What llm, flow and hifigan have in common.

    All random draws of a batch follow from (seed, epoch, number of the batch), where batches are numbered as one
    process that took them all would; so a resumed run repeats an uninterrupted one, and several processes one.
    """

    def __init__(self, part: nn.Module, train_conf: dict[str, Any], seed: int) -> None:
        """train_conf: as in the recipe's YAML; `grad_clip` and `accum_grad` are read here."""
        super().__init__()
        self.part, self.train_conf, self.seed = part, train_conf, seed
        self.accum_grad = train_conf.get("accum_grad", 1)
        self.batches_in_group = 0  # since the last optimiser step, this one included
        self.loss_sum, self.batches = 0.0, 0  # of the epoch so far
        self.validation_means: dict[str, float] = {}  # of the last validation

    @property
    def steps(self) -> int:
        """Optimiser steps so far; two optimisers step together."""
        return self.trainer.global_step // len(self.trainer.optimizers)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        seed_all(self.seed, self.current_epoch, batch_idx * self.trainer.world_size + self.global_rank)
        self.batches_in_group = batch_idx % self.accum_grad + 1

    def record(self, losses: dict[str, Tensor], clips: int) -> None:
        """Log the losses of a training batch."""
        self.loss_sum += float(losses["loss"])
        self.batches += 1
        rates = {f"lr_{i}": optimizer.param_groups[0]["lr"] for i, optimizer in enumerate(self.trainer.optimizers)}
        self.log_dict({f"TRAIN/{name}": value for name, value in (losses | rates).items()}, batch_size=clips)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients; a step whose gradient is not finite is left out."""
        if self.trainer.strategy.handles_gradient_accumulation:  # DeepSpeed keeps the gradients and clips by itself
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.batches_in_group < self.accum_grad:  # an epoch's last group, divided by more than it holds
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.accum_grad / self.batches_in_group)
        norm = clip_grad_norm_(parameters, self.train_conf["grad_clip"])
        self.log("TRAIN/grad_norm", norm)
        if not norm.isfinite():
            rank_zero_warn(f"step {self.steps + 1} is left out: its gradient is not finite")
            optimizer.zero_grad(set_to_none=True)  # without gradients the step changes nothing

    # Validation

    def validation_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`loss` and what else is worth watching, 0-d."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        self.validation_sums: Counter[str] = Counter()
        self.validation_clips = 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same draws for a batch in every epoch and process, in whatever order the workers bring it."""
        seed_all(self.seed, VALIDATION, zlib.crc32(repr(batch["utts"]).encode()))
        clips = len(batch["utts"])
        for name, value in self.validation_losses(batch).items():
            self.validation_sums[name] += float(value) * clips
        self.validation_clips += clips

    def on_validation_epoch_end(self) -> None:
        self.validation_means = {name: total / self.validation_clips for name, total in self.validation_sums.items()}
        # every process has seen all held-out clips: their mean is what each has
        self.log_dict({f"CV/{name}": value for name, value in self.validation_means.items()}, sync_dist=True)


class SpeechModel(RecipeModel):
    """Trains the llm or the flow by the `loss` that its `forward` gives, and by `loss_aligner` where that is there.

    The two stay apart, so that the logged `loss` of training and of held-out clips mean the same.
    """

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return `loss` and what else is logged, 0-d."""
        return self.part(batch, self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        self.record({name: value.detach() for name, value in losses.items()}, len(batch["utts"]))
        return losses["loss"] + losses.get("loss_aligner", 0.0)

    def validation_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.losses(batch)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, scheduler = optimizers.build(self.part.parameters(), self.train_conf)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class VocoderModel(RecipeModel):
    """Trains generator and, where there are any, discriminators of the vocoder in turn, on the same waveform."""

    automatic_optimization = False
    part: HiFiGan

    def __init__(self, part: HiFiGan, train_conf: dict[str, Any], seed: int) -> None:
        super().__init__(part, train_conf, seed)
        if self.accum_grad != 1:
            raise InputError(f"train_conf_gan: accum_grad {self.accum_grad} is not implemented; use 1, larger batches")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        sides, schedulers = self.optimizers(), self.lr_schedulers()
        if self.part.discriminator is None:  # the trainer hands out an only one as itself
            sides, schedulers = [sides], [schedulers]
        speech, pitch = batch["speech"], batch["pitch_feat"]
        generated, f0 = self.part.generate(batch, self.device)
        judged = {}
        if self.part.discriminator is not None:
            losses = self.turn(sides[1], lambda: self.part.discriminator_losses(speech, generated))
            judged["loss_disc"] = losses["loss_disc"]
        losses = self.turn(sides[0], lambda: self.part.generator_losses(speech, pitch, generated, f0))
        for scheduler in schedulers:
            scheduler.step()
        self.record(losses | judged, len(batch["utts"]))

    def turn(self, optimizer: LightningOptimizer, compute: Callable[[], Losses]) -> Losses:
        """One step of one side, while the other side's weights need no gradient; its losses."""
        self.toggle_optimizer(optimizer)
        losses = compute()
        self.manual_backward(losses["loss"])
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)
        return {name: value.detach() for name, value in losses.items()}

    def validation_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.part.forward_generator(batch, self.device)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        pairs = [optimizers.build(self.part.generator.parameters(), self.train_conf)]
        if self.part.discriminator is not None:
            pairs.append(optimizers.build(self.part.discriminator.parameters(), self.train_conf, suffix="_d"))
        return [optimizer for optimizer, _ in pairs], [scheduler for _, scheduler in pairs]
