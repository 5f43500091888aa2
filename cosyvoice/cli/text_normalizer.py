"""From a text as people write it to pieces as the language model can speak them."""

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
    """How long the pieces of a text are: characters in Chinese, else tokens. The defaults are CosyVoice-300M's.

    A model's YAML may name others as `text_split`, for tokens of another size. Raises InputError for numbers that
    leave no room.
    """

    max_tokens: int = 80  # a piece is closed before it exceeds this,
    min_tokens: int = 60  # once it has more than this
    merge_tokens: int = 20  # a shorter rest joins the piece before it
    sentence_tokens: int = 200  # the longest text that the model was trained on: a longer sentence is broken

    @classmethod
    def of(cls, settings: Mapping[str, int]) -> "TextSplit":
        """From the YAML's mapping."""
        known = [field.name for field in fields(cls)]
        if not isinstance(settings, Mapping) or settings.keys() - set(known):
            raise InputError(f"text_split takes {', '.join(known)}, not {settings}")
        return cls(**settings)

    def __post_init__(self) -> None:
        numbers = (self.merge_tokens, self.min_tokens, self.max_tokens, self.sentence_tokens)
        if not all(isinstance(number, int) for number in numbers) or list(numbers) != sorted(numbers) or numbers[0] < 0:
            raise InputError(
                "text_split: whole numbers with 0 <= merge_tokens <= min_tokens <= max_tokens <= sentence_tokens "
                f"are needed, not {', '.join(map(str, numbers))}"
            )


class TextNormalizer:
    """Numbers, dates and symbols in words, and long text in pieces.

    Chinese rules serve every text that holds a Chinese character, English rules the rest. With normalizer "wetext" the
    rules of `cosyvoice.text.written_forms` come first, then its grammars, where that package is installed; None keeps
    to the plain rules, which are those of the public code.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        normalizer: str | None = "wetext",
        text_split: TextSplit = TextSplit(),
    ) -> None:
        if normalizer not in ("wetext", None):
            raise InputError(f"no text normalizer {normalizer!r}; there are 'wetext' and None (plain rules)")
        self.encode = encode
        self.text_split = text_split
        self.plain = normalizer is None
        self.wetext = not self.plain and find_spec("wetext") is not None
        self._one_at_a_time = threading.Lock()  # inflect keeps its place in a number, and wetext promises nothing

    def normalize(self, text: str) -> str:
        """The whole text in words."""
        text = text.strip()
        with self._one_at_a_time:
            return self._chinese(text) if contains_chinese(text) else self._english(text)

    def split(self, text: str) -> list[str]:
        """A normalised text in pieces that each hold something to speak; possibly none."""
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
        """The text through wetext's grammar, where that is in use and can read it."""
        if not self.wetext:
            return text
        try:
            expanded = self._grammar.normalize(text, lang=lang)
        except AssertionError:  # wetext 0.1.8 on some signs: the words without them are still to be read
            words = re.split(r"(\s+)", text)
            if len(words) == 1:
                return text
            return "".join(self._expand(word, lang) if has_words(word) else word for word in words)
        if has_words(text) and not has_words(expanded):  # 0.1.8 drops some texts with odd signs whole
            return text
        return re.sub(r'\\(["\\])', r"\1", expanded)  # it escapes quotes and backslashes

    @cached_property
    def _grammar(self) -> Any:
        from wetext import Normalizer

        return Normalizer()

    @cached_property
    def _inflect(self) -> Any:
        import inflect  # 2 seconds: only for numbers

        return inflect.engine()
