"""A pull on attention, from speech to the text that it says, which teaches a model from scratch to read in order."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cosyvoice.utils.errors import InputError

BEFORE_TEXT = 2  # positions of a sequence ahead of its text: start and speaker


class AttentionGuide:
    """Guided attention (Tachibana et al., 2018, section 4.1) for one head in some blocks of the language model.

    Where speech is a share n / N through, attention shall lie on the text near the share t / T of it; where it is known
    which text token each speech token says (`text_place` of the batch), near that one. Unlike in the paper, whose
    attention sees text only, what lies off the text costs as much as what lies far from the right place.
    """

    def __init__(
        self, layers: Sequence[int], head: int = 0, weight: float = 1.0, width: float = 0.15, tokens: float = 1.5
    ) -> None:
        """layers: blocks, counted from 0. weight: of the term.

        width: of the diagonal, as a share of the text. tokens: how far from a known place, in text tokens.
        """
        self.layers, self.head, self.weight, self.width, self.tokens = layers, head, weight, width, tokens

    @classmethod
    def of(cls, settings: Mapping[str, Any], num_blocks: int, num_heads: int) -> "AttentionGuide":
        """From the YAML's mapping. Raises InputError for what does not fit a stack of this many blocks and heads."""
        known = {"layers", "head", "weight", "width", "tokens"}
        if not isinstance(settings, Mapping) or "layers" not in settings or settings.keys() - known:
            raise InputError(f"guided_attention takes layers and maybe head, weight, width, tokens, not {settings}")
        guide = cls(**settings)
        layers = guide.layers if isinstance(guide.layers, list | tuple) else ()
        if not layers or not all(layer in range(num_blocks) for layer in layers) or len({*layers}) < len(layers):
            raise InputError(f"guided_attention: layers lists blocks from 0 to {num_blocks - 1}, not {guide.layers}")
        if guide.head not in range(num_heads):
            raise InputError(f"guided_attention: head is one of 0 to {num_heads - 1}, not {guide.head}")
        for name in ("weight", "width", "tokens"):
            value = getattr(guide, name)
            if not isinstance(value, int | float) or not value > 0:
                raise InputError(f"guided_attention: {name} must be above 0, not {value}")
        return guide

    def loss(
        self,
        weights: Sequence[Tensor],
        text_lengths: Tensor,
        speech_lengths: Tensor,
        text_place: Tensor | None = None,
    ) -> Tensor:
        """The weighted share of attention that misses its place, mean over blocks and speech positions, 0-d.

        weights: (B, L, L) for each block. text_lengths, speech_lengths: (B,); the speech counts its task mark.
        text_place: (B, S), the text token that each speech token says, where that is known.
        """
        frames = weights[0].size(1)
        t = torch.arange(frames, device=text_lengths.device) - BEFORE_TEXT  # (L,)
        text, speech = text_lengths.unsqueeze(1), speech_lengths.unsqueeze(1)  # (B, 1)
        n = t - text  # (B, L), from 0 at the task mark
        reading, speaking = (t >= 0) & (t < text), (n >= 0) & (n < speech)
        if text_place is None:
            distance = ((n / speech).unsqueeze(2) - (t / text).unsqueeze(1)) / self.width  # (B, L, 1) - (B, 1, L)
        else:  # position n predicts token n, and the last one the end, which follows all text
            place = text_place.gather(1, n.clamp(0, text_place.size(1) - 1)).where(n < speech - 1, text - 1)
            distance = (place.unsqueeze(2) - t) / self.tokens
        near = torch.exp(-(distance**2) / 2) * reading.unsqueeze(1)  # (B, L, L)
        missed = [1 - (attention * near).sum(dim=-1)[speaking] for attention in weights]
        return self.weight * torch.cat(missed).mean()
