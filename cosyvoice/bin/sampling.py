"""Training that is heard: after an epoch the model speaks, beside a recording of the speaker."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from cosyvoice.bin.sample_files import Sample, log, write_files
from cosyvoice.bin.sample_parts import LentPart, Version
from cosyvoice.bin.sample_voice import SampleVoice, Written
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import resample

LONGEST_WAIT = timedelta(days=1)  # of the other processes; the usual ten or thirty minutes may be too short
REFERENCE = "reference"
MOST_RECORDINGS = 20  # of the speaker, for the judge
TROUBLE = (ValueError, RuntimeError, OSError, MemoryError)  # that is no reason to stop training

Result = TypeVar("Result")


@dataclass
class Recording:
    """A recording of the speaker."""

    text: str
    speech: Tensor  # (1, samples)
    rate_hz: int


# The figures of speech (1, samples) at a rate in Hz that should say a text, by name.
Judge = Callable[[Tensor, int, str], dict[str, float]]
# From recordings of the speaker and the texts of the samples to a judge, where one is installed.
OpenJudge = Callable[[Sequence[Recording], Sequence[str]], Judge | None]


@dataclass(frozen=True)
class SamplePlan:
    """What is said in the samples, by whom, and how often."""

    folder: ModelFolder
    texts: dict[int, str]  # by number, from 1
    embedding: Tensor  # (1, 192)
    reference: Recording | None  # None where there is none to compare with
    seed: int
    every: int = 1  # epochs
    first_epoch: int = 0  # the number of the first epoch, in messages and names of folders
    output: Path | None = None  # default: the folder `samples`, beside the logs


class Sampler(Checkpoint):
    """Speaks after every so many epochs and after the last one, and leaves training as it was.

    Random generators and modes are restored, and the other processes wait for the first one, which speaks. A sample
    that fails is reported in one line. As a kind of Checkpoint it is called after the epoch's weights are written, if
    it stands behind the callback that writes them.
    """

    def __init__(
        self, plan: SamplePlan, versions: Sequence[Version], open_judge: Callable[[], Judge | None] | None = None
    ) -> None:
        """open_judge: called once, where samples are spoken."""
        self.plan, self.versions, self.open_judge = plan, versions, open_judge
        self.group: dist.ProcessGroup | None = None
        # What the first process has.
        self.voice: SampleVoice | None = None
        self.judge: Judge | None = None
        self.written: dict[LentPart, dict[int, Written]] = {}  # by language models that do not change
        self.references: list[Sample] = []  # one at most
        self.references_are_logged = False

    def on_train_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Raises InputError where a part cannot be loaded."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        if trainer.is_global_zero:
            self.output = self.plan.output or Path(trainer.logger.log_dir) / "samples"
            with isolate_rng():
                self.open(model.device)
        self.wait()

    def on_train_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        done = trainer.current_epoch + 1
        is_last = done == trainer.max_epochs or trainer.should_stop
        if done % self.plan.every and not is_last:
            return
        if trainer.is_global_zero:
            number = trainer.current_epoch + self.plan.first_epoch
            with isolate_rng():
                attempt(f"the samples of epoch {number}", self.speak, number, trainer.logger.experiment)
        self.wait()

    def wait(self) -> None:
        """Let all processes go on together."""
        if self.group is not None:
            dist.barrier(self.group)

    def open(self, device: torch.device) -> None:
        """Load what the samples need beside the model, and let language models that do not change write the texts."""
        plan, first = self.plan, self.versions[0]
        self.judge = attempt("the judge of the samples", self.open_judge) if self.open_judge else None
        with first.llm.lend(device) as llm, first.flow.lend(device) as flow:
            self.voice = SampleVoice(plan.folder, llm, flow, plan.embedding, device, plan.seed)
        for version in self.versions:
            if not version.llm.changes and version.llm not in self.written:
                self.written[version.llm] = self.write(version, "before training")
                version.llm.forget()
        if plan.reference:
            speech = resample(plan.reference.speech, plan.reference.rate_hz, self.voice.sample_rate)
            self.references = [self.sample(REFERENCE, 0, plan.reference.text, speech)]

    def speak(self, number: int, writer: SummaryWriter) -> None:
        """Speak in all versions, into files and TensorBoard. number: of the epoch."""
        written, samples, when = dict(self.written), [], f"epoch {number}"
        for version in self.versions:
            if version.llm not in written:
                written[version.llm] = self.write(version, when)
            samples += self.sounds(version, written[version.llm], when)
        comment = f"{when}, seed {self.plan.seed}"
        rate_hz = self.voice.sample_rate
        write_files(self.output / f"epoch_{number:04d}", self.references + samples, rate_hz, comment)
        log(writer, samples if self.references_are_logged else self.references + samples, number, rate_hz)
        self.references_are_logged = True

    def write(self, version: Version, when: str) -> dict[int, Written]:
        """Return the texts that the version's language model can write."""
        with version.llm.lend(self.voice.device) as llm:
            found = {
                number: attempt(f"{when}: {version.name} {number:02d}", self.voice.write, llm, number, text)
                for number, text in self.plan.texts.items()
            }
        return {number: written for number, written in found.items() if written is not None}

    def sounds(self, version: Version, written: dict[int, Written], when: str) -> list[Sample]:
        """Return the samples of written texts that the version's flow can speak."""
        with version.flow.lend(self.voice.device) as flow:
            found = [
                attempt(f"{when}: {version.name} {number:02d}", self.sound, version.name, flow, number, tokens)
                for number, tokens in written.items()
            ]
        return [sample for sample in found if sample is not None]

    def sound(self, version: str, flow: nn.Module, number: int, written: Written) -> Sample:
        speech = self.voice.sound(flow, written)
        if not speech.isfinite().all():
            raise InputError("its samples are not finite numbers")
        return self.sample(version, number, self.plan.texts[number], speech)

    def sample(self, version: str, number: int, text: str, speech: Tensor) -> Sample:
        """Return a sample with its figures, of speech (1, samples) at the model's rate."""
        rate_hz = self.voice.sample_rate
        figures = {"seconds": speech.shape[1] / rate_hz}
        if self.judge:
            figures |= attempt(f"the figures of {version} {number:02d}", self.judge, speech, rate_hz, text) or {}
        return Sample(version, number, text, speech, self.voice.mel(speech), figures)


def attempt(what: str, action: Callable[..., Result], *arguments: Any) -> Result | None:
    """Return what the action returns, or None after a line that says why it cannot."""
    try:
        return action(*arguments)
    except TROUBLE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"{what} failed: {reason}", flush=True)
        return None
