"""Training of CosyVoice2's language model from a few hours of speech, by telling it where in the text it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.llm.corruption import checked_share, corrupted
from cosyvoice.llm.qwen2_decoding import rotated, rotation
from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.runtime.errors import InputError

HEAD = 0  # of each guided layer
NEAR = 1  # text tokens to either side of the right one that are right, too


class GuidedQwen2LM(Qwen2LM):
    """A `Qwen2LM` in training: one attention head of some layers is drawn to the text that is being said.

    A large model finds the place in the text by itself, after many thousands of hours. Guided attention (Tachibana et
    al. 2018, section 3.3) shows it, here from places that are known. The weights are those of a `Qwen2LM`, and so is
    everything that it does where places are not known.
    """

    def __init__(
        self,
        *arguments: Any,
        guided_layers: Sequence[int],
        bistream_share: float = 0.5,
        input_corruption: float = 0.0,
        **options: Any,
    ) -> None:
        """guided_layers: their numbers, from 0. bistream_share: of the clips, in which text and speech take turns.

        input_corruption: share of the speech tokens that are read as random ones in training. Raises InputError for
        layers that are not there, and shares outside 0 to 1.
        """
        super().__init__(*arguments, **options)
        if not guided_layers or not set(guided_layers) <= set(range(len(self.llm.layers))):
            raise InputError(f"guided_layers {list(guided_layers)} must be some of the {len(self.llm.layers)} layers")
        self.guided = [self.llm.layers[number].self_attn for number in guided_layers]
        self.bistream_share = bistream_share
        self.input_corruption = checked_share(input_corruption)

    def forward(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """As `Qwen2LM.forward`. In training mode with known places also `loss_aligner`, which is to be added.

        batch: also `text_place` (B, S), the text token that each speech token says.
        """
        if not self.training or "text_place" not in batch:
            return super().forward(batch, device)
        batch = batch | {"bistream": self.drawn_layouts(batch)}
        with self.listening() as scores:
            losses = super().forward(batch, device)
        rows, columns = guided_places(batch, device)
        return losses | {"loss_aligner": torch.stack([guide_loss(score, rows, columns) for score in scores]).mean()}

    def heard(self, speech: Tensor) -> Tensor:
        return corrupted(speech, self.input_corruption if self.training else 0.0, self.speech_token_size)

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Collect the scores (B, L, L) of each guided head while the model reads; later frames are minus infinity."""
        scores: list[Tensor] = []

        def collect(attention: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
            scores.append(self.head_scores(attention, inputs["hidden_states"]))

        hooks = [attention.register_forward_pre_hook(collect, with_kwargs=True) for attention in self.guided]
        try:
            yield scores
        finally:
            for hook in hooks:
                hook.remove()

    def head_scores(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, L)."""
        size = self.llm.head_size
        chosen = slice(HEAD * size, (HEAD + 1) * size)
        linears = attention.q_proj, attention.k_proj
        query, key = (F.linear(hidden, linear.weight[chosen], linear.bias[chosen]) for linear in linears)
        turn = rotation(torch.arange(hidden.size(1), device=hidden.device)[None], size, self.llm.rotary_base)
        query, key = (rotated(part.unsqueeze(1).float(), turn)[:, 0] for part in (query, key))
        scores = query @ key.transpose(1, 2) / size**0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf)


def guided_places(batch: dict[str, Tensor], device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return item and row (N,) of each frame that a speech token follows, and the columns (N, 2 NEAR + 1) of its text.

    Of items without turns only; the text begins behind the start mark. Columns outside of the text are those of its
    ends.
    """
    texts, spoken = batch["text_token_len"].to(device).long(), batch["speech_token_len"].to(device)
    place = batch["text_place"].to(device).long()  # (B, S)
    counts = torch.arange(place.size(1), device=device) < spoken.unsqueeze(1)
    item, token = (counts & ~batch["bistream"].to(device).unsqueeze(1)).nonzero(as_tuple=True)
    near = place[item, token].unsqueeze(1) + torch.arange(-NEAR, NEAR + 1, device=device)
    columns = 1 + near.clamp(min=0).minimum(texts[item].unsqueeze(1) - 1)
    return (item, 1 + texts[item] + token), columns


def guide_loss(scores: Tensor, rows: tuple[Tensor, Tensor], columns: Tensor) -> Tensor:
    """Return the mean of minus the log of the attention (B, L, L before softmax) that these rows pay to the columns."""
    if not len(columns):
        return scores.new_zeros(())
    chosen = scores[rows]  # (N, L)
    wanted = torch.full_like(chosen, -torch.inf).scatter(1, columns, chosen.gather(1, columns))
    return (chosen.logsumexp(dim=1) - wanted.logsumexp(dim=1)).mean()
