"""What a training run leaves: exchangeable weights with their losses every epoch, and the state to go on from."""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from cosyvoice.bin.recipe_models import RecipeModel
from cosyvoice.model_folder.weights import load_strict, load_tensors
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import atomic_write, save_tensors

STATE_KEY = "recipe"
LAST = "last.ckpt"
# What may differ at the end of an epoch, where all batches have been seen.
DEALT_ANEW = ("processes", "num_workers", "data_pipeline")


class CheckpointWriter(TorchCheckpointIO):
    """Writes where it is told to: the trainer's own takes the way through memory and the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_tensors(checkpoint, Path(path))


class RecipeCheckpoints(Checkpoint):
    """Writes `init.pt`, after every epoch `epoch_{N}_whole.pt` and `.yaml` (N from 0), and `last.ckpt`.

    With save_per_step > 0 also `epoch_{N}_step_{S}.pt` and `last.ckpt` within an epoch, every that many optimiser
    steps. A `.pt` holds the part's state dict and the integers `epoch` and `step`.
    """

    def __init__(self, model_dir: Path, save_per_step: int, resumable: bool, state: dict[str, Any]) -> None:
        """resumable: write `last.ckpt`. state: what a resumed run must agree on, kept in `last.ckpt`."""
        self.model_dir, self.save_per_step, self.resumable = model_dir, save_per_step, resumable
        self.state = state
        self.epochs_done, self.batches_done = 0, 0  # where a resumed run begins
        self.saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, model: RecipeModel) -> None:
        if trainer.global_step == 0:
            self.save_weights(trainer, model, "init.pt")

    def on_train_batch_end(self, trainer: pl.Trainer, model: RecipeModel, *step: Any) -> None:
        """Between optimiser steps only, where a resumed run can repeat an uninterrupted one.

        Not after an epoch's last: a run stopped in the validation that follows goes on before that step, or it would
        begin the next epoch without this one's losses.
        """
        due = self.save_per_step > 0 and model.steps % self.save_per_step == 0 and model.steps > self.saved_step
        if due and model.batches_in_group == model.accum_grad and not trainer.is_last_batch:
            self.saved_step = model.steps
            self.save_weights(trainer, model, f"epoch_{model.current_epoch}_step_{model.steps}.pt")
            self.save_last(trainer, model.current_epoch, step[-1] + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, model: RecipeModel) -> None:
        name = f"epoch_{model.current_epoch}_whole"
        train = model.loss_sum / max(1, model.batches)
        model.loss_sum, model.batches = 0.0, 0
        self.save_weights(trainer, model, f"{name}.pt")
        self.save_losses(trainer, model, train, self.model_dir / f"{name}.yaml")
        self.save_last(trainer, model.current_epoch + 1, 0)
        held_out = ", ".join(f"{key} {value:.4f}" for key, value in model.validation_means.items())
        if trainer.is_global_zero:
            print(f"epoch {model.current_epoch}: loss {train:.4f}; held out: {held_out}", flush=True)

    def save_weights(self, trainer: pl.Trainer, model: RecipeModel, name: str) -> None:
        if trainer.is_global_zero:
            counters = {"epoch": model.current_epoch, "step": model.steps}
            save_tensors({**model.part.state_dict(), **counters}, self.model_dir / name)

    def save_losses(self, trainer: pl.Trainer, model: RecipeModel, train: float, path: Path) -> None:
        """The sidecar that average_model.py reads."""
        if not trainer.is_global_zero:
            return
        info = {
            "epoch": model.current_epoch,
            "step": model.steps,
            "tag": "CV",
            "loss_dict": model.validation_means,
            "train_loss": train,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "save_time": time.strftime("%d/%m/%Y %H:%M:%S"),
            **self.state,
        }
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(info, sort_keys=False), encoding="utf-8")

    def save_last(self, trainer: pl.Trainer, epochs_done: int, batches_done: int) -> None:
        """All processes call the trainer; the first one writes."""
        if not self.resumable:
            return
        self.epochs_done, self.batches_done = epochs_done, batches_done
        trainer.save_checkpoint(self.model_dir / LAST)

    def on_save_checkpoint(self, trainer: pl.Trainer, model: RecipeModel, checkpoint: dict[str, Any]) -> None:
        progress = {"epochs_done": self.epochs_done, "batches_done": self.batches_done}
        progress |= {"loss_sum": model.loss_sum, "batches": model.batches}
        checkpoint[STATE_KEY] = {"run": self.state, **progress}


def read_progress(path: Path, state: dict[str, Any], model: RecipeModel) -> tuple[int, int]:
    """Epochs done and batches done in the next one, of a `last.ckpt`; the model gets the losses of these batches.

    Raises InputError where the file is damaged or another version's, or where the run it belongs to differs in `state`
    or its weights in names or shapes.
    """
    remedy = "train anew in another --model_dir"  # without --resume this folder is refused
    content = load_tensors(path, remedy, mapped=True)
    found = content.get(STATE_KEY, {})
    if not {"run", "loss_sum", "batches"} <= found.keys():
        raise InputError(f"{path} is no state of a training run of this version; {remedy}")
    for key in [*state, *found["run"]]:
        then, now = found["run"].get(key), state.get(key)
        if then != now and (found["batches_done"] or key not in DEALT_ANEW):
            raise InputError(f"{path} is of a run with {key} {then}, not {now}; give the same to resume, or {remedy}")
    load_strict(model, content["state_dict"], str(path))
    model.loss_sum, model.batches = found["loss_sum"], found["batches"]
    return found["epochs_done"], found["batches_done"]
