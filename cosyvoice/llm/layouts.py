"""The order in which CosyVoice2's language model reads text and speech (Du et al., 2024, "CosyVoice 2", section 2.3).

Without streaming: start, text, task mark, speech. With streaming text the two take turns: a piece of text, a piece of
speech, and so on; where a piece of speech is over, the model asks for the next piece of text. The last piece is laid
out as without streaming, so a sequence without turns is the special case of no pieces before it.
"""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.utils.common import IGNORE_ID


class Turns(NamedTuple):
    """The sizes of the pieces that take turns."""

    text: int  # text tokens a piece
    speech: int  # speech tokens a piece

    def has_enough(self, text_length: int, speech_length: int) -> bool:
        """Whether there is speech left after that of every whole piece of the text."""
        return speech_length * self.text > self.speech * text_length

    def draw(self, share: float, text_lengths: list[int], speech_lengths: list[int]) -> list[bool]:
        """Draw which items take turns: `share` of those that have enough speech. Every item costs a draw."""
        lengths = zip(text_lengths, speech_lengths, strict=True)
        return [random.random() < share and self.has_enough(*both) for both in lengths]


class Marks(NamedTuple):
    """What stands between text and speech."""

    sos: Tensor  # (1, C), read first
    task: Tensor  # (1, C), read after the last text
    end: int  # asked for after the last speech
    fill: int  # asked for after any other piece of speech


def laid_out(text: Tensor, speech: Tensor, tokens: Tensor, marks: Marks, turns: Turns | None) -> tuple[Tensor, Tensor]:
    """Return what is read (L, C) and what is asked for at each place (L,), with L = 2 + T + S.

    text: (T, C) and speech: (S, C), embedded. tokens: (S,), the ids of the speech. turns: None where they do not take
    turns.
    """
    read, asked = [marks.sos], [ignored(1, tokens)]
    if turns is not None:
        for _ in range(len(text) // turns.text):
            piece, text = text.tensor_split([turns.text])
            said, speech = speech.tensor_split([turns.speech])
            ids, tokens = tokens.tensor_split([turns.speech])
            read += [piece, said]
            asked += [ignored(turns.text - 1, tokens), F.pad(ids, (0, 1), value=marks.fill)]
    read += [text, marks.task, speech]
    asked += [ignored(len(text), tokens), F.pad(tokens, (0, 1), value=marks.end)]
    return torch.cat(read), torch.cat(asked)


def ignored(length: int, like: Tensor) -> Tensor:
    """Return so many targets that no loss counts."""
    return like.new_full((length,), IGNORE_ID)
