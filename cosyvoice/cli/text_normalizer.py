"""Turns text as people write it into pieces that the language model can speak."""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from cosyvoice.runtime.errors import InputError
from cosyvoice.text.written_forms import chinese_words, cleaned, english_words
from cosyvoice.utils.frontend_utils import (
    break_long,
    contains_chinese,
    has_words,
    is_only_punctuation,
    remove_bracket,
    replace_blank,
    replace_corner_mark,
    spell_out_number,
    split_paragraph,
)


@dataclass(frozen=True)
class TextSplit:
    """Lengths of the pieces of a text, in characters for Chinese and tokens otherwise. Defaults are CosyVoice-300M's.

    A model's YAML may give others as `text_split`, if its tokens have another size. Raises InputError for numbers in
    the wrong order.
    """

    max_tokens: int = 80  # a piece is closed before it exceeds this,
    min_tokens: int = 60  # once it has more than this
    merge_tokens: int = 20  # a shorter remainder joins the piece before it
    sentence_tokens: int = 200  # the longest text that the model was trained on; longer sentences are broken

    @classmethod
    def of(cls, settings: Mapping[str, int]) -> "TextSplit":
        """Return the lengths from the YAML's mapping. Raises InputError for an unknown name."""
        known = [field.name for field in fields(cls)]
        if not isinstance(settings, Mapping) or settings.keys() - set(known):
            raise InputError(f"text_split takes {', '.join(known)}, not {settings}")
        return cls(**settings)

    def __post_init__(self) -> None:
        numbers = (self.merge_tokens, self.min_tokens, self.max_tokens, self.sentence_tokens)
        if not all(isinstance(number, int) for number in numbers) or list(numbers) != sorted(numbers) or numbers[0] < 0:
            raise InputError(
                "text_split needs whole numbers with 0 <= merge_tokens <= min_tokens <= max_tokens <= sentence_tokens, "
                f"not {', '.join(map(str, numbers))}"
            )


class TextNormalizer:
    """A normalizer that writes numbers, dates and symbols in words and cuts long text into pieces.

    Chinese rules apply to every text with a Chinese character, English rules to the rest. With normalizer "wetext" the
    rules of `cosyvoice.text.written_forms` come first, then wetext's grammars if that package is installed. None uses
    the plain rules only, which are those of the public code.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        normalizer: str | None = "wetext",
        text_split: TextSplit = TextSplit(),
    ) -> None:
        if normalizer not in ("wetext", None):
            raise InputError(f"there is no text normalizer {normalizer!r}; use 'wetext' or None (plain rules)")
        self.encode = encode
        self.text_split = text_split
        self.plain = normalizer is None
        self.wetext = not self.plain and find_spec("wetext") is not None
        self._lock = threading.Lock()  # inflect keeps state, and wetext does not promise to be thread-safe

    def normalize(self, text: str) -> str:
        """Return the whole text in words."""
        text = text.strip()
        with self._lock:
            return self._chinese(text) if contains_chinese(text) else self._english(text)

    def split(self, text: str) -> list[str]:
        """Return the pieces of a normalised text that have something to speak; possibly none."""
        lang = "zh" if contains_chinese(text) else "en"
        sizes = self.text_split
        pieces = split_paragraph(text, self.encode, lang, sizes.max_tokens, sizes.min_tokens, sizes.merge_tokens)
        spoken = [piece for piece in pieces if not is_only_punctuation(piece)]
        return [part for piece in spoken for part in self._break_long(piece)]

    def _break_long(self, piece: str) -> list[str]:
        if self._token_count(piece) <= self.text_split.sentence_tokens:
            return [piece]
        *parts, rest = break_long(piece, self._token_count, self.text_split.max_tokens)
        short = not has_words(rest) or self._token_count(rest) < self.text_split.merge_tokens
        return [*parts[:-1], parts[-1] + rest] if parts and short else [*parts, rest]

    def _token_count(self, text: str) -> int:
        return len(self.encode(text))

    def _chinese(self, text: str) -> str:
        if not self.plain:
            text = chinese_words(cleaned(text, chinese=True))
        text = self._expand(text, "zh").replace("\n", "")
        text = replace_corner_mark(replace_blank(text))
        text = remove_bracket(text.replace(".", "。").replace(" - ", "，"))
        return re.sub("[，,、]+$", "。", text)

    def _english(self, text: str) -> str:
        if not self.plain:
            text = cleaned(text, chinese=False)
            if any(map(str.isdigit, text)):
                text = english_words(text, lambda digits: self._inflect.number_to_words(digits, andword="", comma=""))
        text = self._expand(text, "en")
        has_digits = any(character.isdigit() for character in text)
        return spell_out_number(text, self._inflect) if has_digits else text

    def _expand(self, text: str, lang: str) -> str:
        """Return the text after wetext's grammar, if it is in use and can read the text."""
        if not self.wetext:
            return text
        try:
            expanded = self._grammar.normalize(text, lang=lang)
        except AssertionError:  # wetext 0.1.8 fails on some signs; the words without them can still be read
            words = re.split(r"(\s+)", text)
            if len(words) == 1:
                return text
            return "".join(self._expand(word, lang) if has_words(word) else word for word in words)
        if has_words(text) and not has_words(expanded):  # 0.1.8 drops some texts with odd signs altogether
            return text
        return re.sub(r'\\(["\\])', r"\1", expanded)  # it escapes quotes and backslashes

    @cached_property
    def _grammar(self) -> Any:
        from wetext import Normalizer

        return Normalizer()

    @cached_property
    def _inflect(self) -> Any:
        import inflect  # takes 2 seconds, so only for numbers

        return inflect.engine()
