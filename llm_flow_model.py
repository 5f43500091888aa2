"""The joint model: LoRA adapters in LLM and Flow, their losses, and the hooks of the trainer."""

import math
import random
import statistics
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import CHECKPOINT_KEY
from cosyvoice.flow.token_flow import MAX_PREFIX_SHARE
from cosyvoice.llm.qwen2_encoder import Qwen2Encoder
from cosyvoice.runtime.command import VALIDATION, seed_all
from cosyvoice.runtime.errors import InputError
from cosyvoice.runtime.processes import all_in_turn, mean_of_all
from cosyvoice.transformer.encoder_layer import EncoderLayer
from cosyvoice.utils.scheduler import learning_rate_factor
from dataset import crop_windows
from lora import adapter_state, adapters, inject, load_adapters
from matcha.models.components.decoder import ResnetBlock1D
from matcha.models.components.transformer import BasicTransformerBlock
from voices.progress import PartProgress
from voices.run_state import Origin, RunState

RECOMPUTED = (EncoderLayer, ResnetBlock1D, BasicTransformerBlock)  # what LLM and Flow consist of, except Qwen2
DIVERGED = "training stopped, the last good checkpoint is kept; lower --lr, or use --set precision=32-true"
FLOW_DRAWS = 8  # of time, noise and window for each held-out clip


def trainable_share(module: nn.Module) -> tuple[int, float]:
    """Trainable parameters and their share of all."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, trainable / sum(p.numel() for p in module.parameters())


class JointModel(pl.LightningModule):
    """Trains the adapters of `llm`, `flow` or both; every base weight stays frozen and its dropout off.

    All random draws of a batch follow from (seed, epoch, number of the batch), where batches are numbered as one device
    that took them all would; so a resumed run repeats an uninterrupted one, and several devices one.
    Checkpoints hold adapters only, and `run_state`.
    """

    strict_loading = False  # base weights are not in our checkpoints; `on_load_checkpoint` checks the names instead

    def __init__(
        self, parts: dict[str, nn.Module], config: dict[str, Any], seed: int, embedding: Tensor, origin: Origin
    ) -> None:
        """parts: `llm` and/or `flow`. embedding: (192,), the speaker vector of training and inference.

        origin: where the run comes from, for its checkpoints.
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
        if "llm" in parts and "bistream_ratio" in config:
            parts["llm"].bistream_share = config["bistream_ratio"]
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

    def losses(self, batch: dict[str, Tensor], names: list[str], times: Tensor | None = None) -> dict[str, Tensor]:
        """The unweighted losses of the named parts, averaged over the clips, and the LLM's accuracy, all 0-d.

        times: (B,), the flow times of the clips; random ones where they are not given.
        """
        embedding = self.training_embeddings(len(batch["text_token"]))
        result = {}
        if "llm" in names:
            clip_losses, accuracy = self.parts["llm"].clip_losses(batch | {"embedding": embedding}, self.device)
            result |= {"llm_loss": clip_losses.mean(), "llm_acc": accuracy}
        if "flow" in names:
            result["flow_loss"] = self.flow_loss(batch, embedding, times)
        return result

    def recomputed_blocks(self) -> list[nn.Module]:
        """Return the blocks that keep their input only, where the settings ask for that."""
        if not self.config["recompute"]:
            return []
        blocks = [block for block in self.parts.modules() if isinstance(block, RECOMPUTED)]
        stacks = [module for module in self.parts.modules() if isinstance(module, Qwen2Encoder)]
        return blocks + [layer for stack in stacks for layer in stack.layers]

    def training_embeddings(self, size: int) -> Tensor:
        """(B, 192): the speaker's vector, or zeros for a small share of the clips while training."""
        kept = torch.rand(size, 1) >= (self.config["zero_embedding_ratio"] if self.training else 0.0)
        return self.speaker_embedding.expand(size, -1) * kept.to(self.device)

    def flow_loss(
        self, batch: dict[str, Tensor], embedding: Tensor, times: Tensor | None = None, draw: int | None = None
    ) -> Tensor:
        """Return the mean over the clips' windows. draw: the number of the held-out clips' draw, None in training."""
        flow, loss = self.parts["flow"], torch.zeros((), device=self.device)
        options = flow.batch_options(draw)
        for clips, window in crop_windows(batch, self.config["max_feat_len"], flow):
            frames = window["speech_feat"].size(1)
            prompted = torch.rand(len(clips)) < self.config["flow_prompt_ratio"]
            longest = int(MAX_PREFIX_SHARE * frames)
            prefixes = [int(torch.randint(0, longest + 1, ())) if given else 0 for given in prompted]
            window_loss = flow.loss(
                window["speech_token"],
                window["speech_token_len"],
                window["speech_feat"],
                window["speech_feat_len"],
                embedding[clips],
                prefixes,
                None if times is None else times[clips],
                drops_conditions=self.training,
                **options,
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
        seed_all(self.seed, self.current_epoch, self.batch_number(batch_idx))

    def batch_number(self, batch_idx: int) -> int:
        """The batch's number within the epoch, of the batches of all devices, which take them in turn."""
        return batch_idx * self.trainer.world_size + self.global_rank

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        number, clips = self.batch_number(batch_idx), len(batch.get("text_token", ()))
        losses = self.losses(batch, self.active(), self.spread_times(clips, number)) if batch else self.no_losses()
        self.record(*mean_of_all(losses, clips))
        return self.total(losses) * self.group_share(clips, number)

    def no_losses(self) -> dict[str, Tensor]:
        """Return zeros, whose gradients are zeros, for a device that has no batch while others have one."""
        result = {}
        for name in self.active():
            trained = [weight.sum() for weight in self.parts[name].parameters() if weight.requires_grad]
            result[f"{name}_loss"] = 0.0 * torch.stack(trained).sum()
        if "llm" in self.active():
            result["llm_acc"] = torch.zeros((), device=self.device)
        return result

    def record(self, losses: dict[str, Tensor], clips: int) -> None:
        """Count and log the mean losses of a batch, or of the batches that the devices take at the same time."""
        for name in self.active():
            self.progress[name].add(self.finite(name, losses[f"{name}_loss"]), clips)
        self.log_dict(losses, on_step=True, on_epoch=True, batch_size=clips)
        self.log("train_loss", self.total(losses), on_step=True, on_epoch=True, prog_bar=True, batch_size=clips)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=clips)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses of the parts that train, 0-d."""
        return sum(self.config[f"{name}_loss_weight"] * losses[f"{name}_loss"] for name in self.active())

    def spread_times(self, clips: int, number: int) -> Tensor:
        """(B,): flow times that lie evenly over an optimiser step's clips (Kingma et al. 2021, appendix I.1).

        Each is as likely to be any time from 0 to 1, but together they say more than random ones.
        """
        step, before = divmod(number, self.config["accumulate_grad_batches"])
        whole = self.config["batch_size"]
        places = torch.arange(before * whole, before * whole + clips) / (whole * self.config["accumulate_grad_batches"])
        offset = random.Random(f"{self.seed} {self.current_epoch} {step}").random()
        return (places + offset) % 1

    def finite(self, name: str, loss: Tensor) -> float:
        """The value of a 0-d loss. Raises InputError, before anything is saved, where it is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"the {name} loss became {value} in epoch {self.epoch_number}: {DIVERGED}")
        return value

    def group_share(self, clips: int, number: int) -> float:
        """What makes each clip of an optimiser step count the same, also where an epoch's last batches are smaller.

        The trainer divides the sum of the batches' means by the number of batches in a whole group, of one device; the
        sums of all devices are added.
        """
        passes, whole = self.config["accumulate_grad_batches"], self.config["batch_size"]
        before = number // passes * passes * whole  # clips of the epoch's earlier steps
        clips_of_step = min(passes * whole, len(self.trainer.train_dataloader.dataset) - before)
        return clips * self.trainer.accumulate_grad_batches / clips_of_step

    def on_validation_start(self) -> None:
        self.held_out: list[dict[str, Tensor]] = []  # by batch

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same draws in every epoch, so that epochs can be compared."""
        if not batch:
            return
        seed_all(self.seed, VALIDATION, self.batch_number(batch_idx))
        clips = len(batch["text_token"])
        embedding = self.training_embeddings(clips)
        found = {"clips": torch.tensor(clips)}
        if "llm" in self.active():
            batch = batch | {"embedding": embedding}
            found["llm"], found["llm_acc"] = self.parts["llm"].clip_losses(batch, self.device)
        if "flow" in self.active():
            places = torch.arange(clips) / FLOW_DRAWS
            times = [(places + (draw + torch.rand(clips)) / FLOW_DRAWS) % 1 for draw in range(FLOW_DRAWS)]
            draws = enumerate(times)
            found["flow"] = torch.stack([self.flow_loss(batch, embedding, of_draw, draw) for draw, of_draw in draws])
        self.held_out.append(found)

    def on_validation_epoch_end(self) -> None:
        """Put the figures of all devices' batches together, in the order of the batches, and log them."""
        own = [{name: value.cpu() for name, value in found.items()} for found in self.held_out]
        self.held_out = all_in_turn(own)
        for name in self.active():
            self.log(f"val_{name}_loss", statistics.fmean(self.held_out_losses(name)))
        if "llm" in self.active():
            right = sum(found["llm_acc"] * found["clips"] for found in self.held_out)
            self.log("val_llm_acc", right / self.held_out_clips())

    def held_out_clips(self) -> int:
        return sum(int(found["clips"]) for found in self.held_out)

    def held_out_losses(self, name: str) -> list[float]:
        """Of each clip (LLM), or of each draw and all clips together (Flow); empty where nothing is held out."""
        if not self.trainer.num_val_batches or not sum(self.trainer.num_val_batches):
            return []
        if name == "llm":
            losses = torch.cat([found["llm"] for found in self.held_out])
        else:
            sums = torch.stack([found["flow"] * found["clips"] for found in self.held_out]).sum(dim=0)
            losses = sums / self.held_out_clips()
        self.finite(name, losses.mean())
        return losses.tolist()

    def on_train_epoch_end(self) -> None:
        for name in self.active():
            self.judge(name, self.held_out_losses(name))
        if not self.active():
            self.trainer.should_stop = True

    def judge(self, name: str, held_out: list[float]) -> None:
        """End a part's epoch: keep its adapters if it is the best so far, and freeze them if the part stops."""
        progress, config = self.progress[name], self.config
        threshold, patience = config[f"{name}_loss_threshold"], config["early_stopping_patience"]
        if progress.end_epoch(self.epoch_number, held_out, threshold, patience):
            progress.best = adapter_state(self.parts[name])
        if progress.stopped:
            self.parts[name].requires_grad_(False)

    def combined_loss(self) -> float:
        """Return the weighted sum of every part's last judged loss, which ranks checkpoints."""
        last = {name: progress.history[-1].judged for name, progress in self.progress.items()}
        return sum(self.config[f"{name}_loss_weight"] * loss for name, loss in last.items())

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
        checkpoint[CHECKPOINT_KEY] = self.run_state().content()

    def run_state(self) -> RunState:
        """Return what a resumed run and a voice need beside the adapters."""
        return RunState(
            origin=self.origin,
            config=self.config,
            seed=self.seed,
            embedding=self.speaker_embedding.cpu().clone(),
            epochs=max(len(progress.history) for progress in self.progress.values()),
            batches_done=self.batches_done,
            progress=self.progress,
        )

    def go_on_from(self, state: RunState) -> None:
        """Take over how far a run has come; the trainer loads its adapters."""
        self.batches_done, self.progress = state.batches_done, state.progress
        for name, progress in self.progress.items():
            if progress.stopped:
                self.parts[name].requires_grad_(False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_adapters(self, checkpoint["state_dict"])
