"""CosyVoice2's text tokenizer against the recorded ids, with the full vocabulary and the small one."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from parity import V2

from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.qwen import QwenTokenizer, get_qwen_tokenizer

SIZES = ("full", "tiny")
TINY = V2.folder / "tiny2_blanken"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    full = tmp_path_factory.mktemp("qwen")
    with zipfile.ZipFile(V2.folder / "qwen_tokenizer.zip") as archive:
        archive.extractall(full)
    (found,) = full.rglob("vocab.json")
    return {"full": found.parent, "tiny": TINY}


@pytest.mark.parametrize("size", SIZES)
def test_parity2_ids(folders: dict[str, Path], size: str) -> None:
    recorded: dict[str, Any] = V2.table("tokenizer")[size]
    tokenizer = get_qwen_tokenizer(str(folders[size]), skip_special_tokens=True)
    assert tokenizer.tokenizer.get_vocab_size() == recorded["len"]
    for text, number in recorded["special"].items():
        assert tokenizer.encode(text, allowed_special=set()) == [number]
        assert tokenizer.decode([number]) == ""
    for case in recorded["encode"]:
        assert tokenizer.encode(case["text"], allowed_special="all") == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decode"], case["text"]


def test_special_tokens_are_shown_on_demand() -> None:
    tokenizer = get_qwen_tokenizer(str(TINY), skip_special_tokens=False)
    text = "well [breath] hm<|endofprompt|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_parity2_the_yaml_names_it() -> None:
    overrides = {"qwen_pretrain_path": str(TINY)}
    tokenizer = load_model_yaml(V2.folder / "tiny2.yaml", ("get_tokenizer",), overrides=overrides)["get_tokenizer"]()
    assert isinstance(tokenizer, QwenTokenizer) and tokenizer.skip_special_tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "vocab.json does not exist"),
        ("merges.txt", None, "merges.txt does not exist"),
        ("tokenizer_config.json", None, "tokenizer_config.json does not exist"),
        ("vocab.json", '{"a": 0', "vocab.json cannot be read"),
        ("vocab.json", "[]", "vocab.json has no named values"),
        ("vocab.json", '{"a": "0"}', "an id is not a whole number"),
        ("vocab.json", '{"a": 0, "b": 2}', "the ids are not those from 0 to 1"),
        ("vocab.json", '{"a": 0, "b": 1}', "lacks 254 of the 256 bytes"),
        ("merges.txt", "#version: 0.2\none two three\n", "'one two three' is not a pair of pieces"),
        ("merges.txt", "#version: 0.2\n! ~\n", "'! ~' is not a pair of pieces"),
        ("tokenizer_config.json", "{}", "has no list of special tokens"),
        ("tokenizer_config.json", "[", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"960": {"content": 3}}}', "a special token is not a text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": "<a>"}}}', "do not follow the 960"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    folder = tmp_path / "blank"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        get_qwen_tokenizer(str(folder), skip_special_tokens=True)
    assert "\n" not in str(error.value) and "copy the folder CosyVoice-BlankEN again" in str(error.value)


def test_no_folder_is_told() -> None:
    with pytest.raises(InputError, match="name the model's folder CosyVoice-BlankEN"):
        get_qwen_tokenizer("", skip_special_tokens=True)
