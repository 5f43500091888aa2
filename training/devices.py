"""Training on several devices of one machine with the numbers of one: what is asked for, and how it is shared."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from cosyvoice.runtime.device import cuda_problem
from cosyvoice.runtime.errors import InputError
from training.workers import Place

# On GPUs, too: adapters are a few megabytes, and a process that is lost is an error at once instead of a long wait.
BACKEND = "gloo"


def check_devices(devices: int, device: str) -> None:
    """Raise InputError where the machine has fewer GPUs.

    device: as given with `--device`. Any number of processes share a CPU, which gains nothing but serves for tests.
    """
    if devices == 1 or device == "cpu":
        return
    problem = cuda_problem()
    count = 0 if problem else torch.cuda.device_count()
    if count < devices:
        found = problem or f"torch sees {count} here"
        remedy = f"give --devices {count}" if count > 1 else "leave it out"
        raise InputError(f"--devices {devices} needs as many GPUs, and {found}; {remedy}")


def passes_a_device(config: dict[str, Any], devices: int, resumed: bool = False) -> int:
    """Return how many batches each device computes for a step. Raises InputError where they are not as many for each.

    resumed: the run keeps its settings.
    """
    size, passes = config["batch_size"], config["accumulate_grad_batches"]
    if passes % devices == 0:
        return passes // devices
    clips = size * passes
    if resumed:
        remedy = "give a number that divides it, since --resume keeps that setting"
    elif clips % devices:
        remedy = f"--set accumulate_grad_batches={math.ceil(passes / devices) * devices} can be"
    else:  # the same clips a step in smaller batches
        smaller = max(each for each in range(1, size + 1) if clips // devices % each == 0)
        remedy = f"--set batch_size={smaller} accumulate_grad_batches={clips // smaller} can be"
    raise InputError(f"accumulate_grad_batches={passes} cannot be shared by --devices {devices}; {remedy}")


def sharing_options(place: Place) -> dict[str, Any]:
    """Return the trainer's options for the devices; each process feeds its own."""
    if place.devices == 1:
        return {"devices": 1}
    strategy = SharedGradients(cluster_environment=StartedProcess(place.rank), process_group_backend=BACKEND)
    return {"devices": place.devices, "strategy": strategy, "use_distributed_sampler": False}


class SharedGradients(DDPStrategy):
    """Gives all processes the sum of their gradients, once for each optimiser step.

    The usual wrapper around the model does not know when a part stops, and first sends everyone the frozen weights.
    """

    def configure_ddp(self) -> None:
        """Leave the model as it is: every process has built the same."""

    def post_backward(self, closure_loss: Tensor) -> None:
        trainer = self.lightning_module.trainer
        done = trainer.fit_loop.batch_idx + 1
        if done % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        trained = [weight for weight in self.lightning_module.parameters() if weight.requires_grad]
        # no process may leave one out, even if this one did not need it
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trained]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        for weight, total in zip(trained, together.split([weight.numel() for weight in trained]), strict=True):
            weight.grad = total.view_as(weight)


class StartedProcess(LightningEnvironment):
    """Tells the trainer that its processes are there already, and which one this is."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self.rank

    def node_rank(self) -> int:
        return 0


@contextmanager
def connected(place: Place) -> Iterator[None]:
    """Connect the processes of a run for the block."""
    if place.meet is None:
        yield
        return
    dist.init_process_group(BACKEND, store=place.meet(), rank=place.rank, world_size=place.devices)
    try:
        yield
    finally:
        dist.destroy_process_group()


class EndedByTerm(Callback):
    """Ends the run at SIGTERM. The trainer's own handler would send the others a message that they do not wait for."""

    def on_train_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Set the first process's handler: the workers ignore the signal and end with it."""
        signal.signal(signal.SIGTERM, interrupt if trainer.is_global_zero else signal.SIG_IGN)


def interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
