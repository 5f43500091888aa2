"""The mathematics of flow matching, without a network: probability path, time grid and Euler's method.

"Flow Matching for Generative Modeling" (Lipman et al. 2023), section 4.1, example II; the cosine grid is from
CosyVoice (Du et al. 2024), section 2.3.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def optimal_transport_path(x_1: Tensor, x_0: Tensor, t: Tensor, sigma_min: float) -> tuple[Tensor, Tensor]:
    """Return the point at time t on the straight line from noise x_0 to data x_1, and the velocity there.

    x_1 and x_0 have the same shape; t broadcasts to it and lies in [0, 1].
    """
    x_t = (1 - (1 - sigma_min) * t) * x_0 + t * x_1
    u_t = x_1 - (1 - sigma_min) * x_0
    return x_t, u_t


def cosine_time_grid(n_timesteps: int, device: torch.device) -> Tensor:
    """Return (n_timesteps + 1,) times from 0 to 1 in float32, dense near 0, where the flow is hardest."""
    t = torch.linspace(0, 1, n_timesteps + 1, device=device)
    return 1 - torch.cos(t * 0.5 * math.pi)


def integrate_euler(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t_span: Tensor) -> Tensor:
    """Solve dx/dt = velocity(x, t) from t_span[0] to t_span[-1] with one explicit step per interval."""
    for t, t_next in pairwise(t_span):
        x = x + (t_next - t) * velocity(x, t)
    return x
