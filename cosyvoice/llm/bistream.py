"""Speech from text that is still arriving: text and speech take turns (CosyVoice 2, Du et al., 2024, section 2.3)."""

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosyvoice.transformer.decoding import MOST_CAPTURED_FRAMES

if TYPE_CHECKING:
    from cosyvoice.llm.qwen2_lm import Qwen2LM


class Interleaving:
    """One utterance in the making: the text that waits, what is read next, and the tokens so far.

    A prompt comes first: its text and speech take turns with each other. Then each piece of text gives a piece of
    speech, which a fill token ends; the last of the text gives the rest, which the end token ends.
    """

    def __init__(self, lm: "Qwen2LM", prompt_text: Tensor, prompt_speech_token: Tensor, sampling: int) -> None:
        """prompt_text: (1, P) and prompt_speech_token: (1, Q), both may be empty. sampling: for the sampler."""
        self.lm, self.sampling = lm, sampling
        self.text = lm.embed_text(prompt_text)  # (1, T, C), waiting
        self.prompt = lm.speech_embedding(prompt_speech_token)  # (1, S, C), waiting for its text
        self.read: int | Tensor = lm.llm_embedding.weight[lm.SOS].view(1, 1, -1)  # with the next step: token or frames
        self.tokens: list[int] = []  # with fill tokens
        self.text_tokens = 0  # without those of the prompt
        turn, said = lm.turns.speech, prompt_speech_token.size(1)
        self.next_fill = (said // turn + 1) * turn - said  # the place in `tokens` where a fill token must be
        self.steps: Generator[Tensor, int | Tensor | None, None] | None = None

    def add_text(self, text: Tensor) -> None:
        """Let more text (1, N) wait, and read as much of the prompt as there is text for."""
        self.text_tokens += text.size(1)
        self.text = torch.cat((self.text, self.lm.embed_text(text)), dim=1)
        while self.prompt.size(1) > 0 and self.has_piece():
            said, self.prompt = self.prompt.tensor_split([self.lm.turns.speech], dim=1)
            self.read = torch.cat((self.read, self.next_piece(), said), dim=1)

    def speak(self) -> Iterator[int]:
        """Yield the speech of the next piece of text, if that is there and the prompt is read."""
        if self.prompt.size(1) > 0:
            return
        if self.tokens:  # a fill token is the last one
            if not self.has_piece():
                return
            self.read = self.next_piece()
        elif self.read.size(1) == 1:  # no prompt has brought text
            if not self.has_piece():
                return
            self.read = torch.cat((self.read, self.next_piece()), dim=1)
        forbidden = range(self.lm.speech_token_size, self.lm.fill_token)
        while True:
            log_p, place = self.step(), len(self.tokens)
            if place == self.next_fill:
                token = self.lm.fill_token
            else:
                token = self.lm.sample(log_p, self.tokens, forbidden, self.sampling)
            self.tokens.append(token)
            if token == self.lm.fill_token:
                self.next_fill = place + self.lm.turns.speech + 1
                return
            yield token
            self.read = token

    def finish(self, max_tokens: int) -> Iterator[int]:
        """Yield the rest of the speech once the text is complete. All in all there are at most `max_tokens`."""
        task = self.lm.llm_embedding.weight[self.lm.TASK].view(1, 1, -1)
        # As the public model does it, the last token is read once more here if it was read already.
        self.read = torch.cat((self.frames(), self.text, task, self.prompt), dim=1)
        forbidden = range(self.lm.speech_token_size + 1, self.lm.fill_token + 1)
        spoken = len(self.tokens) - self.tokens.count(self.lm.fill_token)
        for _ in range(max_tokens - spoken):
            token = self.lm.sample(self.step(), self.tokens, forbidden, self.sampling)
            if token == self.lm.speech_token_size:
                return
            self.tokens.append(token)
            yield token
            self.read = token

    def has_piece(self) -> bool:
        return self.text.size(1) >= self.lm.turns.text

    def next_piece(self) -> Tensor:
        piece, self.text = self.text.tensor_split([self.lm.turns.text], dim=1)
        return piece

    def frames(self) -> Tensor:
        return self.lm.speech_embedding.weight[self.read].view(1, 1, -1) if isinstance(self.read, int) else self.read

    def step(self) -> Tensor:
        """Read what is to be read, and return the log-probabilities (V,) of what follows."""
        if self.steps is not None:
            return self.steps.send(self.read)
        self.steps = self.lm.following(self.read, MOST_CAPTURED_FRAMES - self.read.size(1))
        return next(self.steps)
