"""Which unit of a text each of its speech tokens says."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.utils.mask import make_pad_mask

SKIPPED = 2.0  # nats that passing over a unit costs: blanks are never said, a comma not always
MOST_SKIPPED = 3  # units at once


class Aligner(nn.Module):
    """Tells the unit from some tokens around; the best monotonic path through the text does the rest (Viterbi 1967)."""

    def __init__(self, speech_token_size: int, text_token_size: int, channels: int = 96, kernel_size: int = 9) -> None:
        super().__init__()
        self.embedding = nn.Embedding(speech_token_size, channels)
        self.context = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.units = nn.Linear(channels, text_token_size)

    def log_probabilities(self, speech: Tensor, lengths: Tensor) -> Tensor:
        """Of each unit at each token, (B, S, V). speech: (B, S) ids; lengths: (B,)."""
        inside = ~make_pad_mask(lengths.to(speech.device), speech.size(1))
        embedded = self.embedding(speech) * inside.unsqueeze(2)
        return self.units(F.gelu(self.context(embedded.transpose(1, 2))).transpose(1, 2)).float().log_softmax(dim=-1)

    def loss(self, speech: Tensor, lengths: Tensor, units: Tensor) -> Tensor:
        """Cross entropy in nats a token, 0-d. units: (B, S), what each token says."""
        log_p = self.log_probabilities(speech, lengths)
        inside = ~make_pad_mask(lengths, speech.size(1))
        return F.nll_loss(log_p[inside], units[inside].long())

    @torch.no_grad()
    def places(self, speech: Tensor, lengths: Tensor, text: Tensor, text_lengths: Tensor) -> Tensor:
        """The place in the text that each token says, (B, S), never going back; 0 beyond the lengths.

        speech: (B, S) ids, lengths: (B,). text: (B, T) ids, text_lengths: (B,).
        """
        log_p = self.log_probabilities(speech, lengths).cpu()
        places = torch.zeros_like(speech, dtype=torch.long)
        sizes = zip(lengths.tolist(), text_lengths.tolist(), strict=True)
        for item, (tokens, units) in enumerate(sizes):
            if tokens and units:
                path = monotonic_path(log_p[item, :tokens, text[item, :units].cpu().long()])
                places[item, :tokens] = path.to(places.device)
        return places


def monotonic_path(scores: Tensor) -> Tensor:
    """The path (S,) of columns, from the first on and never back, of the highest sum of `scores` (S, T)."""
    count, units = scores.shape
    skipping = torch.tensor([0.0, 0.0, *(-SKIPPED * (n + 1) for n in range(MOST_SKIPPED))])  # of a step of 0, 1, ...
    best = scores.new_full((units,), -torch.inf)
    starts = range(min(units, MOST_SKIPPED + 1))
    best[: len(starts)] = scores[0, : len(starts)] - SKIPPED * torch.tensor([*starts])
    steps = torch.zeros(count, units, dtype=torch.long)
    for token in range(1, count):
        padded = F.pad(best, (len(skipping) - 1, 0), value=-torch.inf)
        before = padded.unfold(0, len(skipping), 1).flip(1) + skipping  # (T, steps): each unit from those before it
        best, steps[token] = before.max(dim=1)
        best = best + scores[token]
    left = SKIPPED * torch.arange(units - 1, -1, -1)  # units that would stay unsaid
    place = int((best - left).argmax())
    path = torch.empty(count, dtype=torch.long)
    for token in range(count - 1, -1, -1):
        path[token] = place
        place -= int(steps[token, place])
    return path
