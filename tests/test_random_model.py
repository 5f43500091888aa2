"""The random model folder: complete, repeatable, and with the real interfaces."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from cosyvoice.model_folder.fingerprints import fingerprint_file
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.model_folder.weights import load_strict, read_state_dict
from tools.random_model import CONFIG, ROOT, SIZES, main, make_random_model, resized

FILES = {
    "cosyvoice.yaml",
    "llm.pt",
    "flow.pt",
    "hift.pt",
    "campplus.onnx",
    "speech_tokenizer_v1.onnx",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("model"), seed=5)


def test_the_seed_decides_every_byte(folder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    main(["--output", str(tmp_path / "same"), "--seed", "5"])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {path.name for path in folder.iterdir()} == FILES
    other = make_random_model(tmp_path / "other", seed=6)
    for name in FILES:
        assert fingerprint_file(tmp_path / "same" / name) == fingerprint_file(folder / name)
        assert (fingerprint_file(other / name) == fingerprint_file(folder / name)) == (name == "cosyvoice.yaml")


def test_weights_load_strictly_and_keep_the_vocabularies(folder: Path) -> None:
    parts = load_model_yaml(folder / "cosyvoice.yaml", parts=("llm", "flow", "hift"))
    for name, module in parts.items():
        load_strict(module, read_state_dict(folder / f"{name}.pt"), f"{name}.pt")
    assert parts["llm"].text_embedding.num_embeddings == 51866
    assert parts["llm"].speech_embedding.num_embeddings == parts["flow"].input_embedding.num_embeddings == 4096


@pytest.mark.parametrize("frames", [1, 2, 99, 100])
def test_speech_tokenizer_interface(folder: Path, frames: int) -> None:
    session = onnxruntime.InferenceSession(folder / "speech_tokenizer_v1.onnx")
    assert [(item.name, item.type) for item in session.get_inputs()] == [
        ("feats", "tensor(float)"),
        ("feats_length", "tensor(int32)"),
    ]
    feats = np.random.default_rng(0).standard_normal((1, 128, frames + 10), dtype=np.float32)
    length = np.array([frames], dtype=np.int32)
    (tokens,) = session.run(None, {"feats": feats, "feats_length": length})
    assert tokens.dtype == np.int32 and tokens.shape == (1, (frames + 1) // 2)
    assert tokens.min() >= 0 and tokens.max() < 4096
    assert len(np.unique(tokens)) > tokens.size // 2  # the audio decides


def test_speaker_encoder_interface(folder: Path) -> None:
    session = onnxruntime.InferenceSession(folder / "campplus.onnx")
    assert [(item.name, item.type) for item in session.get_inputs()] == [("input", "tensor(float)")]
    fbank = np.random.default_rng(0).standard_normal((1, 50, 80), dtype=np.float32)
    (vector,) = session.run(None, {"input": fbank})
    (other,) = session.run(None, {"input": fbank[:, :30]})
    assert vector.dtype == np.float32 and vector.shape == (1, 192)
    assert not np.allclose(vector, other)


def test_only_the_listed_settings_change() -> None:
    original = CONFIG.read_text(encoding="utf-8")
    assert resized(original, {}) == original
    small = resized(original, SIZES["small"]).splitlines()
    changed = [new for old, new in zip(original.splitlines(), small, strict=True) if old != new]
    assert len(changed) == len(SIZES["small"])


def test_an_unwritable_place_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, str(ROOT / "tools" / "random_model.py"), "--output", str(tmp_path / "file" / "model")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "cannot write" in result.stderr and result.stderr.count("\n") == 1
