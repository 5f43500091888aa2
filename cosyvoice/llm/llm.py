"""The language model from text to speech tokens (CosyVoice, Du et al., 2024, section 3.2)."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.transformer.decoding import MOST_CAPTURED_FRAMES, CapturedStepsPool, prepare_stack
from cosyvoice.transformer.encoder import ConformerEncoder, TransformerEncoder
from cosyvoice.transformer.label_smoothing_loss import LabelSmoothingLoss
from cosyvoice.transformer.precision import conversion
from cosyvoice.utils.common import IGNORE_ID, pad_list, th_accuracy
from cosyvoice.utils.errors import InputError

Sampler = Callable[[Tensor, Sequence[int], int], int]

MIN_TOKEN_TEXT_RATIO, MAX_TOKEN_TEXT_RATIO = 2, 20  # speech tokens a text token
PACE_ROOM = 1.5  # times the slowest pace of the speaker's clips: speech that takes longer has lost its text
SHORT_TEXT_TOKENS = 10  # shorter texts get the time of this many, for pauses and words that are spelled out


class TransformerLM(nn.Module):
    """Predicts the speech tokens that follow: start, speaker, encoded text, task mark.

    Id `speech_token_size` ends the speech. The speaker vector is normalised before its projection.

    `takes` helps a model that loses its way now and then: of so many takes of a text the likeliest is spoken.
    """

    SOS, TASK = 0, 1  # rows of llm_embedding
    can_be_captured = True  # a step of decoding, as a CUDA graph
    pace: float | None = None  # the slowest of the speaker's clips, in speech tokens per text token, if known

    def __init__(
        self,
        text_encoder_input_size: int,
        llm_input_size: int,
        llm_output_size: int,
        text_token_size: int,
        speech_token_size: int,
        text_encoder: ConformerEncoder,
        llm: TransformerEncoder,
        sampling: Sampler,
        length_normalized_loss: bool = True,
        lsm_weight: float = 0.0,
        spk_embed_dim: int = 192,
        takes: int = 1,
    ) -> None:
        super().__init__()
        if type(takes) is not int or takes < 1:
            raise InputError(f"takes is a whole number of at least 1, not {takes}")
        self.takes = takes
        self.speech_token_size = speech_token_size
        self.text_embedding = nn.Embedding(text_token_size, text_encoder_input_size)
        self.text_encoder = text_encoder
        self.text_encoder_affine_layer = nn.Linear(text_encoder.output_size(), llm_input_size)
        self.llm_embedding = nn.Embedding(2, llm_input_size)
        self.llm = llm
        self.llm_decoder = nn.Linear(llm_output_size, speech_token_size + 1)
        self.criterion_ce = LabelSmoothingLoss(
            speech_token_size + 1, IGNORE_ID, smoothing=lsm_weight, normalize_length=length_normalized_loss
        )
        self.speech_embedding = nn.Embedding(speech_token_size, llm_input_size)
        self.spk_embed_affine_layer = nn.Linear(spk_embed_dim, llm_input_size)
        self.sampling = sampling
        self.captured: CapturedStepsPool | None = None

    def encode(self, text: Tensor, text_lengths: Tensor) -> Tensor:
        """text: (B, T) ids, text_lengths: (B,). Returns (B, T, C), the text as the language model reads it."""
        encoded, _ = self.text_encoder(self.text_embedding(text), text_lengths, decoding_chunk_size=1)
        return self.text_encoder_affine_layer(encoded)

    def project_speaker(self, embedding: Tensor) -> Tensor:
        """embedding: (B, 192) -> (B, 1, C). A zero vector stays zero before the projection."""
        dtype = self.spk_embed_affine_layer.weight.dtype
        return self.spk_embed_affine_layer(F.normalize(embedding, dim=1).to(dtype)).unsqueeze(1)

    def forward(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Cross entropy and accuracy of the next speech token, teacher-forced.

        batch: `text_token` (B, T) with `text_token_len` (B,), `speech_token` (B, S) with `speech_token_len` (B,) and
        `embedding` (B, 192). Returns `loss` (nats, mean over all speech and end tokens of the batch) and `acc`.
        """
        scores, classes, _ = self.predictions(batch, device)
        loss = self.criterion_ce(scores.unsqueeze(0), classes.unsqueeze(0))
        if not self.criterion_ce.normalize_length:
            loss = loss / len(batch["text_token"])
        return {"loss": loss, "acc": th_accuracy(scores, classes.unsqueeze(0), IGNORE_ID)}

    def clip_losses(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """What `forward` would give as the loss of each clip alone, (B,), and the accuracy over all of them."""
        scores, classes, clips = self.predictions(batch, device)
        losses = self.clip_sums(self.criterion_ce.each(scores, classes), clips, len(batch["text_token"]))
        return losses, th_accuracy(scores, classes.unsqueeze(0), IGNORE_ID)

    def clip_sums(self, token_losses: Tensor, clips: Tensor, count: int) -> Tensor:
        """The loss of each of `count` clips: the mean of its tokens' losses, or the sum where `forward` sums."""
        losses = token_losses.new_zeros(count).index_add(0, clips, token_losses)
        return losses / clips.bincount() if self.criterion_ce.normalize_length else losses

    def predictions(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of all N speech and end tokens: scores (N, V), the tokens (N,), their items of the batch (N,)."""
        text, text_lengths = batch["text_token"].to(device), batch["text_token_len"].to(device)
        speech, speech_lengths = batch["speech_token"].to(device), batch["speech_token_len"].to(device)
        text_embeddings = self.encode(text, text_lengths)
        speaker = self.project_speaker(batch["embedding"].to(device))
        lm_input, lm_lengths = self.join(text_embeddings, text_lengths, speaker, speech, speech_lengths)
        target = self.targets(text_lengths, speech, speech_lengths)
        lm_output, _ = self.llm(lm_input, lm_lengths)
        counted = target != IGNORE_ID  # the head is applied only where a token is asked
        return self.llm_decoder(lm_output[counted]).float(), target[counted], counted.nonzero()[:, 0]

    def join(
        self, text: Tensor, text_lengths: Tensor, speaker: Tensor, speech: Tensor, speech_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lay out each item as start, speaker, text, task mark, speech tokens, and pad anew.

        text: (B, T, C), speaker: (B, 1, C), speech: (B, S) ids. Returns (B, L, C) and lengths (B,) = 3 + text + speech.
        """
        sos, task = self.llm_embedding.weight.unsqueeze(1)  # (1, C) each
        speech_embeddings = self.speech_embedding(speech.clamp(min=0))
        items = [
            torch.cat((sos, speaker[i], text[i, : text_lengths[i]], task, speech_embeddings[i, : speech_lengths[i]]))
            for i in range(text.size(0))
        ]
        lengths = torch.tensor([len(item) for item in items], device=text.device)
        return pad_list(items, IGNORE_ID), lengths

    def targets(self, text_lengths: Tensor, speech: Tensor, speech_lengths: Tensor) -> Tensor:
        """(B, L): nothing is asked while the text is read; the task mark asks for the first speech token."""
        items = []
        for text_length, tokens, length in zip(text_lengths.tolist(), speech, speech_lengths.tolist(), strict=True):
            spoken = F.pad(tokens[:length].long(), (2 + text_length, 0), value=IGNORE_ID)
            items.append(F.pad(spoken, (0, 1), value=self.speech_token_size))
        return pad_list(items, IGNORE_ID)

    def prepare_decoding(self, precision: str = "float32") -> None:
        """Give the weights that `inference` reads at every token their fastest form, once.

        precision: a name in `LINEARS`. Names of weights change, so this is for a model that only speaks from now on.
        """
        convert = conversion(self, precision)
        prepare_stack(self.llm, convert)
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
            if token == self.speech_token_size:
                return
            tokens.append(token)
            yield token

    @torch.inference_mode()
    def best_take(
        self, text: Tensor, prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor, sampling: int = 25
    ) -> list[int]:
        """The likeliest of `takes` takes, each of which is what `inference` might yield; arguments as there.

        Raises InputError for empty text.
        """
        bounds = self.bounds(text)
        prefix = self.inference_prefix(text, prompt_text, prompt_speech_token, embedding)
        return self.likeliest([prefix], [bounds], [nullcontext()], sampling, self.takes)[0]

    @torch.inference_mode()
    def inference_together(
        self, texts: Sequence[Tensor], embedding: Tensor, draws: Sequence[AbstractContextManager], sampling: int = 25
    ) -> list[list[int]]:
        """The tokens of several texts in one voice, written side by side: a step reads each weight once for them all.

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
        """The tokens after each prefix (1, L, C): of all takes that end, those of the highest mean log-probability.

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
                ended = token == self.speech_token_size
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

    def following(self, prefix: Tensor, max_tokens: int) -> Generator[Tensor, int | None, None]:
        """Log-probabilities (V,) of what follows `prefix` (1, L, C), then of what follows each token that is sent.

        They may lie where those before lay. At most `max_tokens` are sent.
        """
        frames = prefix.size(1) + max_tokens
        if self.captured is None or frames > MOST_CAPTURED_FRAMES:
            cache = self.llm.new_cache()
            lm_input = prefix
            while True:
                token = yield self.next_log_probabilities(lm_input, cache)
                lm_input = self.speech_embedding.weight[token].view(1, 1, -1)
        with self.captured.lent(frames) as steps:
            log_p = self.next_log_probabilities(prefix, steps.cache)
            while True:
                token = yield log_p
                log_p = steps.after(token)

    def following_together(
        self, prefixes: Sequence[Tensor], owners: Sequence[int]
    ) -> Generator[Tensor, Sequence[int], None]:
        """Log-probabilities (B, V) of what follows the prefix of each owner, then of what follows the B tokens sent."""
        caches, scores = [], []
        for prefix in prefixes:
            caches.append(self.llm.new_cache())
            scores.append(self.next_log_probabilities(prefix, caches[-1]))
        cache, starts = self.llm.joined_cache([caches[i] for i in owners])
        log_p = torch.stack([scores[i] for i in owners])
        while True:
            tokens = yield log_p
            lm_output = self.llm.forward_chunk(self.speech_embedding.weight[tokens].unsqueeze(1), cache, starts)
            log_p = self.llm_decoder(lm_output[:, -1]).float().log_softmax(dim=-1)

    def bounds(
        self, text: Tensor, min_ratio: float = MIN_TOKEN_TEXT_RATIO, max_ratio: float = MAX_TOKEN_TEXT_RATIO
    ) -> tuple[int, int]:
        """The least and most speech tokens that `text` (1, T) may get. Raises InputError for empty text.

        Where the speaker's `pace` is known, it also limits the most tokens, so that a voice which talks on is cut.
        """
        if text.size(1) == 0:
            raise InputError("there is no text to speak: give at least one word")
        least, most = int(text.size(1) * min_ratio), int(text.size(1) * max_ratio)
        if self.pace is not None:
            most = min(most, max(least, int(PACE_ROOM * self.pace * max(text.size(1), SHORT_TEXT_TOKENS))))
        return least, most

    def choose(self, log_p: Tensor, tokens: Sequence[int], min_tokens: int, sampling: int) -> int:
        """The token that follows `tokens`, which do not end before there are `min_tokens`. log_p: (V,)."""
        log_p = log_p.cpu()  # a sampler asks many small questions
        if len(tokens) < min_tokens:
            log_p[self.speech_token_size] = -torch.inf
        return self.sampling(log_p, tokens, sampling)

    def inference_prefix(
        self, text: Tensor, prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor
    ) -> Tensor:
        """What is read before the first new token, (1, L, C); arguments as in `inference`."""
        whole_text = torch.cat((prompt_text, text), dim=1)
        encoded = self.encode(whole_text, torch.tensor([whole_text.size(1)], device=text.device))
        sos, task = self.llm_embedding.weight.view(2, 1, 1, -1)  # (1, 1, C) each
        speaker = self.project_speaker(embedding).transpose(0, 1)  # (0 or 1, 1, C) -> (1, 0 or 1, C)
        return torch.cat((sos, speaker, encoded, task, self.speech_embedding(prompt_speech_token)), dim=1)

    def next_log_probabilities(self, lm_input: Tensor, cache: list) -> Tensor:
        """Read (1, N, C) more and return the log-probabilities (V,) of the token that follows; `cache` grows."""
        lm_output = self.llm.forward_chunk(lm_input, cache)
        return self.llm_decoder(lm_output[:, -1])[0].float().log_softmax(dim=-1)
