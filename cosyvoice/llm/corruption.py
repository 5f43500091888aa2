"""Mistakes in what a language model reads while it trains, so that it learns to go on after its own."""

import torch
from torch import Tensor

from cosyvoice.runtime.errors import InputError


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
