"""Running the trainer: its logs, its device, and Ctrl-C."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from cosyvoice.bin.quiet_trainer import fit_quietly, quiet_trainer
from cosyvoice.bin.sampling import Sampler
from llm_flow_model import JointModel
from training.checkpoints import CheckpointKeeper
from training.devices import EndedByTerm, connected, passes_a_device, sharing_options
from training.precision import half_type, precision_options
from training.workers import Place
from voices.run import Run, last_checkpoint


def fit(
    model: JointModel,
    loaders: tuple[DataLoader, DataLoader | None],
    output_dir: Path,
    device: str,
    resumed: Run | None,
    sampler: Sampler | None = None,
    place: Place = Place(),  # noqa: B008  it is frozen
) -> None:
    """Train until every part has stopped, at most `max_epochs`, from where `resumed` ends if it is given.

    place: which of several processes this one is; all of them call this. Raises Interrupted after Ctrl-C.
    """
    config = model.config
    if dtype := half_type(config, device):
        model.keep_base_in(dtype)
    mode = config["training_mode"]
    fresh = resumed is None or resumed.path.resolve() != last_checkpoint(output_dir, mode).resolve()
    if resumed:
        model.go_on_from(resumed.state)
    keeper = CheckpointKeeper(output_dir, mode, fresh, len(loaders[0]))
    callbacks = [keeper, *([sampler] if sampler else []), *([EndedByTerm()] if place.devices > 1 else [])]
    trainer = quiet_trainer(
        device,
        callbacks,
        **sharing_options(place),
        **precision_options(config, device),
        max_epochs=config["max_epochs"],
        accumulate_grad_batches=passes_a_device(config, place.devices),
        gradient_clip_val=config["gradient_clip_val"],
        logger=TensorBoardLogger(output_dir / "joint_logs", name=mode),
        log_every_n_steps=1,
    )
    model.train()
    with connected(place), nullcontext() if place.rank else stopping_on_interrupt(keeper):
        fit_quietly(trainer, model, *loaders, resumed and resumed.path)


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
