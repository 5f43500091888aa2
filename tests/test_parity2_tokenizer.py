"""CosyVoice2's text tokenizer against the recorded ids, with the full vocabulary and the small one."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from parity import V2

from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.tokenizer.qwen import QwenTokenizer, get_qwen_tokenizer
from cosyvoice.utils.errors import InputError

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
        ("vocab.json", '{"a": 0', "vocab.json and merges.txt cannot be read"),
        ("vocab.json", '{"a": 0}', "vocab.json and merges.txt cannot be read"),
        ("merges.txt", "#version: 0.2\none two three\n", "vocab.json and merges.txt cannot be read"),
        ("tokenizer_config.json", "{}", "lists no special tokens that can be read"),
        ("tokenizer_config.json", "[", "lists no special tokens that can be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"960": {"content": 3}}}', "a special token is no text"),
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


def test_bytes_that_the_vocabulary_lacks_are_told(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "blank", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "blank" / "vocab.json").write_text('{"a": 0, "b": 1}', encoding="utf-8")
    (tmp_path / "blank" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(InputError, match="lacks 254 of the 256 bytes"):
        get_qwen_tokenizer(str(tmp_path / "blank"), skip_special_tokens=True)


def test_no_folder_is_told() -> None:
    with pytest.raises(InputError, match="name the model's folder CosyVoice-BlankEN"):
        get_qwen_tokenizer("", skip_special_tokens=True)
