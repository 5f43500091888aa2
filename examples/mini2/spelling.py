"""English spelling as a language model's first lesson: which phones a text stands for, in the time they would take."""

import random
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cosyvoice.dataset.batching import padded
from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.tokenizer.phones import PHONES, PhoneTokenizer
from cosyvoice.tokenizer.qwen import QwenTokenizer
from cosyvoice.tokenizer.tokenizer import BYTES

BATCH = 16
DRAWN_BATCHES = 4  # at once, of which one is taken whose texts are about equally long
WORDS = (1, 1, 2, 2, 3, 4, 6, 8)  # in one text; to find the way through a text is learnt from the short ones
SENTENCE_SHARE = 0.25  # of the texts that are sentences of the corpora
COMMA_SHARE = 0.1  # of the drawn words
SILENCE = len(PHONES)  # the class after those of the phones
FRAMES, SILENT_FRAMES = range(1, 4), range(1, 6)  # of one phone and of one pause: 25 a second
STOPS = frozenset(",.;:?!")


class Speller:
    """Draws texts, and tells how they are spoken.

    words: of the lexicon. sentences: whose words the lexicon has.
    """

    def __init__(
        self, letters: QwenTokenizer, lexicon: PhoneTokenizer, words: Sequence[str], sentences: Sequence[str]
    ) -> None:
        self.letters, self.lexicon, self.words, self.sentences = letters, lexicon, words, sentences

    def draw_batch(self) -> dict[str, Tensor]:
        """Return a batch for a `Qwen2LM`, whose speech tokens are phones. Draws with Python's generator."""
        lessons = [self.lesson(self.draw_text()) for _ in range(DRAWN_BATCHES * BATCH)]
        lessons.sort(key=lambda lesson: sum(map(len, lesson)))
        first = random.randrange(DRAWN_BATCHES) * BATCH
        pairs = zip(*lessons[first : first + BATCH], strict=True)
        texts, spoken = ([torch.tensor(part) for part in parts] for parts in pairs)
        return padded("text_token", texts) | padded("speech_token", spoken)

    def draw_text(self) -> str:
        if self.sentences and random.random() < SENTENCE_SHARE:
            return random.choice(self.sentences)
        words = random.choices(self.words, k=random.choice(WORDS))
        commas = ["," * (random.random() < COMMA_SHARE) for _ in words[1:]]
        text = " ".join(word + comma for word, comma in zip(words, [*commas, "."], strict=True))
        return text[0].upper() + text[1:]

    def lesson(self, text: str) -> tuple[list[int], list[int]]:
        """Return the text's ids, and its phones, each repeated for a random time, with pauses at ends and stops."""
        phones = repeated(SILENCE, SILENT_FRAMES)
        for units in self.lexicon.encode_words(text):
            for unit in units:
                if unit >= len(BYTES):
                    phones += repeated(unit - len(BYTES), FRAMES)
            if any(unit < len(BYTES) and chr(BYTES[unit]) in STOPS for unit in units):
                phones += repeated(SILENCE, SILENT_FRAMES)
        return self.letters.encode(text), phones


def repeated(phone: int, frames: range) -> list[int]:
    return [phone] * random.choice(frames)


@torch.no_grad()
def next_phones_right(model: Qwen2LM, batch: dict[str, Tensor]) -> float:
    """Return the share of phones that the model tells right when it is told that a new one begins."""
    model.eval()
    in_turns = torch.zeros(BATCH, dtype=torch.bool)  # the whole text comes first
    scores, _, items = model.predictions(batch | {"bistream": in_turns}, batch["text_token"].device)
    right = total = 0
    for item, length in enumerate(batch["speech_token_len"].tolist()):
        phones = batch["speech_token"][item, :length].tolist()
        changes = [frame for frame, (last, phone) in enumerate(pairwise(phones), start=1) if last != phone]
        heard = scores[items == item][changes, : SILENCE + 1]  # (N, SILENCE + 1)
        heard[range(len(changes)), [phones[frame - 1] for frame in changes]] = -torch.inf
        right += (heard.argmax(dim=1) == torch.tensor([phones[frame] for frame in changes])).sum().item()
        total += len(changes)
    return right / total
