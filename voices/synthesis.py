"""A loaded voice, and the sound it makes of texts."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosyvoice.cli.base import VOICE_NAME, FolderVoice
from cosyvoice.cli.cosyvoice import AutoModel
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import read_state_dict
from cosyvoice.runtime.command import seed_all
from cosyvoice.runtime.draws import Draws
from cosyvoice.transformer.precision import fastest_precision
from lora import merged
from voices.choice import Voice
from voices.lines import Line

MOST_LETTERS_NAMED = 10


@dataclass
class ReadyVoice:
    """A loaded voice."""

    cosyvoice: FolderVoice

    def speak(self, lines: Sequence[Line], speed: float, seed: int, together: int) -> Iterator[tuple[Line, Tensor]]:
        """Yield each line with its speech (1, samples), on the CPU.

        `together` pieces of text are written at once. The draws of each follow from (seed, line number, piece), so the
        speech does not depend on what is spoken beside it; but in int8, pieces that are written at once are rounded
        alike.
        """
        self.warn_of_letters(lines)
        jobs = [(line, number, piece) for line in lines for number, piece in enumerate(self.cosyvoice.split(line.text))]
        spoken = []
        for start in range(0, len(jobs), together):
            group = jobs[start : start + together]
            draws = [Draws(seed, line.number, number) for line, number, _ in group]
            pieces = [piece for _, _, piece in group]
            speeches = self.cosyvoice.speak_together(pieces, VOICE_NAME, draws, speed)
            for done, ((line, *_), speech) in enumerate(zip(group, speeches, strict=True), start=start + 1):
                spoken.append(speech)
                if done == len(jobs) or jobs[done][0] is not line:
                    yield line, torch.cat(spoken, dim=1)
                    spoken = []

    def stream(self, line: Line, seed: int) -> Iterator[Tensor]:
        """Yield the speech of a line in pieces (1, samples), on the CPU, each as soon as it is made.

        The draws follow from the seed and the line's number, and come from the process's own generators.
        """
        self.warn_of_letters([line])
        seed_all(seed, line.number)
        for piece in self.cosyvoice.inference_sft(line.text, VOICE_NAME, stream=True):
            yield piece["tts_speech"]

    def warn_of_letters(self, lines: Sequence[Line]) -> None:
        """Say which letters nobody can expect to hear right."""
        for line in lines:
            if letters := self.cosyvoice.frontend.unknown_letters(line.text):
                some = " ".join(letters[:MOST_LETTERS_NAMED]) + " ..." * (len(letters) > MOST_LETTERS_NAMED)
                print(f"warning: line {line.number} holds letters that this model never saw: {some}", file=sys.stderr)


def load_voice(
    voice: Voice, embedding: Tensor, folder: ModelFolder, device: torch.device, precision: str | None = None
) -> ReadyVoice:
    """Load a voice that speaks with a speaker vector (1, 192). precision: the fastest of the device by default."""
    weights: dict[str, Any] = dict(voice.weights)
    for part in voice.adapters.parts if voice.adapters else ():
        base = read_state_dict(folder.weights(part))
        weights[part] = merged(base, voice.adapters.adapters[part], voice.adapters.scale(part))
    precision = precision or fastest_precision(device)
    cosyvoice = AutoModel(folder, device=str(device), weights=weights, precision=precision)
    cosyvoice.frontend.spk2info[VOICE_NAME] = {"embedding": embedding}
    cosyvoice.model.llm.pace = voice.pace
    return ReadyVoice(cosyvoice)
