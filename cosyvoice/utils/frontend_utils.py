"""Plain text rules that make a text speakable and cut a long one into pieces."""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CHINESE = re.compile("[\u4e00-\u9fff]")
COMMAS = ",，、"
DIGIT_MARKS = "⁰¹⁴-⁹₀-₉①-⑨⑴-⑼⒈-⒐⓪⓵-⓽⓿❶-❾➀-➈➊-➒"
MAX_NAMED_DIGITS = 36  # inflect counts up to decillions
STOPS = {"zh": "。？！；：、.?!;", "en": ".?!;:"}  # where a paragraph may be cut
FULL_STOP = {"zh": "。", "en": "."}
CUTS = ("(?<=[。！？；])", "(?<=[,，、])", r"(?<=\s)", "")  # of a sentence that is far too long, best first


def contains_chinese(text: str) -> bool:
    return CHINESE.search(text) is not None


def is_only_punctuation(text: str) -> bool:
    """Return whether every character is punctuation or a symbol (a space is neither); true for empty text."""
    return all(unicodedata.category(character)[0] in "PS" for character in text)


def has_words(text: str) -> bool:
    """Return whether there is anything to speak: a letter, an ideograph or a number."""
    return any(character.isalnum() for character in text)


def nothing_to_speak(text: str) -> str:
    """Return the message about a text without words."""
    return f"there is nothing to speak in the text {text!r}. Give it words or numbers"


def replace_corner_mark(text: str) -> str:
    """Replace superscript two and three by the Chinese words for square and cube."""
    return text.replace("²", "平方").replace("³", "立方")


def remove_bracket(text: str) -> str:
    """Drop full-width brackets and back quotes, and replace the Chinese dash by a space."""
    return re.sub("[（）【】`]", "", text).replace("——", " ")


def replace_blank(text: str) -> str:
    """Drop spaces, except those between two other ASCII characters, which separate words."""
    return re.sub(r"(?<![^ \u0080-\U0010ffff]) | (?![^ \u0080-\U0010ffff])", "", text)


def spell_out_number(text: str, inflect_parser: Any) -> str:
    """Replace numbers by English words, with `inflect.engine()`.

    Each run of decimal digits is one number; superscript two and three become "squared" and "cubed". Runs too long to
    have a name, and other digit characters (circled ones, subscripts), are spelled digit by digit.
    """

    def one_by_one(marks: re.Match) -> str:
        return " ".join(inflect_parser.number_to_words(unicodedata.digit(mark)) for mark in marks.group())

    def as_number(digits: re.Match) -> str:
        named = len(digits.group()) <= MAX_NAMED_DIGITS
        return inflect_parser.number_to_words(digits.group()) if named else one_by_one(digits)

    text = re.sub(r"\d+", as_number, text)
    text = text.replace("²", " squared").replace("³", " cubed")
    return re.sub(f"[{DIGIT_MARKS}]+", one_by_one, text)


def split_paragraph(
    text: str,
    tokenize: Callable[[str], Sequence[int]],
    lang: str = "zh",
    token_max_n: int = 80,
    token_min_n: int = 60,
    merge_len: int = 20,
    comma_split: bool = False,
) -> list[str]:
    """Cut a text at its stops into pieces of about token_min_n to token_max_n.

    Lengths are in characters for Chinese (lang "zh") and in tokens for English ("en"). A piece longer than token_min_n
    is closed before it would exceed token_max_n; a single sentence is never cut. A remainder shorter than merge_len
    joins the piece before it. A text without a final stop gets one, which replaces a final comma unless commas are
    stops too (comma_split).
    """
    stops = STOPS[lang] + (",，" if comma_split else "")
    if text and text[-1] not in stops:
        text = text.rstrip(COMMAS)
        text = text + FULL_STOP[lang] if text else ""

    def length(piece: str) -> int:
        return len(piece) if lang == "zh" else len(tokenize(piece))

    pieces: list[str] = []
    current = ""
    for sentence in _sentences(text, stops):
        if length(current + sentence) > token_max_n and length(current) > token_min_n:
            pieces.append(current)
            current = ""
        current += sentence
    if pieces and length(current) < merge_len:
        pieces[-1] += current
    elif current:
        pieces.append(current)
    return pieces


def _sentences(text: str, stops: str) -> list[str]:
    """Return each sentence up to its first stop and a closing quote after it; repeated stops are dropped."""
    sentence = re.compile(f'([^{stops}]+[{stops}])(?:[{stops}]*(["”]))?')
    return ["".join(match.groups(default="")) for match in sentence.finditer(text)]


def break_long(text: str, length: Callable[[str], int], limit: int) -> list[str]:
    """Cut a text into pieces of at most limit, at full-width stops or commas; if there is no other way, at blanks, and
    in a longer word anywhere.
    """
    pieces: list[str] = []
    for part in _parts(text, length, limit, CUTS):
        if pieces and length(pieces[-1] + part) <= limit:
            pieces[-1] += part
        else:
            pieces.append(part)
    return pieces


def _parts(text: str, length: Callable[[str], int], limit: int, cuts: Sequence[str]) -> Iterator[str]:
    """Yield the stretches between cuts of the first kind, and cut those that are too long at the next kinds."""
    for part in filter(None, re.split(cuts[0], text)):
        if length(part) > limit and len(cuts) > 1:
            yield from _parts(part, length, limit, cuts[1:])
        else:
            yield part
