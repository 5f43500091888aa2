"""The trainer of few-shot training and of the recipes: quiet, and interrupted like every other command."""

import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, TQDMProgressBar

# What the trainer warns of, and is as intended: a base in eval mode, no worker processes, loaders that resume by
# themselves, nothing held out, a step in half precision that is left out, figures that are the same in all processes,
# and its own use of a deprecated class.
INTENDED = "eval mode|many workers|not resumable|no `val_dataloader`|lr_scheduler.step|sync_dist|LeafSpec"


def quiet_trainer(device: str, callbacks: Sequence[Callback], **options: Any) -> pl.Trainer:
    """Return a trainer on `cpu` or `cuda` whose only own output is a progress bar, where stderr is a terminal.

    options: any others of `pl.Trainer`.
    """
    bars = [TQDMProgressBar()] if sys.stderr.isatty() else []
    for package in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        callbacks=[*callbacks, *bars],
        enable_progress_bar=bool(bars),
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **options,
    )


def fit_quietly(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    train_loader: Iterable[Any],
    held_out_loader: Iterable[Any] | None,
    checkpoint: Path | None,
) -> None:
    """Train, from where `checkpoint` ends if one is given. Raises KeyboardInterrupt after Ctrl-C."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*({INTENDED}).*")
        try:
            trainer.fit(model, train_loader, held_out_loader, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # the trainer's own way to leave at KeyboardInterrupt
            raise KeyboardInterrupt from None
