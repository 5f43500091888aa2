"""The recordings that the speech tokenizer learns from, and a training that a killed run can continue."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cosyvoice.model_folder.weights import load_tensors
from cosyvoice.runtime.command import seed_all
from cosyvoice.runtime.device import cpu_has_bfloat16
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import save_tensors
from tools.kaldi_folder import file_stamp, read_table

WARM_UP = 0.05  # share of the steps in which the learning rate rises
WEIGHT_DECAY = 0.01
CHECKPOINT_STEPS = 100  # a killed run loses at most these
REPORTS = 10  # in a whole training
GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Recording:
    wav: Path
    speaker: str


def read_recordings(folders: Sequence[Path]) -> list[Recording]:
    """Return the utterances of Kaldi-style folders. Raises InputError if one has no speaker."""
    recordings = []
    for folder in folders:
        speakers = read_table(folder / "utt2spk")
        for utt, wav in read_table(folder / "wav.scp").items():
            if utt not in speakers:
                raise InputError(f"{folder / 'utt2spk'} names no speaker of {utt}. Make the corpus again")
            recordings.append(Recording(Path(wav), speakers[utt]))
    return recordings


def draw(recordings: Sequence[Recording], number: int, seed: int) -> list[Recording]:
    """Return `number` of the recordings, drawn at random, in their order; all if there are no more."""
    chosen = np.random.default_rng(seed).permutation(len(recordings))[:number]
    return [recordings[index] for index in sorted(chosen)]


def stamp(recordings: Sequence[Recording]) -> str:
    """Return a text that changes when a recording does."""
    return hashlib.sha256(repr([file_stamp(recording.wav) for recording in recordings]).encode()).hexdigest()


def bfloat16_where_fast() -> torch.autocast:
    """Compute within in bfloat16 where the processor multiplies faster in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16())


@dataclass
class Training:
    """AdamW with warm-up and a cosine. A killed run continues from `checkpoint` and ends with the same weights.

    The checkpoint lies beside `output`, the file that the caller will write. `recordings` are what it learns from.
    `settings` are what else the result depends on.
    """

    model: nn.Module
    recordings: Sequence[Recording]
    steps: int
    seed: int
    peak_rate: float
    output: Path
    settings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checkpoint = checkpoint_of(self.output)
        # everything that the result depends on: a checkpoint of another recipe is not continued
        self.recipe = {"seed": self.seed, "steps": self.steps, "data": stamp(self.recordings), **self.settings}

    def run(self, batch_loss: Callable[[], Tensor], report: Callable[[], str]) -> None:
        """Train. `batch_loss` draws its batch from the global generators, which are seeded at every step."""
        optimiser = torch.optim.AdamW(self.model.parameters(), weight_decay=WEIGHT_DECAY)
        done = self._recall(optimiser)
        losses: list[float] = []
        with tqdm(total=self.steps, initial=done, desc="training", unit="step", disable=None) as progress:
            for step in range(done, self.steps):
                losses.append(self._step(step, optimiser, batch_loss))
                progress.update()
                if (step + 1) % CHECKPOINT_STEPS == 0:
                    self._save(step + 1, optimiser)
                if (step + 1) % max(self.steps // REPORTS, 1) == 0:
                    progress.write(f"step {step + 1}/{self.steps}: loss {np.mean(losses):.3f}, {report()}", sys.stdout)
                    sys.stdout.flush()
                    losses.clear()

    def _step(self, step: int, optimiser: torch.optim.Optimizer, batch_loss: Callable[[], Tensor]) -> float:
        seed_all(self.seed, step)
        rise = min((step + 1) / (WARM_UP * self.steps), 1)
        for group in optimiser.param_groups:
            group["lr"] = self.peak_rate * rise * (1 + math.cos(math.pi * step / self.steps)) / 2
        self.model.train()
        optimiser.zero_grad()
        with bfloat16_where_fast():
            loss = batch_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        optimiser.step()
        return loss.item()

    def _save(self, step: int, optimiser: torch.optim.Optimizer) -> None:
        state = {"recipe": json.dumps(self.recipe), "step": step, "model": self.model.state_dict()}
        save_tensors({**state, "optimiser": optimiser.state_dict()}, self.checkpoint)

    def _recall(self, optimiser: torch.optim.Optimizer) -> int:
        """Load what a killed run left. Return the number of steps that it had done."""
        if not self.checkpoint.is_file():
            return 0
        state = load_tensors(self.checkpoint, "delete it to train from the start")
        if state["recipe"] != json.dumps(self.recipe):
            raise InputError(f"{self.checkpoint} is of other options or data. Delete it to train from the start")
        self.model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        print(f"continuing after step {state['step']}")
        return state["step"]


def checkpoint_of(output: Path) -> Path:
    return output.with_name(f".{output.stem}.training.pt")
