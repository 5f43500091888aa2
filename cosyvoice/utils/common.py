"""Padding, accuracy, cross-fades, and the samplers that choose a speech token from log-probabilities."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cosyvoice.runtime.draws import generator

IGNORE_ID = -1  # targets that losses and accuracies skip


def set_all_random_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators with this number, as servers and notebooks do."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pad_list(xs: Sequence[Tensor], pad_value: float) -> Tensor:
    """Stack sequences of different lengths: a list of (T_i, ...) -> (B, max T_i, ...), filled with `pad_value`."""
    return torch.nn.utils.rnn.pad_sequence(list(xs), batch_first=True, padding_value=pad_value)


def th_accuracy(pad_outputs: Tensor, pad_targets: Tensor, ignore_label: int) -> Tensor:
    """Return the share of targets that are the most probable class, a 0-d float tensor.

    pad_outputs: (B * T, V) scores. pad_targets: (B, T).
    """
    predicted = pad_outputs.view(*pad_targets.shape, -1).argmax(dim=-1)
    counted = pad_targets != ignore_label
    return (predicted[counted] == pad_targets[counted]).float().mean()


def fade_in_out(fade_in: Tensor, fade_out: Tensor, window: Tensor) -> Tensor:
    """Cross-fade the start of `fade_in` (..., T) with the end of `fade_out` (..., S). With S = 0 nothing changes.

    The first half of the float64 `window` weighs `fade_in`, the second half `fade_out`.
    """
    if fade_out.shape[-1] == 0:
        return fade_in
    rising, falling = window.chunk(2)
    length = rising.shape[0]
    faded = fade_in[..., :length] * rising + fade_out[..., -length:] * falling
    return torch.cat([faded.to(fade_in.dtype), fade_in[..., length:]], dim=-1)


def ras_sampling(
    weighted_scores: Tensor,
    decoded_tokens: Sequence[int],
    sampling: int,
    top_p: float = 0.8,
    top_k: int = 25,
    win_size: int = 10,
    tau_r: float = 0.1,
) -> int:
    """Draw a token by repetition-aware sampling (VALL-E 2, section 3.3): nucleus sampling with a way out of loops.

    If a nucleus draw already makes up at least `tau_r` of the last `win_size` tokens, it is excluded, and the token is
    drawn from the whole remaining distribution.

    weighted_scores: (V,) log-probabilities, not modified. decoded_tokens: the tokens accepted so far.
    sampling: part of every sampler's signature; it has no effect here.
    """
    token = nucleus_sampling(weighted_scores, top_p=top_p, top_k=top_k)
    repetitions = list(decoded_tokens[-win_size:]).count(token)
    if repetitions >= win_size * tau_r:
        others = weighted_scores.clone()
        others[token] = -torch.inf
        token = random_sampling(others, decoded_tokens, sampling)
    return token


def nucleus_candidates(weighted_scores: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the most probable tokens, until their sum reaches `top_p` (crossing token included) or there are `top_k`.

    The results are their probabilities in descending order, not renormalised, and their ids, both (N,).
    """
    probabilities, ids = most_probable(weighted_scores.softmax(dim=0), top_k)
    mass_before = probabilities.cumsum(dim=0) - probabilities
    taken = int((mass_before < top_p).sum())
    return probabilities[:taken], ids[:taken]


def most_probable(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest probabilities (at most all) in descending order, and their ids; ties by ascending id.

    A stable sort of the whole vocabulary begins in the same way, but takes ten times as long.
    """
    if count >= len(probabilities):
        return probabilities.sort(descending=True, stable=True)
    values, ids = probabilities.topk(count + 1)
    if values[-2] == values[-1]:  # a tie at the border: topk does not say which it takes
        values, ids = probabilities.sort(descending=True, stable=True)
    ids = ids[:count].sort().values
    values, order = probabilities[ids].sort(descending=True, stable=True)
    return values, ids[order]


def nucleus_sampling(weighted_scores: Tensor, top_p: float = 0.8, top_k: int = 25) -> int:
    """Draw one of the `nucleus_candidates` (Holtzman et al., 2020, section 3.1). weighted_scores: (V,)."""
    probabilities, ids = nucleus_candidates(weighted_scores, top_p, top_k)
    return int(ids[probabilities.multinomial(1, replacement=True, generator=generator())])


def random_sampling(weighted_scores: Tensor, decoded_tokens: Sequence[int], sampling: int) -> int:
    """Draw from the whole distribution. weighted_scores: (V,); the others belong to every sampler's signature."""
    return int(weighted_scores.softmax(dim=0).multinomial(1, replacement=True, generator=generator()))
