"""Flow matching for a network too small to draw one mel of the many that fit."""

import torch
from torch import Tensor

from cosyvoice.flow.causal_flow_matching import CausalConditionalCFM
from cosyvoice.flow.flow_matching import TrainingDraw, Velocity
from matcha.models.components.flow_matching import optimal_transport_path


class MedianCFM(CausalConditionalCFM):
    """A `CausalConditionalCFM` that learns to lead all noise to the same mel: the median of those that fit the tokens.

    On the path from noise to a recording, the recording shows through the noise, and a network learns to make up such
    detail as it sees. A small one makes up noise, in which words are lost. So the path ends at the network's own
    prediction from noise alone, of which no recording is seen. The weights are those of a `CausalConditionalCFM`.
    """

    def errors(self, x1: Tensor, draw: TrainingDraw, velocity: Velocity) -> tuple[Tensor, Tensor]:
        """Return the absolute error of the mel that is led to; see `ConditionalCFM.errors`."""
        with torch.no_grad():
            predicted_mel = draw.z + velocity(draw.z, torch.zeros_like(draw.t))
        y, _ = optimal_transport_path(predicted_mel, draw.z, draw.t, self.params.sigma_min)
        return (draw.z + velocity(y, draw.t) - x1).abs(), y
