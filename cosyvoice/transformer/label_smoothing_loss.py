"""Cross entropy with label smoothing, in its Kullback-Leibler form."""

import torch
from torch import Tensor, nn


class LabelSmoothingLoss(nn.Module):
    """KL(smoothed target || prediction), summed over the counted targets (Szegedy et al., 2016, section 7).

    The target class gets `1 - smoothing`, the other `size - 1` classes share `smoothing`. With smoothing 0 this is the
    cross entropy. The sum is divided by the number of counted targets (`normalize_length`) or by the batch size.
    """

    def __init__(self, size: int, padding_idx: int, smoothing: float, normalize_length: bool = False) -> None:
        super().__init__()
        self.size = size
        self.padding_idx = padding_idx
        self.smoothing = smoothing
        self.normalize_length = normalize_length

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """x: (B, T, V) scores. target: (B, T) class ids, `padding_idx` where nothing is asked. Returns a 0-d tensor."""
        counted = target != self.padding_idx
        divisor = int(counted.sum()) if self.normalize_length else target.size(0)
        return self.each(x[counted], target[counted]).sum() / divisor

    def each(self, scores: Tensor, classes: Tensor) -> Tensor:
        """The divergences of N predictions, (N,). scores: (N, V). classes: (N,)."""
        log_p = scores.log_softmax(dim=-1)
        log_p_target = log_p.gather(1, classes.unsqueeze(1)).squeeze(1)  # (N,)
        if self.smoothing == 0:
            return -log_p_target
        confidence = torch.tensor(1 - self.smoothing, dtype=log_p.dtype, device=log_p.device)
        share = torch.tensor(self.smoothing / (self.size - 1), dtype=log_p.dtype, device=log_p.device)
        negative_entropy = confidence * confidence.log() + self.smoothing * share.log()
        cross_entropy = -confidence * log_p_target - share * (log_p.sum(dim=-1) - log_p_target)
        return cross_entropy + negative_entropy
