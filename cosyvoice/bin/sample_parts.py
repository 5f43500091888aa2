"""Parts of a model that are lent to samples: the one that is training, or one from a file."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_part


class LentPart(ABC):
    """A language model or a flow that speaks for a moment."""

    changes: bool  # whether it speaks differently in the next epoch

    @abstractmethod
    def lend(self, device: torch.device) -> AbstractContextManager[nn.Module]:
        """Yield the part on the device, in eval mode. Afterwards it is as it was before."""

    def forget(self) -> None:  # noqa: B027
        """Free the memory that only samples need."""


class TrainedPart(LentPart):
    """The part that is training, with the weights it has at the moment: it is not loaded a second time."""

    changes = True

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    @contextmanager
    def lend(self, device: torch.device) -> Iterator[nn.Module]:
        modes = {module: module.training for module in self.part.modules()}
        self.part.eval()
        try:
            yield self.part
        finally:
            for module, mode in modes.items():
                module.training = mode


class StoredPart(LentPart):
    """A part of a model folder, with the folder's weights or those of another file. It waits on the CPU."""

    changes = False

    def __init__(self, folder: ModelFolder, name: str, weights: Path | None = None) -> None:
        self.folder, self.name, self.weights = folder, name, weights
        self.part: nn.Module | None = None

    @contextmanager
    def lend(self, device: torch.device) -> Iterator[nn.Module]:
        """Raises InputError where the weights do not fit."""
        if self.part is None:
            self.part = load_part(self.folder, self.name, self.weights)
        try:
            yield self.part.to(device)
        finally:
            self.part.to("cpu")

    def forget(self) -> None:
        self.part = None


@dataclass(frozen=True)
class Version:
    """A language model and a flow that are heard together."""

    name: str
    llm: LentPart
    flow: LentPart
