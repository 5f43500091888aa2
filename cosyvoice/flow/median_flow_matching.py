"""Flow matching for a network too small to draw one mel of the many that fit."""

import torch
from torch import Tensor

from cosyvoice.flow.causal_flow_matching import CausalConditionalCFM
from cosyvoice.flow.flow_matching import keep_items
from matcha.models.components.flow_matching import optimal_transport_path


class MedianCFM(CausalConditionalCFM):
    """A `CausalConditionalCFM` that learns to lead all noise to the same mel: the median of those that fit the tokens.

    On the path from noise to a recording, the recording shows through the noise, and a network learns to make up such
    detail as it sees. A small one makes up noise, in which words are lost. So the path ends at the network's own
    prediction from noise alone, of which no recording is seen. The weights are those of a `CausalConditionalCFM`.
    """

    def compute_loss(
        self,
        x1: Tensor,
        mask: Tensor,
        mu: Tensor,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        times: Tensor | None = None,
        drops_conditions: bool = True,
        **attention: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the mean absolute error of the mel that is led to; see `ConditionalCFM.compute_loss`."""
        draw = self.draw_given(x1, times, drops_conditions)
        mu, spks, cond = (keep_items(condition, draw.keep) for condition in (mu, spks, cond))

        def velocity(y: Tensor, t: Tensor) -> Tensor:
            return self.estimator(y.to(mu.dtype), mask, mu, t.flatten(), spks, cond, **attention).float()

        with torch.no_grad():
            predicted_mel = draw.z + velocity(draw.z, torch.zeros_like(draw.t))
        y, _ = optimal_transport_path(predicted_mel, draw.z, draw.t, self.params.sigma_min)
        error = ((draw.z + velocity(y, draw.t) - x1) * mask).abs().sum()
        return error / (mask.sum() * x1.shape[1]), y
