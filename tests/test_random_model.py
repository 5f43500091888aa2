"""The random model folder: complete, repeatable, and with the real interfaces."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from parity import V1

from cosyvoice.model_folder.fingerprints import fingerprint_file
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_part
from cosyvoice.tokenizer.qwen import get_qwen_tokenizer
from tools.blank_en import byte_pairs, write_blank_en
from tools.random_model import ROOT, SIZES, main, make_random_model, resized

FILES = {
    "small": {"cosyvoice.yaml", "llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v1.onnx"},
    "small2": {"cosyvoice2.yaml", "llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx"}
    | {f"CosyVoice-BlankEN/{name}" for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json")},
}
NOT_RANDOM = ("cosyvoice.yaml", "cosyvoice2.yaml", "CosyVoice-BlankEN")


@pytest.fixture(scope="module", params=FILES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / request.param, seed=5, size=request.param)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_seed_decides_every_byte(folder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    main(["--output", str(tmp_path / "same"), "--seed", "5", "--size", folder.name])
    assert torch.equal(torch.random.get_rng_state(), before)
    files = FILES[folder.name]
    assert files_in(folder) == files
    other = make_random_model(tmp_path / "other", seed=6, size=folder.name)
    for name in files:
        assert fingerprint_file(tmp_path / "same" / name) == fingerprint_file(folder / name)
        assert (fingerprint_file(other / name) == fingerprint_file(folder / name)) == name.startswith(NOT_RANDOM)


def test_weights_load_strictly_and_keep_the_vocabularies(folder: Path) -> None:
    llm, flow, _ = (load_part(ModelFolder(folder), part) for part in ("llm", "flow", "hift"))
    speech = {"small": 4096, "small2": 6561}[folder.name]
    assert llm.speech_token_size == flow.input_embedding.num_embeddings == speech
    text = ModelFolder(folder).parts(["get_tokenizer"])["get_tokenizer"]().encode("Something, 42 \u4f60 [breath]")
    assert max(text) < llm.text_embedding.num_embeddings
    if folder.name == "small":
        assert llm.text_embedding.num_embeddings == 51866


def test_the_small_tokenizer_knows_words_and_any_letter(tmp_path: Path) -> None:
    write_blank_en(tmp_path, {})
    tokenizer = get_qwen_tokenizer(str(tmp_path), skip_special_tokens=False)
    pieces, merges = byte_pairs()
    for text in ("Was it the people of Zürich, or not?", "\u4f60\u597d \U0001f600\n", "<|im_end|>[breath]a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(" the people") == [pieces["Ġthe"], pieces["Ġpeople"]]
    assert tokenizer.encode("<|endofprompt|>") == [len(pieces) + 3] and 400 < len(pieces) < 600


def test_the_sizes_of_cosyvoice2_are_those_of_the_public_model(tmp_path: Path) -> None:
    size = SIZES["cosyvoice2-0.5b"]
    write_blank_en(tmp_path / "CosyVoice-BlankEN", dict(size.text_model))
    shutil.copy(size.config, tmp_path)
    manifest = V1.table("manifest_cosyvoice2_05b")
    for part in ("llm", "flow", "hift"):
        with torch.device("meta"):
            state = ModelFolder(tmp_path).parts([part])[part].state_dict()
        listed = {name: entry["shape"] for name, entry in manifest[part]["keys"].items()}
        assert {name: list(tensor.shape) for name, tensor in state.items()} == listed


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 99, 100])
def test_speech_tokenizer_interface(folder: Path, frames: int) -> None:
    model = ModelFolder(folder)
    session = onnxruntime.InferenceSession(model.speech_tokenizer)
    assert [(item.name, item.type) for item in session.get_inputs()] == [
        ("feats", "tensor(float)"),
        ("feats_length", "tensor(int32)"),
    ]
    feats = np.random.default_rng(0).standard_normal((1, 128, frames + 10), dtype=np.float32)
    length = np.array([frames], dtype=np.int32)
    (tokens,) = session.run(None, {"feats": feats, "feats_length": length})
    assert tokens.dtype == np.int32 and tokens.shape == (1, -(-frames * model.rates.token_rate // 100))
    assert tokens.min() >= 0 and tokens.max() < SIZES[folder.name].speech_tokens
    assert len(np.unique(tokens)) > tokens.size // 2  # the audio decides


def test_speaker_encoder_interface(folder: Path) -> None:
    session = onnxruntime.InferenceSession(folder / "campplus.onnx")
    assert [(item.name, item.type) for item in session.get_inputs()] == [("input", "tensor(float)")]
    fbank = np.random.default_rng(0).standard_normal((1, 50, 80), dtype=np.float32)
    (vector,) = session.run(None, {"input": fbank})
    (other,) = session.run(None, {"input": fbank[:, :30]})
    assert vector.dtype == np.float32 and vector.shape == (1, 192)
    assert not np.allclose(vector, other)


@pytest.mark.parametrize("name", ["small", "small2"])
def test_only_the_listed_settings_change(name: str) -> None:
    size = SIZES[name]
    original = size.config.read_text(encoding="utf-8")
    assert resized(original, {}) == original
    small = resized(original, size.changes).splitlines()
    changed = [new for old, new in zip(original.splitlines(), small, strict=True) if old != new]
    assert len(changed) == len(size.changes)


def test_an_unwritable_place_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, str(ROOT / "tools" / "random_model.py"), "--output", str(tmp_path / "file" / "model")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "cannot write" in result.stderr and result.stderr.count("\n") == 1
