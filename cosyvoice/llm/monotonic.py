"""A language model that walks through the text, for base models which learn to read from a few hours of speech."""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.llm.aligner import Aligner
from cosyvoice.llm.corruption import checked_share, corrupted
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.llm.speech_token_lm import MAX_TOKEN_TEXT_RATIO, MIN_TOKEN_TEXT_RATIO
from cosyvoice.transformer.cache import join_caches
from cosyvoice.utils.common import IGNORE_ID, pad_list, th_accuracy
from cosyvoice.utils.mask import make_pad_mask

MOST_TOKENS_PER_UNIT, MOST_BESIDE = 6, 25  # twice what is usual; a word that no one can read ends there
LARGEST_STEP = 7  # text units that are passed within one token, at most


class Prefix(NamedTuple):
    """What is read before the first new token."""

    lm_input: Tensor  # (1, L, C)
    text: Tensor  # (T, C), encoded
    place: int  # the unit of the text that the first new token says


class MonotonicLM(TransformerLM):
    """A `TransformerLM` that knows at each token which unit of the text it says.

    Attention to a text ahead of the speech takes many hours of speech to learn, and loses its way. Here the input of
    each position is the last token plus the encoded unit that the next token says, and the text comes in no other way.
    With each token the model also tells how many units are passed before the next one, 0 to `LARGEST_STEP`: a
    transducer (Graves 2012) whose alignment is given in training, as in ELLA-V (Song et al. 2024, section 3).

    Where the batch has no `text_place` (B, S), the unit that each speech token says, `aligner` finds it.

    `input_corruption` is the share of input speech tokens that are replaced by random ones in training mode, so that
    the model learns to go on after its own mistakes. Few-shot training keeps base models in evaluation mode.
    """

    can_be_captured = False  # what a step reads depends on the place

    def __init__(self, *arguments: Any, input_corruption: float = 0.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.input_corruption = checked_share(input_corruption)
        self.step = nn.Linear(self.llm_decoder.in_features, LARGEST_STEP + 1)
        self.aligner = Aligner(self.speech_token_size, self.text_embedding.num_embeddings)

    def forward(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """As `TransformerLM.forward`. `loss` counts tokens and steps: nats a token.

        In training mode with known places also `loss_aligner`, the aligner's own, which is to be added.
        """
        losses, _, accuracy, extra = self.token_losses(batch, device)
        divisor = len(losses) if self.criterion_ce.normalize_length else len(batch["text_token"])
        return {"loss": losses.sum() / divisor, "acc": accuracy, **extra}

    def clip_losses(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        losses, clips, accuracy, _ = self.token_losses(batch, device)
        return self.clip_sums(losses, clips, len(batch["text_token"])), accuracy

    def token_losses(
        self, batch: dict[str, Tensor], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Of all N speech and end tokens: losses (N,), their items of the batch (N,); accuracy; what `forward` adds."""
        text, text_lengths = batch["text_token"].to(device), batch["text_token_len"].to(device)
        speech, lengths = batch["speech_token"].to(device).clamp(min=0).long(), batch["speech_token_len"].to(device)
        if "text_place" in batch:
            place = batch["text_place"].to(device)
        else:
            place = self.aligner.places(speech, lengths, text, text_lengths)
        # the end is said at the last unit
        place = F.pad(place, (0, 1)).scatter(1, lengths.long().unsqueeze(1), text_lengths.long().unsqueeze(1) - 1)
        share = self.input_corruption if self.training else 0.0
        heard = corrupted(speech, share, self.speech_token_size)
        said = torch.cat((self.start(batch["embedding"].to(device)), self.speech_embedding(heard)), dim=1)
        lm_output, _ = self.llm(said + units_at(self.encode(text, text_lengths), place), lengths + 1)

        spoken, asked = (~make_pad_mask(count, place.size(1)) for count in (lengths, lengths + 1))
        target = F.pad(speech, (0, 1)).where(spoken, self.speech_token_size)[asked]
        lm_output, goes_on = lm_output[asked], spoken[asked]  # (N, C), (N,)
        scores = self.llm_decoder(lm_output).float()
        losses = self.criterion_ce.each(scores, target)
        steps = place.diff(dim=1)[spoken[:, :-1]].clamp(0, LARGEST_STEP)
        step_scores = self.step_scores(lm_output[goes_on], target[goes_on])
        losses = losses.index_add(0, goes_on.nonzero()[:, 0], F.cross_entropy(step_scores, steps, reduction="none"))
        extra = {}
        if self.training and "text_place" in batch:
            extra["loss_aligner"] = self.aligner.loss(speech, lengths, text.gather(1, place[:, :-1]))
        accuracy = th_accuracy(scores, target.unsqueeze(0), IGNORE_ID)
        return losses, asked.nonzero()[:, 0], accuracy, extra

    def start(self, embedding: Tensor) -> Tensor:
        """What stands in for the token before the first, (B, 1, C). embedding: (B, 192), or (0, 192) for no speaker."""
        sos = self.llm_embedding.weight[self.SOS].view(1, 1, -1)
        return sos + self.project_speaker(embedding) if len(embedding) else sos

    def step_scores(self, lm_output: Tensor, tokens: Tensor) -> Tensor:
        """Scores (N, LARGEST_STEP + 1) of the units passed after each token. lm_output: (N, C). tokens: (N,)."""
        return self.step(lm_output + self.speech_embedding(tokens)).float()

    # Decoding

    def bounds(
        self, text: Tensor, min_ratio: float = MIN_TOKEN_TEXT_RATIO, max_ratio: float = MAX_TOKEN_TEXT_RATIO
    ) -> tuple[int, int]:
        least, most = super().bounds(text, min_ratio, max_ratio)
        return least, min(most, MOST_TOKENS_PER_UNIT * text.size(1) + MOST_BESIDE)

    def inference_prefix(
        self, text: Tensor, prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor
    ) -> Prefix:
        """What is read before the first new token; arguments as in `inference`."""
        whole_text = torch.cat((prompt_text, text), dim=1)
        encoded = self.encode(whole_text, torch.tensor([whole_text.size(1)], device=text.device))
        place = prompt_text.size(1)
        places = torch.full((1, prompt_speech_token.size(1) + 1), place, device=text.device)
        if place:
            lengths = [torch.tensor([x.size(1)]) for x in (prompt_speech_token, prompt_text)]
            places[:, :-1] = self.aligner.places(prompt_speech_token, lengths[0], prompt_text, lengths[1])
        said = torch.cat((self.start(embedding), self.speech_embedding(prompt_speech_token)), dim=1)
        return Prefix(said + units_at(encoded, places), encoded[0], place)

    def following(self, prefix: Prefix, max_tokens: int) -> Generator[Tensor, int | None, None]:
        following = self.following_together([prefix], [0])
        log_p = next(following)
        while True:
            token = yield log_p[0]
            log_p = following.send([token])

    def following_together(
        self, prefixes: Sequence[Prefix], owners: Sequence[int]
    ) -> Generator[Tensor, Sequence[int], None]:
        """As `TransformerLM.following_together`. The end is impossible before the last unit of the text.

        A unit is passed where it is more likely over than not: each lasts its median length, and no draw is needed.
        """
        caches = [self.llm.new_cache() for _ in prefixes]
        read = zip(prefixes, caches, strict=True)
        outputs = [self.llm.forward_chunk(prefix.lm_input, cache)[:, -1] for prefix, cache in read]
        lm_output = torch.cat([outputs[i] for i in owners])  # (B, C)
        cache, starts = join_caches([caches[i] for i in owners])
        text = pad_list([prefixes[i].text for i in owners], 0.0)  # (B, T, C)
        last = torch.tensor([len(prefixes[i].text) - 1 for i in owners], device=text.device)
        place = torch.tensor([prefixes[i].place for i in owners], device=text.device)
        remains = torch.ones(len(owners), device=text.device)  # probability that the unit is not over yet
        while True:
            log_p = self.llm_decoder(lm_output).float().log_softmax(dim=-1)
            log_p[place < last, self.speech_token_size] = -torch.inf
            sent = yield log_p
            tokens = torch.tensor(sent, device=text.device)
            steps = self.step_scores(lm_output, tokens).softmax(dim=-1)
            remains = remains * steps[:, 0]
            over = remains < 0.5
            place = place.where(~over, (place + 1 + steps[:, 1:].argmax(dim=-1)).minimum(last))
            remains = remains.where(~over, 1.0)
            lm_input = self.speech_embedding(tokens).unsqueeze(1) + units_at(text, place.unsqueeze(1))
            lm_output = self.llm.forward_chunk(lm_input, cache, starts)[:, -1]


def units_at(text: Tensor, place: Tensor) -> Tensor:
    """The encoded units (B, N, C) at the places (B, N) of the text (B, T, C)."""
    return text.gather(1, place.unsqueeze(2).expand(-1, -1, text.size(2)))
