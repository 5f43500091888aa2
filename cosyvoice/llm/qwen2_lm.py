"""CosyVoice2's language model from text to speech tokens (Du et al., 2024, "CosyVoice 2", section 2.3)."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cosyvoice.llm.bistream import Interleaving
from cosyvoice.llm.layouts import Marks, Turns, laid_out
from cosyvoice.llm.qwen2_encoder import Qwen2Encoder
from cosyvoice.llm.speech_token_lm import MAX_TOKEN_TEXT_RATIO, MIN_TOKEN_TEXT_RATIO, Sampler, SpeechTokenLM
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.precision import FINE_INPUTS, Convert
from cosyvoice.utils.common import IGNORE_ID, pad_list

SPECIAL_TOKENS = 3  # after those of speech: end, one that nothing uses, fill
BISTREAM_SHARE = 0.5  # of the clips, as CosyVoice2 was trained


class Qwen2LM(SpeechTokenLM):
    """Predicts the speech tokens that follow: start, text, task mark. The speaker vector is not read.

    Text and speech may take turns, so that speech begins before the text is complete; see `layouts`. The fill token
    asks for more text. `bistream_share` of the clips are trained like that, as far as they have enough speech.
    """

    llm: Qwen2Encoder
    forms = FINE_INPUTS  # what enters the down projections has outliers of ten times its mean size

    def __init__(
        self,
        llm_input_size: int,
        llm_output_size: int,
        speech_token_size: int,
        llm: Qwen2Encoder,
        sampling: Sampler,
        length_normalized_loss: bool = True,
        lsm_weight: float = 0.0,
        mix_ratio: Sequence[int] = (5, 15),
    ) -> None:
        """mix_ratio: text tokens and speech tokens a turn. Raises InputError for sizes that do not fit together."""
        super().__init__(speech_token_size, SPECIAL_TOKENS, sampling, length_normalized_loss, lsm_weight)
        if not llm_input_size == llm_output_size == llm.output_size():
            sizes = f"{llm_input_size} and llm_output_size {llm_output_size}"
            raise InputError(f"llm_input_size {sizes} must be the hidden_size of its Qwen2 model, {llm.output_size()}")
        if len(mix_ratio) != 2 or min(mix_ratio) < 1:
            raise InputError(f"mix_ratio is two sizes of at least 1, of text and of speech, not {list(mix_ratio)}")
        self.turns = Turns(*mix_ratio)
        self.bistream_share = BISTREAM_SHARE
        self.fill_token = speech_token_size + SPECIAL_TOKENS - 1
        self.llm_embedding = nn.Embedding(2, llm_input_size)
        self.llm = llm
        self.llm_decoder = nn.Linear(llm_output_size, speech_token_size + SPECIAL_TOKENS)
        self.speech_embedding = nn.Embedding(speech_token_size + SPECIAL_TOKENS, llm_input_size)

    @property
    def text_embedding(self) -> nn.Embedding:
        """The Qwen2 model's, of the ids of its own tokenizer."""
        return self.llm.embed_tokens

    def embed_text(self, text: Tensor) -> Tensor:
        """text: (B, T) ids of the model's own tokenizer. Returns (B, T, C)."""
        return self.text_embedding(text)

    def predictions(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of all N speech, fill and end tokens: scores (N, V), the tokens (N,), their items of the batch (N,).

        batch: as in `forward`, and maybe `bistream` (B,) bool: the items in which text and speech take turns. Where it
        is missing, it is drawn with `drawn_layouts`.
        """
        lm_input, target = self.join(batch, device)
        lm_output = self.llm(lm_input)
        counted = target != IGNORE_ID  # the head is applied only where a token is asked
        return self.llm_decoder(lm_output[counted]).float(), target[counted], counted.nonzero()[:, 0]

    def drawn_layouts(self, batch: dict[str, Tensor]) -> Tensor:
        """Draw, with Python's generator, in which items text and speech take turns: (B,) bool.

        A batch of preferences needs enough speech in both versions of the clip.
        """
        lengths = batch["speech_token_len"].cpu()
        if "reject_speech_token_len" in batch:
            lengths = lengths.minimum(batch["reject_speech_token_len"].cpu())
        return torch.tensor(self.turns.draw(self.bistream_share, batch["text_token_len"].tolist(), lengths.tolist()))

    def join(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Lay out each item of the batch. Returns what is read (B, L, C) and what is asked for (B, L), padded."""
        layouts = (batch["bistream"] if "bistream" in batch else self.drawn_layouts(batch)).tolist()
        text, speech = self.embed_text(batch["text_token"].to(device)), batch["speech_token"].to(device).long()
        said = self.speech_embedding(self.heard(speech.clamp(min=0)))
        lengths = zip(batch["text_token_len"].tolist(), batch["speech_token_len"].tolist(), strict=True)
        marks = Marks(*self.llm_embedding.weight.unsqueeze(1), end=self.speech_token_size, fill=self.fill_token)
        items = [
            laid_out(text[i, :texts], said[i, :tokens], speech[i, :tokens], marks, self.turns if layouts[i] else None)
            for i, (texts, tokens) in enumerate(lengths)
        ]
        read, asked = zip(*items, strict=True)
        return pad_list(read, IGNORE_ID), pad_list(asked, IGNORE_ID)

    def heard(self, speech: Tensor) -> Tensor:
        """Return the speech tokens (B, S) that are read in training: here the true ones."""
        return speech

    def forward_dpo(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return the loss on the preferred speech, and how likely it and the rejected speech are, for `DPOLoss`.

        batch: as in `predictions`, and `reject_speech_token` (B, S) with `reject_speech_token_len` (B,). Where a
        reference model judges the same batch, draw `bistream` before: probabilities of different layouts cannot be
        compared. Returns `loss` and `acc` as `forward` does, and `chosen_logps` and `rejected_logps` (B,), the mean
        log-probability of the speech, fill and end tokens.
        """
        count = len(batch["text_token"])
        scores, classes, items = self.predictions(self.doubled(batch), device)
        token_logps = scores.log_softmax(dim=-1).gather(1, classes.unsqueeze(1)).squeeze(1)  # (N,)
        logps = token_logps.new_zeros(2 * count).index_add(0, items, token_logps) / items.bincount()
        chosen = items < count
        loss, accuracy = self.loss_and_accuracy(scores[chosen], classes[chosen], count)
        return {"loss": loss, "acc": accuracy, "chosen_logps": logps[:count], "rejected_logps": logps[count:]}

    def doubled(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch (2B) of all preferred and then all rejected speech, in the same layouts."""
        layouts = batch["bistream"] if "bistream" in batch else self.drawn_layouts(batch)
        both = [*batch["speech_token"], *batch["reject_speech_token"]]
        return {
            "text_token": batch["text_token"].repeat(2, 1),
            "text_token_len": batch["text_token_len"].repeat(2),
            "speech_token": pad_list(both, 0),
            "speech_token_len": torch.cat((batch["speech_token_len"], batch["reject_speech_token_len"])),
            "bistream": layouts.repeat(2),
        }

    def prepare_stack(self, convert: Convert) -> None:
        self.llm.prepare_decoding(convert)

    def inference_prefix(
        self, text: Tensor, prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor
    ) -> Tensor:
        sos, task = self.llm_embedding.weight.view(2, 1, 1, -1)  # (1, 1, C) each
        whole_text = self.embed_text(torch.cat((prompt_text, text), dim=1))
        return torch.cat((sos, whole_text, task, self.speech_embedding(prompt_speech_token)), dim=1)

    @torch.inference_mode()
    def inference_bistream(
        self,
        text: Iterable[Tensor],
        prompt_text: Tensor,
        prompt_text_len: Tensor,
        prompt_speech_token: Tensor,
        prompt_speech_token_len: Tensor,
        embedding: Tensor,
        sampling: int = 25,
        max_token_text_ratio: float = MAX_TOKEN_TEXT_RATIO,
        min_token_text_ratio: float = MIN_TOKEN_TEXT_RATIO,
    ) -> Iterator[int]:
        """Yield speech tokens while the text is still arriving, at most `max_token_text_ratio` per text token.

        text: pieces (1, N). The rest is as in `inference`, but there is no least number of tokens: a piece of text
        stands for as many as the model gives it. Raises InputError if there was no text.
        """
        utterance = Interleaving(self, prompt_text, prompt_speech_token, sampling)
        for piece in text:
            utterance.add_text(piece)
            yield from utterance.speak()
        yield from utterance.finish(self.most_tokens(utterance.text_tokens, max_token_text_ratio))
