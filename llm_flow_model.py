"""The joint model: LoRA adapters in LLM and Flow, their losses, and when each of the two has learned enough."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosyvoice.flow.flow import MAX_PREFIX_SHARE
from cosyvoice.transformer.encoder_layer import EncoderLayer
from cosyvoice.utils.command import VALIDATION, seed_all
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.scheduler import learning_rate_factor
from dataset import crop_windows
from lora import adapter_state, adapters, inject, load_adapters
from matcha.models.components.decoder import ResnetBlock1D
from matcha.models.components.transformer import BasicTransformerBlock
from voice import CHECKPOINT_KEY

RECOMPUTED = (EncoderLayer, ResnetBlock1D, BasicTransformerBlock)  # what LLM and Flow consist of
RECOMPUTING_SHARE = 4  # what a block takes while its gradients are computed, over what it saves for them; measured
DIVERGED = "training stopped, the last good checkpoint is kept; lower --lr, or use --set precision=32-true"
HALF_TYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


@dataclass
class PartProgress:
    """How far the training of one part has come. `best` holds the adapters of the best epoch."""

    best_loss: float = math.inf
    best_epoch: int = 0
    epochs_without_gain: int = 0
    stopped: str = ""  # why, once it has
    loss_sum: float = 0.0  # over the clips of the epoch so far
    clips: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # one entry an epoch
    best: dict[str, Tensor] = field(default_factory=dict)


def trainable_share(module: nn.Module) -> tuple[int, float]:
    """Trainable parameters and their share of all."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, trainable / sum(p.numel() for p in module.parameters())


def saved_bytes(compute: Callable[[], Any], weights: set[int]) -> int:
    """Of all tensors that `compute` saves for its gradients, but for the weights, given by their places in memory."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(size for place, size in kept.items() if place not in weights)


class JointModel(pl.LightningModule):
    """Trains the adapters of `llm`, `flow` or both; every base weight stays frozen and its dropout off.

    All random draws of a batch follow from (seed, epoch, batch), so a resumed run repeats an uninterrupted one.
    Checkpoints hold adapters only, and what `voice_state` adds.
    """

    strict_loading = False  # base weights are not in our checkpoints; `on_load_checkpoint` checks the names instead

    def __init__(
        self, parts: dict[str, nn.Module], config: dict[str, Any], seed: int, embedding: Tensor, origin: dict[str, Any]
    ) -> None:
        """parts: `llm` and/or `flow`. embedding: (192,), the speaker vector of training and inference.

        origin: what checkpoints shall tell of where they come from (mode, speaker, base and data fingerprints).
        """
        super().__init__()
        self.config, self.seed, self.origin = config, seed, origin
        self.parts = nn.ModuleDict(parts)
        self.batches_done = 0  # of the current epoch, where a checkpoint is written inside one
        self.register_buffer("speaker_embedding", embedding, persistent=False)
        self.progress = {name: PartProgress() for name in parts}
        for name, part in parts.items():
            lora = config[f"{name}_lora"]
            inject(part, lora["target_modules"], lora["lora_r"], lora["lora_alpha"], lora["lora_dropout"])
        for block in self.recomputed_blocks():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def train(self, mode: bool = True) -> "JointModel":
        """Only the adapters' dropout is ever on."""
        super().train(False)
        self.training = mode
        for name in self.active() if mode else ():
            for layer in adapters(self.parts[name]):
                layer.dropout.train()
        return self

    def keep_base_in(self, dtype: torch.dtype) -> None:
        """Keep the frozen weights of linear, convolution and embedding layers in a smaller type; adapters stay."""
        for layer in self.parts.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.Embedding)):
                for name in ("weight", "bias"):
                    parameter = getattr(layer, name, None)
                    if parameter is not None:
                        parameter.data = parameter.data.to(dtype)

    def active(self) -> list[str]:
        """The parts that still train."""
        return [name for name, progress in self.progress.items() if not progress.stopped]

    @property
    def epoch_number(self) -> int:
        """The current epoch, counted from 1."""
        return self.current_epoch + 1

    # Losses

    def losses(self, batch: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """The unweighted losses of the named parts, averaged over the clips, and the LLM's accuracy, all 0-d."""
        embedding = self.training_embeddings(len(batch["text_token"]))
        result = {}
        if "llm" in names:
            clip_losses, accuracy = self.parts["llm"].clip_losses(batch | {"embedding": embedding}, self.device)
            result |= {"llm_loss": clip_losses.mean(), "llm_acc": accuracy}
        if "flow" in names:
            result["flow_loss"] = self.flow_loss(batch, embedding)
        return result

    def kept_bytes(self, batch: dict[str, Tensor]) -> int:
        """Bytes that training on `batch` keeps until its gradients are there, beside the weights.

        Where blocks are computed again, also what the largest one takes in the meantime.
        """
        weights = {weight.untyped_storage().data_ptr() for weight in self.parameters()}
        passing = [0]

        def measure(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            passing.append(saved_bytes(lambda: block.forward.args[0](*inputs, **named), weights))

        hooks = [block.register_forward_pre_hook(measure, with_kwargs=True) for block in self.recomputed_blocks()]
        kept = saved_bytes(lambda: self.losses(batch, self.active()), weights)
        for hook in hooks:
            hook.remove()
        return kept + RECOMPUTING_SHARE * max(passing)

    def recomputed_blocks(self) -> list[nn.Module]:
        return [block for block in self.parts.modules() if self.config["recompute"] and isinstance(block, RECOMPUTED)]

    def training_embeddings(self, size: int) -> Tensor:
        """(B, 192): the speaker's vector, or zeros for a small share of the clips while training."""
        kept = torch.rand(size, 1) >= (self.config["zero_embedding_ratio"] if self.training else 0.0)
        return self.speaker_embedding.expand(size, -1) * kept.to(self.device)

    def flow_loss(self, batch: dict[str, Tensor], embedding: Tensor) -> Tensor:
        loss = torch.zeros((), device=self.device)
        for clips, window in crop_windows(batch, self.config["max_feat_len"]):
            frames = window["speech_feat"].size(1)
            prompted = torch.rand(len(clips)) < self.config["flow_prompt_ratio"]
            longest = int(MAX_PREFIX_SHARE * frames)
            prefixes = [int(torch.randint(0, longest + 1, ())) if given else 0 for given in prompted]
            window_loss = self.parts["flow"].loss(
                window["speech_token"],
                window["speech_token_len"],
                window["speech_feat"],
                window["speech_feat_len"],
                embedding[clips],
                prefixes,
            )
            loss = loss + window_loss * len(clips) / len(embedding)
        return loss

    # Steps

    def on_train_start(self) -> None:
        """A resumed run goes on at its place in the schedule, which may be longer now than when it ended."""
        schedule = self.lr_schedulers()
        for group, factor in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["lr"] = self.config["learning_rate"] * factor(schedule.last_epoch)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        seed_all(self.seed, self.current_epoch, batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        clips = len(batch["text_token"])
        losses = self.losses(batch, self.active())
        total = sum(self.config[f"{name}_loss_weight"] * losses[f"{name}_loss"] for name in self.active())
        for name in self.active():
            self.progress[name].loss_sum += self.finite(name, losses[f"{name}_loss"]) * clips
            self.progress[name].clips += clips
        self.log_dict(losses, on_step=True, on_epoch=True, batch_size=clips)
        self.log("train_loss", total, on_step=True, on_epoch=True, prog_bar=True, batch_size=clips)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=clips)
        return total * self.group_share(clips, batch_idx)

    def finite(self, name: str, loss: Tensor) -> float:
        """The value of a 0-d loss. Raises InputError, before anything is saved, where it is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"the {name} loss became {value} in epoch {self.epoch_number}: {DIVERGED}")
        return value

    def group_share(self, clips: int, batch_idx: int) -> float:
        """What makes each clip of an optimiser step count the same, also where an epoch's last batches are smaller.

        The trainer divides the sum of the batches' means by the number of batches in a whole group.
        """
        passes, whole = self.config["accumulate_grad_batches"], self.config["batch_size"]
        before = batch_idx // passes * passes * whole  # clips of the epoch's earlier steps
        return clips * passes / min(passes * whole, len(self.trainer.train_dataloader.dataset) - before)

    def on_validation_start(self) -> None:
        self.validation_sums = dict.fromkeys(self.active(), 0.0)
        self.validation_clips = 0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same draws in every epoch, so that epochs can be compared."""
        seed_all(self.seed, VALIDATION, batch_idx)
        clips = len(batch["text_token"])
        losses = self.losses(batch, self.active())
        for name in self.active():
            self.validation_sums[name] += self.finite(name, losses[f"{name}_loss"]) * clips
        self.validation_clips += clips
        self.log_dict({f"val_{key}": value for key, value in losses.items()}, batch_size=clips)

    def on_train_epoch_end(self) -> None:
        """Judge every part by its held-out loss (by its training loss where nothing is held out)."""
        for name in self.active():
            progress = self.progress[name]
            entry = {"epoch": self.epoch_number, "train": progress.loss_sum / progress.clips}
            if self.trainer.num_val_batches and sum(self.trainer.num_val_batches):
                entry["val"] = self.validation_sums[name] / self.validation_clips
            progress.history.append(entry)
            progress.loss_sum, progress.clips = 0.0, 0
            self.judge(name, entry)
        if not self.active():
            self.trainer.should_stop = True

    def judge(self, name: str, entry: dict[str, float]) -> None:
        progress = self.progress[name]
        loss = entry.get("val", entry["train"])
        if loss < progress.best_loss:
            progress.best_loss, progress.best_epoch, progress.epochs_without_gain = loss, entry["epoch"], 0
            progress.best = adapter_state(self.parts[name])
        else:
            progress.epochs_without_gain += 1
        threshold = self.config[f"{name}_loss_threshold"]
        patience = self.config["early_stopping_patience"]
        if entry["train"] <= threshold:
            self.stop(name, f"its training loss {entry['train']:.3f} reached the threshold {threshold:g}")
        elif progress.epochs_without_gain >= patience:
            self.stop(name, f"no better loss for {patience} epochs")

    def stop(self, name: str, reason: str) -> None:
        """Freeze one part where it is; the other goes on."""
        self.progress[name].stopped = reason
        self.parts[name].requires_grad_(False)

    def combined_loss(self) -> float:
        """The weighted sum of every part's last judged loss; it ranks checkpoints."""
        last = {name: progress.history[-1] for name, progress in self.progress.items()}
        weights = {name: self.config[f"{name}_loss_weight"] for name in last}
        return sum(weights[name] * entry.get("val", entry["train"]) for name, entry in last.items())

    # Optimiser

    def configure_optimizers(self) -> dict[str, Any]:
        # of stopped parts, too: a resumed run has frozen them already, and the optimiser's state is that of all
        trained = [parameter for layer in adapters(self) for parameter in (layer.lora_A, layer.lora_B)]
        optimizer = torch.optim.AdamW(
            trained, lr=self.config["learning_rate"], weight_decay=self.config["weight_decay"]
        )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.config["warmup_ratio"] * total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = adapter_state(self)
        if not all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values()):
            raise InputError(f"the adapters are no longer finite in epoch {self.epoch_number}: {DIVERGED}")
        checkpoint[CHECKPOINT_KEY] = self.voice_state()

    def voice_state(self) -> dict[str, Any]:
        """What a voice needs beside the adapters, in plain types and tensors."""
        return {
            **self.origin,
            "config": self.config,
            "seed": self.seed,
            "embedding": self.speaker_embedding.cpu().clone(),
            "epochs": max(len(progress.history) for progress in self.progress.values()),
            "batches_done": self.batches_done,
            "progress": {name: dict(vars(progress)) for name, progress in self.progress.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_adapters(self, checkpoint["state_dict"])
        for name, state in checkpoint[CHECKPOINT_KEY]["progress"].items():
            self.progress[name] = PartProgress(**state)
            if self.progress[name].stopped:
                self.parts[name].requires_grad_(False)
