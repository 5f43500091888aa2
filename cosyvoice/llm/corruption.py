"""Mistakes in what a language model reads while it trains, so that it learns to go on after its own."""

from typing import Any

import torch
from torch import Tensor

from cosyvoice.llm.qwen2_lm import BISTREAM_SHARE, Qwen2LM
from cosyvoice.runtime.errors import InputError


class CorruptedQwen2LM(Qwen2LM):
    """A `Qwen2LM` that reads mistakes while it trains. Its weights are those of a `Qwen2LM`."""

    def __init__(
        self, *arguments: Any, input_corruption: float, bistream_share: float = BISTREAM_SHARE, **options: Any
    ) -> None:
        """input_corruption: share of the speech tokens that are read as random ones in training.

        bistream_share: of the clips, in which text and speech take turns.
        """
        super().__init__(*arguments, **options)
        self.input_corruption = checked_share(input_corruption)
        self.bistream_share = bistream_share

    def heard(self, speech: Tensor) -> Tensor:
        return corrupted(speech, self.input_corruption if self.training else 0.0, self.speech_token_size)


def checked_share(input_corruption: float) -> float:
    """Return the share of a YAML. Raises InputError unless it is from 0 to below 1."""
    if not isinstance(input_corruption, int | float) or not 0 <= input_corruption < 1:
        raise InputError(f"input_corruption is a share from 0 to below 1, not {input_corruption}")
    return input_corruption


def corrupted(speech: Tensor, share: float, count: int) -> Tensor:
    """Return speech tokens (B, S), this share of them drawn anew from `count` ids. With a share of 0 none are."""
    if not share:
        return speech
    replaced = torch.rand(speech.shape, device=speech.device) < share
    return torch.where(replaced, torch.randint_like(speech, count), speech)
