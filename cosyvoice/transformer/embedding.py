"""Sinusoidal tables of relative positions."""

import math

import torch
from torch import Tensor


def relative_positions(first: int, last: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Sinusoids of the distances query minus key, from `first` down to `last` (Dai et al., 2019, section 3.3).

    Even columns hold sines, odd columns cosines of distance / 10000^(2i / width). Distances are falling because a query
    meets its farthest key first. Returns (first - last + 1, width) float32.
    """
    distances = torch.arange(first, last - 1, -1, dtype=torch.float32, device=device)
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    rates = torch.exp(steps * -(math.log(10000.0) / width))
    angles = distances.unsqueeze(1) * rates  # (W, width / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
