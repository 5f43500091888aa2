"""Running the trainer: its logs, its device, and Ctrl-C."""

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from llm_flow_model import JointModel
from training.checkpoints import CheckpointKeeper
from training.listening import Listener
from training.precision import half_type, precision_options
from voices.run import last_checkpoint


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
