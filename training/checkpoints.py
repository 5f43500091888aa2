"""Which checkpoints a run leaves, and how it stops."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from cosyvoice.runtime.processes import somewhere
from cosyvoice.utils.file_utils import atomic_write, copy_file
from llm_flow_model import JointModel
from voices.run import last_checkpoint

KEPT_CHECKPOINTS = 3


class Interrupted(Exception):
    """Training was stopped by Ctrl-C, with everything saved."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped; {checkpoint} is complete")


class CheckpointKeeper(Checkpoint):
    """Writes the last checkpoint after every epoch, keeps the best few beside it, and stops cleanly when asked to.

    Checkpoints are written between optimiser steps only, where a resumed run can repeat an uninterrupted one. Where
    several processes train together, the first one writes.
    """

    def __init__(self, output_dir: Path, mode: str, fresh: bool, batches: int) -> None:
        """fresh: this is a new run, or one that goes on from another checkpoint than the last in the folder.

        Its first checkpoint then replaces that and the epochs from there on. batches: of an epoch, on this device.
        """
        self.output_dir, self.mode, self.fresh, self.batches = output_dir, mode, fresh, batches
        self.last = last_checkpoint(output_dir, mode)
        self.interrupted = False

    def on_train_start(self, trainer: pl.Trainer, model: JointModel) -> None:
        """Make up for a run that was killed while it kept an epoch: copy that epoch."""
        if not trainer.is_global_zero:
            return
        epochs_done = max(len(progress.history) for progress in model.progress.values())
        if not self.fresh and not model.batches_done and all(epoch < epochs_done for _, epoch, _ in self.kept()):
            self.keep_epoch(model, epochs_done)

    def on_load_checkpoint(self, trainer: pl.Trainer, model: JointModel, checkpoint: dict[str, Any]) -> None:
        """Let the trainer go on where these devices would be, whose batches it counts: there may have been others."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = model.batches_done // trainer.world_size or self.batches
        change = done - progress["current"]["ready"]
        for counts in (progress["current"], progress["total"]):
            counts |= {name: count + change for name, count in counts.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, model: JointModel, *step: Any) -> None:
        self.interrupted = somewhere(self.interrupted)  # the first process is told, and all have to save together
        if self.interrupted and self.fresh and self.last.is_file():
            raise KeyboardInterrupt  # less than an epoch is lost, and the earlier one's are not
        done = step[-1] + 1  # batches of this epoch, on this device
        between_steps = done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches
        if self.interrupted and between_steps:
            model.batches_done = done * trainer.world_size
            self.save_last(trainer, model)
            raise Interrupted(self.last)

    def on_train_epoch_end(self, trainer: pl.Trainer, model: JointModel) -> None:
        model.batches_done = 0
        self.save_last(trainer, model)
        if trainer.is_global_zero:
            self.keep_epoch(model, model.epoch_number)
        print(f"\n{epoch_summary(model)}", flush=True)
        if self.interrupted and not trainer.should_stop:
            raise Interrupted(self.last)

    def keep_epoch(self, model: JointModel, epoch: int) -> None:
        """Copy the last checkpoint, which ends this epoch, and keep only the best."""
        name = f"joint_{self.mode}_epoch{epoch:04d}_loss{model.combined_loss():.4f}.ckpt"
        copy_file(self.last, self.output_dir / name)
        for path, _, _ in sorted(self.kept(), key=lambda kept: kept[2])[KEPT_CHECKPOINTS:]:
            path.unlink()

    def save_last(self, trainer: pl.Trainer, model: JointModel) -> None:
        """With the first of a fresh run an earlier one's epochs go: they must not count among its best.

        All processes call the trainer.
        """
        with atomic_write(self.last) if trainer.is_global_zero else nullcontext(self.last) as path:
            trainer.save_checkpoint(path)
        if self.fresh and trainer.is_global_zero:
            for path, epoch, _ in self.kept():
                if epoch >= model.epoch_number:
                    path.unlink()
        self.fresh = False

    def kept(self) -> list[tuple[Path, int, float]]:
        """The epoch checkpoints of this mode with their numbers and losses."""
        pattern = re.compile(rf"joint_{self.mode}_epoch(\d+)_loss([\d.]+)\.ckpt")
        found = ((path, pattern.fullmatch(path.name)) for path in self.output_dir.glob(f"joint_{self.mode}_epoch*"))
        return [(path, int(match[1]), float(match[2])) for path, match in found if match]


def epoch_summary(model: JointModel) -> str:
    """`epoch 4: llm 2.310 (held out 2.402), flow 0.512 (held out 0.530)`."""
    texts = []
    for name, progress in model.progress.items():
        last = progress.history[-1]
        if last.epoch == model.epoch_number:
            held_out = "" if last.val is None else f" (held out {last.val:.3f} ± {last.val_error:.3f})"
            texts.append(f"{name} {last.train:.3f}{held_out}")
    return f"epoch {model.epoch_number}: " + ", ".join(texts)
