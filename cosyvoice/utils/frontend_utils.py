"""Plain text rules: what makes a text readable aloud, and how a long one is cut into pieces."""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CHINESE = re.compile("[\u4e00-\u9fff]")
COMMAS = ",，、"
DIGIT_MARKS = "⁰¹⁴-⁹₀-₉①-⑨⑴-⑼⒈-⒐⓪⓵-⓽⓿❶-❾➀-➈➊-➒"
MOST_NAMED_DIGITS = 36  # inflect counts up to decillions
STOPS = {"zh": "。？！；：、.?!;", "en": ".?!;:"}  # where a paragraph may be cut
FULL_STOP = {"zh": "。", "en": "."}
CUTS = ("(?<=[。！？；])", "(?<=[,，、])", r"(?<=\s)", "")  # of a sentence that is far too long, best place first


def contains_chinese(text: str) -> bool:
    return CHINESE.search(text) is not None


def is_only_punctuation(text: str) -> bool:
    """Whether every character is punctuation or a symbol (a blank is neither); true for empty text."""
    return all(unicodedata.category(character)[0] in "PS" for character in text)


def has_words(text: str) -> bool:
    """Whether there is anything to speak: a letter, an ideograph or a number."""
    return any(character.isalnum() for character in text)


def replace_corner_mark(text: str) -> str:
    """Superscript two and three in Chinese words: square and cube."""
    return text.replace("²", "平方").replace("³", "立方")


def remove_bracket(text: str) -> str:
    """Drop full-width brackets and back quotes; the Chinese dash becomes a blank."""
    return re.sub("[（）【】`]", "", text).replace("——", " ")


def replace_blank(text: str) -> str:
    """Drop blanks, except those between two other ASCII characters: there they separate words."""
    return re.sub(r"(?<![^ \u0080-\U0010ffff]) | (?![^ \u0080-\U0010ffff])", "", text)


def spell_out_number(text: str, inflect_parser: Any) -> str:
    """Numbers in English words, by `inflect.engine()`.

    Each run of decimal digits is one number; a superscript two or three is a square or a cube. Runs that are too
    long for a name, and other marks that stand for a digit (circled ones, subscripts), are spelled one by one.
    """

    def one_by_one(marks: re.Match) -> str:
        return " ".join(inflect_parser.number_to_words(unicodedata.digit(mark)) for mark in marks.group())

    def as_number(digits: re.Match) -> str:
        named = len(digits.group()) <= MOST_NAMED_DIGITS
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

    Lengths are characters in Chinese (lang "zh") and tokens otherwise ("en"). A piece that has more than
    token_min_n is closed before it would exceed token_max_n; one sentence is never cut. A rest shorter
    than merge_len joins the piece before it. A full stop ends a text without one; it takes the place of a
    final comma, unless commas are stops too (comma_split).
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
    """Each stretch up to its first stop, with a closing quote behind it; repeated stops are dropped."""
    sentence = re.compile(f'([^{stops}]+[{stops}])(?:[{stops}]*(["”]))?')
    return ["".join(match.groups(default="")) for match in sentence.finditer(text)]


def break_long(text: str, length: Callable[[str], int], limit: int) -> list[str]:
    """Cut a text into pieces of at most limit: after full-width stops, which English text does not end at, and commas;
    between two of them, only if there is no other way, at blanks, and in a word that is longer still, anywhere.
    """
    pieces: list[str] = []
    for part in _parts(text, length, limit, CUTS):
        if pieces and length(pieces[-1] + part) <= limit:
            pieces[-1] += part
        else:
            pieces.append(part)
    return pieces


def _parts(text: str, length: Callable[[str], int], limit: int, cuts: Sequence[str]) -> Iterator[str]:
    """Each stretch between two of the first kind of cuts, or where it is too long, between two of the others."""
    for part in filter(None, re.split(cuts[0], text)):
        if length(part) > limit and len(cuts) > 1:
            yield from _parts(part, length, limit, cuts[1:])
        else:
            yield part
