"""Tokenizer and text rules on the recorded strings.

Where the reference fails on a text or distorts it, the functions named `right_*` work out from the recorded
result what is right instead, each with its reason. Everything else must be equal.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import inflect
import pytest
import whisper.tokenizer
from parity import PARITY_DIR, table

from cosyvoice.cli.frontend import CosyVoiceFrontEnd
from cosyvoice.tokenizer.tokenizer import get_tokenizer
from cosyvoice.utils import frontend_utils

WHISPER = {"multilingual": True, "num_languages": 100, "language": "en", "task": "transcribe"}
INDEX_ERROR = {"error": "IndexError"}
CIRCLED = {"①": "one", "②": "two", "③": "three", "④": "four", "⑤": "five"}


@cache
def tables(name: str) -> Any:
    return table(name) if (PARITY_DIR / f"{name}.json").is_file() else {}


@cache
def tokenizer() -> Any:
    return get_tokenizer(**WHISPER)


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, allowed_special="all")


@cache
def frontend() -> CosyVoiceFrontEnd:
    """With no external normaliser, as the strings were recorded, and no network to open."""
    return CosyVoiceFrontEnd(tokenizer, abs, "", "", normalizer=None)


def right_blanks(text: str, recorded: Any) -> str:
    """`replace_blank` at both ends of a text.

    The blank at the end has no right neighbour, at which the reference fails; the one at the start gets the
    last character as its left neighbour. Neither stands between two characters: both go.
    """
    if recorded == INDEX_ERROR:
        assert text.endswith(" ")
        return frontend_utils.replace_blank(text.rstrip(" "))
    return recorded.lstrip(" ")


def right_numbers(text: str, recorded: Any, spell: Callable[[str], Any]) -> Any:
    """Squares and cubes are spelled as such, circled digits one by one.

    They are digits but no decimals: the reference makes one "zero" of each run of them.
    """
    if not any(mark.isdigit() and not mark.isdecimal() for mark in text):
        return recorded
    text = text.replace("²", " squared").replace("³", " cubed")
    return spell(re.sub("[①-⑤]+", lambda run: " ".join(CIRCLED[mark] for mark in run.group()), text))


def right_pieces(recorded: Any, comma_split: bool) -> Any:
    """A final comma gives way to the full stop, where the reference writes both.

    Of commas alone nothing is left. An empty text has no last character, at which the reference fails: it
    has no pieces.
    """
    if recorded == INDEX_ERROR:
        return []
    if comma_split or not recorded:
        return recorded
    last = re.sub("[,，、]+([.。])$", r"\1", recorded[-1])
    return [*recorded[:-1], *([last] if last not in ".。" else [])]


def recorded_functions() -> list[tuple[str, str, Any]]:
    functions = tables("frontend").get("functions", {})
    return [(name, case["in"], case["out"]) for name, listed in functions.items() for case in listed]


@pytest.mark.parametrize("name,text,recorded", recorded_functions())
def test_function(name: str, text: str, recorded: Any) -> None:
    function = getattr(frontend_utils, name)
    if name == "spell_out_number":
        spell = partial(function, inflect_parser=inflect.engine())
        assert spell(text) == right_numbers(text, recorded, spell)
    elif name == "replace_blank":
        assert function(text) == right_blanks(text, recorded)
    else:
        assert function(text) == recorded


@pytest.mark.parametrize("case", tables("frontend").get("split_paragraph", []))
def test_split_paragraph(case: dict[str, Any]) -> None:
    options = {key: case[key] for key in ("lang", "token_max_n", "token_min_n", "merge_len", "comma_split")}
    pieces = frontend_utils.split_paragraph(case["in"], encode, **options)
    assert pieces == right_pieces(case["out"], case["comma_split"])


@pytest.mark.parametrize("case", tables("frontend").get("text_normalize", {}).get("none", []))
def test_text_normalize(case: dict[str, Any]) -> None:
    text, normalize = case["in"], frontend().text_normalize
    assert normalize(text, text_frontend=False) == case["frontend_off_split"]
    assert normalize(text, split=False, text_frontend=False) == case["frontend_off_nosplit"]

    whole, pieces = case["nosplit"], case["split"]
    if not frontend_utils.contains_chinese(text):
        whole = right_numbers(text, whole, lambda words: normalize(words, split=False))
        pieces = right_numbers(text, pieces, normalize)
    if pieces != [text]:  # text with special tokens is passed on without a full stop
        pieces = right_pieces(pieces, comma_split=False)
    assert normalize(text, split=False) == whole
    assert normalize(text) == pieces


@pytest.mark.parametrize("case", tables("tokenizer").get("whisper", {}).get("encode", []))
def test_whisper_tokens(case: dict[str, Any]) -> None:
    named_by_yaml = whisper.tokenizer.get_tokenizer(**WHISPER)
    assert encode(case["text"]) == named_by_yaml.encode(case["text"], allowed_special="all") == case["ids"]
    # not the tokenizer's own decode, which drops timestamps
    assert (tokenizer().encoding.decode(case["ids"]) == case["text"]) == case["decode_equals_text"]


@pytest.mark.parametrize("vocabulary", [tables("tokenizer")["whisper"]] if tables("tokenizer") else [])
def test_whisper_vocabulary(vocabulary: dict[str, Any]) -> None:
    special_tokens, recorded = tokenizer().special_tokens, vocabulary["some_special"]
    assert tokenizer().encoding.n_vocab == vocabulary["n_vocab"]
    assert len(special_tokens) == vocabulary["num_special"]
    assert vocabulary["num_mergeable"] + vocabulary["num_special"] == vocabulary["n_vocab"]
    assert {name: special_tokens.get(name) for name in recorded} == recorded
