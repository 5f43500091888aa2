"""English spelling as a language model's first lesson: which phones a text stands for, in the time they would take."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cosyvoice.llm.guided import GuidedQwen2LM
from cosyvoice.tokenizer.phones import PHONES, PhoneTokenizer
from cosyvoice.tokenizer.qwen import QwenTokenizer
from cosyvoice.tokenizer.tokenizer import BYTES
from cosyvoice.utils.common import pad_list

BATCH = 16
DRAWN_BATCHES = 4  # at once, of which one is taken whose texts are about equally long
WORDS = range(2, 10)  # drawn for one text
DRAWN_SHARE = 0.5  # of the texts that are drawn words; the others are sentences of the corpora
COMMA_SHARE = 0.1  # of the drawn words
SILENCE = len(PHONES)  # the class after those of the phones
FRAMES, SILENT_FRAMES = range(1, 4), range(2, 7)  # of one phone and of one pause: at 25 a second, 40 to 120 ms
STOPS = frozenset(",.;:?!")


@dataclass
class Lesson:
    """A text and the frames of its speech."""

    text: list[int]  # (T,) ids of the Qwen tokenizer
    phones: list[int]  # (S,) places in PHONES, or SILENCE
    places: list[int]  # (S,) the text token that each frame says


class Speller:
    """Draws texts, and tells how they are spoken.

    words: of the lexicon. sentences: whose words the lexicon has.
    """

    def __init__(
        self, letters: QwenTokenizer, lexicon: PhoneTokenizer, words: Sequence[str], sentences: Sequence[str]
    ) -> None:
        self.letters, self.lexicon, self.words, self.sentences = letters, lexicon, words, sentences

    def draw_batch(self) -> dict[str, Tensor]:
        """Return a batch for `GuidedQwen2LM`, whose speech tokens are phones. Draws with Python's generator."""
        lessons = [self.lesson(self.draw_text()) for _ in range(DRAWN_BATCHES * BATCH)]
        lessons.sort(key=lambda lesson: len(lesson.text) + len(lesson.phones))
        first = random.randrange(DRAWN_BATCHES) * BATCH
        lessons = lessons[first : first + BATCH]
        texts, phones, places = (
            [torch.tensor(getattr(lesson, name)) for lesson in lessons] for name in ("text", "phones", "places")
        )
        return {
            "text_token": pad_list(texts, 0),
            "text_token_len": torch.tensor([len(text) for text in texts]),
            "speech_token": pad_list(phones, 0),
            "speech_token_len": torch.tensor([len(frames) for frames in phones]),
            "text_place": pad_list(places, 0),
        }

    def draw_text(self) -> str:
        if self.sentences and random.random() >= DRAWN_SHARE:
            return random.choice(self.sentences)
        words = random.choices(self.words, k=random.choice(WORDS))
        commas = ["," * (random.random() < COMMA_SHARE) for _ in words[1:]]
        text = " ".join(word + comma for word, comma in zip(words, [*commas, "."], strict=True))
        return text[0].upper() + text[1:]

    def lesson(self, text: str) -> Lesson:
        """Return the text with phones of random lengths, and pauses at its ends and stops."""
        ids = self.letters.encode_words(text)
        lesson = Lesson([number for word in ids for number in word], [], [])
        self.add(lesson, SILENCE, 0, SILENT_FRAMES)
        first = 0
        for word, units in zip(ids, self.lexicon.encode_words(text), strict=True):
            phones = [unit - len(BYTES) for unit in units if unit >= len(BYTES)]
            for number, phone in enumerate(phones):
                # the piece of the word's letters that stands as far into it as the phone
                self.add(lesson, phone, first + int((number + 0.5) / len(phones) * len(word)), FRAMES)
            first += len(word)
            if any(unit < len(BYTES) and chr(BYTES[unit]) in STOPS for unit in units):
                self.add(lesson, SILENCE, first - 1, SILENT_FRAMES)
        return lesson

    @staticmethod
    def add(lesson: Lesson, phone: int, place: int, frames: range) -> None:
        count = random.choice(frames)
        lesson.phones += [phone] * count
        lesson.places += [place] * count


def loss_of(model: GuidedQwen2LM, batch: dict[str, Tensor]) -> Tensor:
    losses = model(batch, batch["text_token"].device)
    return losses["loss"] + losses["loss_aligner"]


@torch.no_grad()
def next_phones_right(model: GuidedQwen2LM, batch: dict[str, Tensor]) -> float:
    """Return the share of phones that the model tells right when it is told that a new one begins."""
    training = model.training
    model.eval()
    in_turns = torch.zeros(BATCH, dtype=torch.bool)  # the whole text comes first
    scores, _, items = model.predictions(batch | {"bistream": in_turns}, batch["text_token"].device)
    model.train(training)
    right = total = 0
    for item, length in enumerate(batch["speech_token_len"].tolist()):
        phones = batch["speech_token"][item, :length].tolist()
        changes = [frame for frame, (last, phone) in enumerate(pairwise(phones), start=1) if last != phone]
        heard = scores[items == item][changes, : SILENCE + 1]  # (N, SILENCE + 1)
        heard[range(len(changes)), [phones[frame - 1] for frame in changes]] = -torch.inf
        right += (heard.argmax(dim=1) == torch.tensor([phones[frame] for frame in changes])).sum().item()
        total += len(changes)
    return right / total
