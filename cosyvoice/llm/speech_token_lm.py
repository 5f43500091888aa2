"""How a language model writes speech tokens, whatever it reads before them: sampling, takes, several texts at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.cache import join_caches
from cosyvoice.transformer.decoding import MOST_CAPTURED_FRAMES, CapturedStepsPool
from cosyvoice.transformer.label_smoothing_loss import LabelSmoothingLoss
from cosyvoice.transformer.precision import LINEARS, Convert, conversion
from cosyvoice.utils.common import IGNORE_ID, th_accuracy
from matcha.models.components.past import KeyValueCache

Sampler = Callable[[Tensor, Sequence[int], int], int]

MIN_TOKEN_TEXT_RATIO, MAX_TOKEN_TEXT_RATIO = 2, 20  # speech tokens a text token
PACE_ROOM = 1.5  # times the slowest pace of the speaker's clips: speech that takes longer has lost its text
SHORT_TEXT_TOKENS = 10  # shorter texts get the time of this many, for pauses and words that are spelled out


class SpeechTokenLM(nn.Module, ABC):
    """A language model that reads text and writes speech tokens.

    Ids below `speech_token_size` are speech. The id `speech_token_size` ends it, and so does any that may follow.

    A subclass sets `llm`, the stack that reads a growing sequence, and the layers around it. Its `predictions` and
    `inference_prefix` say what the stack reads.
    """

    SOS, TASK = 0, 1  # rows of llm_embedding
    can_be_captured = True  # a step of decoding, as a CUDA graph
    forms: Mapping[str, Convert] = LINEARS  # of its linear layers, by precision
    pace: float | None = None  # the slowest of the speaker's clips, in speech tokens per text token, if known

    llm: nn.Module
    llm_embedding: nn.Embedding
    llm_decoder: nn.Module
    speech_embedding: nn.Embedding

    def __init__(
        self,
        speech_token_size: int,
        special_tokens: int,
        sampling: Sampler,
        length_normalized_loss: bool,
        lsm_weight: float,
        takes: int = 1,
    ) -> None:
        """special_tokens: how many ids follow those of speech. The others are those of `TransformerLM`."""
        super().__init__()
        if type(takes) is not int or takes < 1:
            raise InputError(f"takes is a whole number of at least 1, not {takes}")
        self.takes = takes
        self.speech_token_size = speech_token_size
        self.criterion_ce = LabelSmoothingLoss(
            speech_token_size + special_tokens, IGNORE_ID, smoothing=lsm_weight, normalize_length=length_normalized_loss
        )
        self.sampling = sampling
        self.captured: CapturedStepsPool | None = None

    @abstractmethod
    def predictions(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores (N, V) of all speech and end tokens, these tokens (N,), and their items of the batch (N,)."""

    @abstractmethod
    def inference_prefix(
        self, text: Tensor, prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor
    ) -> Tensor:
        """Return what is read before the first new token, (1, L, C); arguments as in `inference`."""

    @abstractmethod
    def prepare_stack(self, convert: Convert) -> None:
        """Give the stack its decoding form, in place."""

    def forward(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return cross entropy and accuracy of the next speech token, teacher-forced.

        batch: `text_token` (B, T) with `text_token_len` (B,), `speech_token` (B, S) with `speech_token_len` (B,) and
        `embedding` (B, 192). Returns `loss` (nats, mean over all speech and end tokens of the batch) and `acc`.
        """
        scores, classes, _ = self.predictions(batch, device)
        loss, accuracy = self.loss_and_accuracy(scores, classes, len(batch["text_token"]))
        return {"loss": loss, "acc": accuracy}

    def loss_and_accuracy(self, scores: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the loss and the accuracy of N predictions, scores (N, V) of classes (N,), in `count` clips."""
        loss = self.criterion_ce(scores.unsqueeze(0), classes.unsqueeze(0))
        if not self.criterion_ce.normalize_length:
            loss = loss / count
        return loss, th_accuracy(scores, classes.unsqueeze(0), IGNORE_ID)

    def clip_losses(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the loss of each clip, (B,), that `forward` gives for it alone, and the accuracy over all of them."""
        scores, classes, clips = self.predictions(batch, device)
        losses = self.clip_sums(self.criterion_ce.each(scores, classes), clips, len(batch["text_token"]))
        return losses, th_accuracy(scores, classes.unsqueeze(0), IGNORE_ID)

    def clip_sums(self, token_losses: Tensor, clips: Tensor, count: int) -> Tensor:
        """Return the loss of each of `count` clips: the mean of its tokens' losses, or the sum where `forward` sums."""
        losses = token_losses.new_zeros(count).index_add(0, clips, token_losses)
        return losses / clips.bincount() if self.criterion_ce.normalize_length else losses

    def prepare_decoding(self, precision: str = "float32") -> None:
        """Give the weights that `inference` reads at every token their fastest form, once.

        precision: a name in `LINEARS`. Names of weights change, so this is for a model that only speaks from now on.
        """
        convert = conversion(self, precision, self.forms)
        self.prepare_stack(convert)
        self.llm_decoder = convert(self.llm_decoder)
        if self.can_be_captured and self.llm_embedding.weight.is_cuda:
            self.captured = CapturedStepsPool(self.llm, self.speech_embedding, self.llm_decoder)

    @torch.inference_mode()
    def inference(
        self,
        text: Tensor,
        text_len: Tensor,
        prompt_text: Tensor,
        prompt_text_len: Tensor,
        prompt_speech_token: Tensor,
        prompt_speech_token_len: Tensor,
        embedding: Tensor,
        sampling: int = 25,
        max_token_text_ratio: float = MAX_TOKEN_TEXT_RATIO,
        min_token_text_ratio: float = MIN_TOKEN_TEXT_RATIO,
    ) -> Iterator[int]:
        """Yield speech tokens one by one until the end token, or until `max_token_text_ratio` per text token.

        text: (1, T). prompt_text: (1, P), prompt_speech_token: (1, Q), both may be empty. embedding: (1, 192), or
        (0, 192) for no speaker position at all. The end token is forbidden below `min_token_text_ratio` per text token.
        Raises InputError for empty text.
        """
        min_tokens, max_tokens = self.bounds(text, min_token_text_ratio, max_token_text_ratio)
        following = self.following(self.inference_prefix(text, prompt_text, prompt_speech_token, embedding), max_tokens)
        tokens: list[int] = []
        token = None  # starts `following`
        while len(tokens) < max_tokens:
            token = self.choose(following.send(token), tokens, min_tokens, sampling)
            if token >= self.speech_token_size:
                return
            tokens.append(token)
            yield token

    @torch.inference_mode()
    def best_take(
        self, text: Tensor, prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor, sampling: int = 25
    ) -> list[int]:
        """Return the likeliest of `takes` takes, each of which `inference` might yield; arguments as there.

        Raises InputError for empty text.
        """
        bounds = self.bounds(text)
        prefix = self.inference_prefix(text, prompt_text, prompt_speech_token, embedding)
        return self.likeliest([prefix], [bounds], [nullcontext()], sampling, self.takes)[0]

    @torch.inference_mode()
    def inference_together(
        self, texts: Sequence[Tensor], embedding: Tensor, draws: Sequence[AbstractContextManager], sampling: int = 25
    ) -> list[list[int]]:
        """Return the tokens of several texts in one voice. A step reads each weight once for all of them.

        texts: (1, T) each. embedding: (1, 192). draws: entered while a token of that text is drawn. Each text gets the
        tokens that `best_take` would give it, up to rounding.
        """
        none = texts[0][:, :0]
        if len(texts) == 1 and self.takes == 1 and self.captured is not None:
            length, no_length = (torch.tensor([x.size(1)], device=x.device) for x in (texts[0], none))
            with draws[0]:
                tokens = self.inference(texts[0], length, none, no_length, none, no_length, embedding, sampling)
                return [list(tokens)]
        prefixes = [self.inference_prefix(text, none, none, embedding) for text in texts]
        return self.likeliest(prefixes, [self.bounds(text) for text in texts], draws, sampling, self.takes)

    def likeliest(
        self,
        prefixes: Sequence[Tensor],
        bounds: Sequence[tuple[int, int]],
        draws: Sequence[AbstractContextManager],
        sampling: int,
        takes: int,
    ) -> list[list[int]]:
        """Return the tokens after each prefix (1, L, C): of all takes that end, the one of best mean log-probability.

        bounds: least and most tokens of each. draws: as in `inference_together`, one for all takes of a prefix.
        """
        owners = [i for i in range(len(prefixes)) for _ in range(takes)]  # of each row that is written
        following = self.following_together(prefixes, owners)
        scores = next(following).cpu()
        tokens: list[list[int]] = [[] for _ in owners]
        likelihood = [0.0] * len(owners)
        merits: dict[int, tuple[bool, float]] = {}  # of finished rows: whether it ended, and its mean log-probability
        while True:
            for row in [row for row in range(len(owners)) if row not in merits]:
                least, most = bounds[owners[row]]
                with draws[owners[row]]:
                    token = self.choose(scores[row], tokens[row], least, sampling)
                likelihood[row] += float(scores[row, token])
                ended = token >= self.speech_token_size
                if not ended:
                    tokens[row].append(token)
                if ended or len(tokens[row]) >= most:
                    merits[row] = ended, likelihood[row] / (len(tokens[row]) + ended)
            if len(merits) == len(owners):
                break
            last = [(written or [0])[-1] for written in tokens]  # a finished one goes on unheard
            scores = following.send(last).cpu()
        rows = [max(range(i * takes, (i + 1) * takes), key=merits.__getitem__) for i in range(len(prefixes))]
        return [tokens[row] for row in rows]

    def following(self, prefix: Tensor, max_tokens: int) -> Generator[Tensor, int | Tensor | None, None]:
        """Yield log-probabilities (V,) of what follows `prefix` (1, L, C), then of what follows each token sent.

        The next ones may overwrite them. Frames (1, N, C) can be sent, too. After `max_tokens` steps may be slower.
        """
        frames = prefix.size(1) + max_tokens
        read: int | Tensor = prefix
        if self.captured is None or frames > MOST_CAPTURED_FRAMES:
            cache = self.llm.new_cache()
        else:
            with self.captured.lent(frames) as steps:
                while steps.has_room(1 if isinstance(read, int) else read.size(1)):
                    if isinstance(read, int):
                        read = yield steps.after(read)
                    else:
                        read = yield self.next_log_probabilities(read, steps.cache)
                cache, _ = join_caches([steps.cache])  # a copy, which grows
        while True:
            if isinstance(read, int):
                read = self.speech_embedding.weight[read].view(1, 1, -1)
            read = yield self.next_log_probabilities(read, cache)

    def following_together(
        self, prefixes: Sequence[Tensor], owners: Sequence[int]
    ) -> Generator[Tensor, Sequence[int], None]:
        """Yield log-probabilities (B, V) of what follows each owner's prefix, then of what follows B tokens sent."""
        caches, scores = [], []
        for prefix in prefixes:
            caches.append(self.llm.new_cache())
            scores.append(self.next_log_probabilities(prefix, caches[-1]))
        cache, starts = join_caches([caches[i] for i in owners])
        log_p = torch.stack([scores[i] for i in owners])
        while True:
            tokens = yield log_p
            lm_output = self.llm.forward_chunk(self.speech_embedding.weight[tokens].unsqueeze(1), cache, starts)
            log_p = self.llm_decoder(lm_output[:, -1]).float().log_softmax(dim=-1)

    def bounds(
        self, text: Tensor, min_ratio: float = MIN_TOKEN_TEXT_RATIO, max_ratio: float = MAX_TOKEN_TEXT_RATIO
    ) -> tuple[int, int]:
        """Return the least and most speech tokens that `text` (1, T) may get. Raises InputError for empty text."""
        least = int(text.size(1) * min_ratio)
        return least, max(least, self.most_tokens(text.size(1), max_ratio))

    def most_tokens(self, text_tokens: int, max_ratio: float) -> int:
        """Return the most speech tokens that so many text tokens may get. Raises InputError if there is no text.

        Where the speaker's `pace` is known, it also limits them, so that a voice which talks on is cut.
        """
        if text_tokens == 0:
            raise InputError("there is no text to speak: give at least one word")
        most = int(text_tokens * max_ratio)
        if self.pace is None:
            return most
        return min(most, int(PACE_ROOM * self.pace * max(text_tokens, SHORT_TEXT_TOKENS)))

    def choose(self, log_p: Tensor, tokens: Sequence[int], min_tokens: int, sampling: int) -> int:
        """Draw the token that follows `tokens`, which do not end before there are `min_tokens`. log_p: (V,)."""
        specials = range(self.speech_token_size, len(log_p))
        return self.sample(log_p, tokens, specials if len(tokens) < min_tokens else (), sampling)

    def sample(self, log_p: Tensor, tokens: Sequence[int], forbidden: Sequence[int], sampling: int) -> int:
        """Draw the token that follows `tokens` and is none of the forbidden. log_p: (V,)."""
        log_p = log_p.cpu()  # a sampler asks many small questions
        log_p[list(forbidden)] = -torch.inf
        return self.sampling(log_p, tokens, sampling)

    def next_log_probabilities(self, lm_input: Tensor, cache: list[KeyValueCache]) -> Tensor:
        """Read (1, N, C) more and return the log-probabilities (V,) of the token that follows; `cache` grows."""
        lm_output = self.llm.forward_chunk(lm_input, cache)
        return self.llm_decoder(lm_output[:, -1])[0].float().log_softmax(dim=-1)
