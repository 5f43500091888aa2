"""The voice of the samples, which speaks with parts that are lent to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosyvoice.cli.base import VOICE_NAME
from cosyvoice.cli.cosyvoice import AutoModel
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.draws import Draws


@dataclass
class Written:
    """A text in speech tokens, one list for each piece, and the random draws that go on behind each list."""

    tokens: list[list[int]]
    draws: list[Draws]


class SampleVoice:
    """Speaks in two steps, since a language model that does not change has to write a text only once.

    Equal seeds give the random draws of `inference_joint.py --seed`.
    """

    def __init__(
        self, folder: ModelFolder, llm: nn.Module, flow: nn.Module, embedding: Tensor, device: torch.device, seed: int
    ) -> None:
        """llm, flow: of the sizes that will be lent. embedding: (1, 192)."""
        self.cosyvoice = AutoModel(folder, device=str(device), weights={"llm": llm, "flow": flow})
        self.cosyvoice.frontend.spk2info[VOICE_NAME] = {"embedding": embedding}
        self.embedding, self.device, self.seed = embedding, device, seed
        hift = self.cosyvoice.model.hift
        # its Fourier transforms have no half precision, which a part in training may compute in
        hift.inference = torch.autocast(device.type, enabled=False)(hift.inference)
        self._give_back()

    @property
    def sample_rate(self) -> int:
        return self.cosyvoice.sample_rate

    def write(self, llm: nn.Module, number: int, text: str) -> Written:
        """Return the tokens of a text. number: of its line. Raises InputError where there is nothing to speak."""
        frontend = self.cosyvoice.frontend
        pieces = self.cosyvoice.split(text)
        ids = [frontend.frontend_sft(piece, VOICE_NAME)["text"] for piece in pieces]
        draws = [Draws(self.seed, number, piece) for piece in range(len(pieces))]
        with self._using(llm=llm):
            return Written(self.cosyvoice.model.write_together(ids, self.embedding, draws), draws)

    def sound(self, flow: nn.Module, written: Written) -> Tensor:
        """Return the speech (1, samples), on the CPU."""
        with self._using(flow=flow):
            speeches = [
                self.cosyvoice.model.sound(tokens, self.embedding, draws.copy())
                for tokens, draws in zip(written.tokens, written.draws, strict=True)
            ]
        return torch.cat(speeches, dim=1)

    def mel(self, speech: Tensor) -> Tensor:
        """Return the log-mel (80, T) of speech (1, samples) at `sample_rate`, or silent frames (80, 0)."""
        return self.cosyvoice.frontend.feat_extractor(speech)[0]

    @contextmanager
    def _using(self, **parts: nn.Module) -> Iterator[None]:
        for name, part in parts.items():
            setattr(self.cosyvoice.model, name, part)
        try:
            yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        """Keep no part alive that belongs to others."""
        self.cosyvoice.model.llm = self.cosyvoice.model.flow = None
