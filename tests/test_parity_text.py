"""Tokenizer and text rules on the recorded strings.

Where the reference fails on a text or distorts it, the functions of `text_parity` say what is right instead.
"""

from functools import cache, partial
from typing import Any

import inflect
import pytest
import whisper.tokenizer
from parity import PARITY_DIR, table
from text_parity import right_blanks, right_numbers, right_pieces

from cosyvoice.cli.frontend import CosyVoiceFrontEnd
from cosyvoice.tokenizer.tokenizer import get_tokenizer
from cosyvoice.utils import frontend_utils

WHISPER = {"multilingual": True, "num_languages": 100, "language": "en", "task": "transcribe"}


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
