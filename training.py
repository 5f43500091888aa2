"""Running the trainer: checkpoints at epoch ends and on Ctrl-C, logs, devices."""

import logging
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from cosyvoice.utils.audio import read_wav
from cosyvoice.utils.device import cpu_has_bfloat16
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.file_utils import atomic_write, copy_file
from llm_flow_model import HALF_TYPES, JointModel
from utils import pick_device
from voices.choice import Voice
from voices.lines import Line
from voices.run import last_checkpoint, read_run
from voices.synthesis import load_voice
from voices.wav import speak_into_files

KEPT_CHECKPOINTS = 3
# Of the loss in float16. torch's own, 65536, has room for gradients below 1 only, and each overflow costs one of a
# run's few steps, while the schedule moves on. This one has room for gradients from 6e-11 to 64.
FIRST_LOSS_SCALE = 1024.0
MOST_SKIPPED_STEPS = 3  # without a word


class Interrupted(Exception):
    """Training was stopped by Ctrl-C, with everything saved."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped; {checkpoint} is complete")


@dataclass
class Listener:
    """Lets each epoch's checkpoint speak a text, into a wav beside the logs and into TensorBoard."""

    text: str
    model_dir: Path
    device: str
    seed: int

    def listen(self, checkpoint: Path, epoch: int, logger: TensorBoardLogger) -> None:
        wav = Path(logger.log_dir) / f"epoch{epoch:04d}.wav"
        try:
            self.speak(checkpoint, wav)
        except (InputError, RuntimeError) as error:  # to hear nothing is no reason to stop training
            print(f"epoch {epoch} cannot be heard: {str(error).splitlines()[0]}")
            return
        speech, rate = read_wav(wav)
        logger.experiment.add_audio("listen", speech, epoch, rate)

    def speak(self, checkpoint: Path, wav: Path) -> None:
        """Write what `inference_joint.py --adapter CHECKPOINT --batch-size 1` with the same seed writes."""
        run = read_run(checkpoint)
        voice = load_voice(Voice.of_run(run), run.embedding, self.model_dir, pick_device(self.device))
        lines = [Line(1, self.text, wav)]
        for _ in speak_into_files(voice, lines, speed=1.0, seed=self.seed, together=1):
            pass


class CheckpointKeeper(Checkpoint):
    """Writes the last checkpoint after every epoch, keeps the best few beside it, and stops cleanly when asked to.

    Checkpoints are written between optimiser steps only, where a resumed run can repeat an uninterrupted one.
    """

    def __init__(self, output_dir: Path, mode: str, fresh: bool, listener: Listener | None) -> None:
        """fresh: this is a new run, or one that goes on from another checkpoint than the last in the folder.

        Its first checkpoint then replaces that and the epochs from there on.
        """
        self.output_dir, self.mode, self.fresh, self.listener = output_dir, mode, fresh, listener
        self.last = last_checkpoint(output_dir, mode)
        self.interrupted = False

    def on_train_start(self, trainer: pl.Trainer, model: JointModel) -> None:
        """Make up for a run that was killed while it kept an epoch: copy that epoch, and remove the unfinished file."""
        for unfinished in self.output_dir.glob(f".joint_{self.mode}_epoch*.part.ckpt"):
            unfinished.unlink()
        epochs_done = max(len(progress.history) for progress in model.progress.values())
        if not self.fresh and not model.batches_done and all(epoch < epochs_done for _, epoch, _ in self.kept()):
            self.keep_epoch(model, epochs_done)

    def on_train_batch_end(self, trainer: pl.Trainer, model: JointModel, *step: Any) -> None:
        if self.interrupted and self.fresh and self.last.is_file():
            raise KeyboardInterrupt  # less than an epoch is lost, and the earlier one's are not
        done = step[-1] + 1  # batches of this epoch
        between_steps = done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches
        if self.interrupted and between_steps:
            model.batches_done = done
            self.save_last(trainer, model)
            raise Interrupted(self.last)

    def on_train_epoch_end(self, trainer: pl.Trainer, model: JointModel) -> None:
        model.batches_done = 0
        self.save_last(trainer, model)
        self.keep_epoch(model, model.epoch_number)
        print(f"\n{epoch_summary(model)}", flush=True)
        if self.listener:
            self.listener.listen(self.last, model.epoch_number, trainer.logger)
        if self.interrupted and not trainer.should_stop:
            raise Interrupted(self.last)

    def keep_epoch(self, model: JointModel, epoch: int) -> None:
        """Copy the last checkpoint, which ends this epoch, and keep only the best."""
        name = f"joint_{self.mode}_epoch{epoch:04d}_loss{model.combined_loss():.4f}.ckpt"
        copy_file(self.last, self.output_dir / name)
        for path, _, _ in sorted(self.kept(), key=lambda kept: kept[2])[KEPT_CHECKPOINTS:]:
            path.unlink()

    def save_last(self, trainer: pl.Trainer, model: JointModel) -> None:
        """With the first of a fresh run an earlier one's epochs go: they must not count among its best."""
        with atomic_write(self.last) as temporary:
            trainer.save_checkpoint(temporary)
        if self.fresh:
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
        entry = progress.history[-1]
        if entry["epoch"] == model.epoch_number:
            held_out = f" (held out {entry['val']:.3f} ± {entry['val_error']:.3f})" if "val" in entry else ""
            texts.append(f"{name} {entry['train']:.3f}{held_out}")
    return f"epoch {model.epoch_number}: " + ", ".join(texts)


def fit(
    model: JointModel,
    loaders: tuple[DataLoader, DataLoader | None],
    output_dir: Path,
    device: str,
    resume: Path | None,
    listener: Listener | None = None,
) -> None:
    """Train until every part has stopped, at most `max_epochs`. Raises Interrupted after Ctrl-C."""
    config = model.config
    if dtype := half_type(config, device):
        model.keep_base_in(dtype)
    mode = config["training_mode"]
    fresh = resume is None or resume.resolve() != last_checkpoint(output_dir, mode).resolve()
    keeper = CheckpointKeeper(output_dir, mode, fresh, listener)
    logger = TensorBoardLogger(output_dir / "joint_logs", name=mode)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        **precision_options(config, device),
        max_epochs=config["max_epochs"],
        accumulate_grad_batches=config["accumulate_grad_batches"],
        gradient_clip_val=config["gradient_clip_val"],
        callbacks=[keeper, TQDMProgressBar(refresh_rate=int(sys.stderr.isatty()))],
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    model.train()
    with stopping_on_interrupt(keeper), warnings.catch_warnings():
        # a base in eval mode, no worker processes, a sampler that resumes by itself, nothing held out, a step in half
        # precision that is left out: as intended; and the trainer's own use of a deprecated class
        intended = "eval mode|many workers|not resumable|litlogger|no `val_dataloader`|lr_scheduler.step|LeafSpec"
        warnings.filterwarnings("ignore", message=f".*({intended}).*")
        try:
            trainer.fit(model, *loaders, ckpt_path=resume, weights_only=True)
        except SystemExit:  # how the trainer leaves at a second Ctrl-C
            raise KeyboardInterrupt from None


def half_type(config: dict[str, Any], device: str) -> torch.dtype | None:
    """What the frozen weights are kept in where it is computed in half precision: on a GPU."""
    return HALF_TYPES.get(config["precision"]) if device == "cuda" else None


def compute_precision(config: dict[str, Any], device: str) -> str:
    """The precision to compute in: a CPU gains nothing from float16, but some multiply faster in bfloat16."""
    wanted = config["precision"]
    if device == "cpu" and wanted == "16-mixed":
        return "bf16-mixed" if cpu_has_bfloat16() else "32-true"
    return wanted


def precision_options(config: dict[str, Any], device: str) -> dict[str, Any]:
    """The trainer's options for the precision to compute in."""
    precision = compute_precision(config, device)
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": MixedPrecision(precision, device, LossScaler(device))}


class LossScaler(torch.amp.GradScaler):
    """Scales the loss for float16, counts the optimiser steps that overflow costs, and says so where there are many."""

    def __init__(self, device: str) -> None:
        super().__init__(device, init_scale=FIRST_LOSS_SCALE)
        self.skipped = 0

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Set the scale for the next step, a smaller one where this step was left out."""
        before = self.get_scale()
        super().update(new_scale)
        if self.get_scale() < before:
            self.skipped += 1
            if self.skipped == MOST_SKIPPED_STEPS + 1:
                problem = f"{self.skipped} optimiser steps were left out, because gradients overflow in float16"
                print(f"\n{problem}: --set precision=bf16-mixed or 32-true takes them", flush=True)


@contextmanager
def stopping_on_interrupt(keeper: CheckpointKeeper) -> Iterator[None]:
    """The first Ctrl-C asks `keeper` to save and stop at the next optimiser step; a second one stops at once."""

    def notice(signum: int, frame: FrameType | None) -> None:
        if keeper.interrupted:
            raise KeyboardInterrupt
        keeper.interrupted = True
        print("\nstopping after this optimiser step; press Ctrl-C again to stop at once", flush=True)

    previous = signal.signal(signal.SIGINT, notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
