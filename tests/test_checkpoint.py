"""Weights files: what is read, what is refused, and what a mismatch says."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from models import tiny, tiny_model_dir
from parity import PARITY_DIR
from planted import Bomb
from torch import Tensor, nn

from cosyvoice.model_folder.fingerprints import fingerprint_file, fingerprint_weights
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_part, load_strict, load_tensors, read_state_dict
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import save_tensors


def mismatch(module: nn.Module, state: dict[str, Tensor]) -> str:
    with pytest.raises(InputError) as caught:
        load_strict(module, state, "part.pt")
    message = str(caught.value)
    assert message.startswith("part.pt does not fit") and "\n" not in message and len(message) < 1500
    return message


@pytest.mark.parametrize("part", ["llm", "flow", "hift"])
def test_loading_draws_no_random_weights(tmp_path: Path, part: str) -> None:
    folder = tiny_model_dir(tmp_path)
    before = torch.get_rng_state()
    module = load_part(ModelFolder(folder), part)
    assert torch.equal(torch.get_rng_state(), before)
    state = read_state_dict(folder / f"{part}.pt")
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in module.state_dict().items())
    assert not torch.equal(nn.Linear(2, 2).weight, nn.Linear(2, 2).weight)  # elsewhere they are drawn as ever


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (torch.tensor([1.0, torch.nan]), "b.weight holds values that are not finite"),
        (torch.tensor([torch.inf, 1.0]).half(), "b.weight holds values that are not finite"),
        (torch.tensor([-torch.inf, torch.inf]).bfloat16(), "b.weight holds values that are not finite"),
        (torch.tensor([True, False]), "b.weight is of type bool, and weights are floating-point"),
        (torch.tensor([1, 2]), "b.weight is of type int64"),
        (torch.tensor([1j, 2]), "b.weight is of type complex64"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path, spoilt: Tensor, message: str) -> None:
    path = tmp_path / "llm.pt"
    torch.save({"a.weight": torch.full((4,), 3e38), "b.weight": spoilt}, path)  # whose sum is too large for float32
    with pytest.raises(InputError, match=f"llm.pt: {message}"):
        read_state_dict(path)
    torch.save({"a.weight": torch.full((4,), 3e38)}, path)
    assert read_state_dict(path)["a.weight"].isfinite().all()


@pytest.mark.parametrize("as_zip", [True, False])
def test_counters_are_dropped_and_tensors_kept(tmp_path: Path, as_zip: bool) -> None:
    path = tmp_path / "llm.pt"
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"epoch": 3, "step": 12000, "a.weight": weight}, path, _use_new_zipfile_serialization=as_zip)
    state = read_state_dict(path)
    assert state.keys() == {"a.weight"}
    assert torch.equal(state["a.weight"], weight)


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_is_refused_and_not_run(tmp_path: Path, as_zip: bool) -> None:
    path, mark = tmp_path / "flow.pt", tmp_path / "ran"
    torch.save({"a": torch.zeros(1), "b": Bomb(mark)}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(InputError, match=r"flow\.pt is refused.*mkdir"):
        read_state_dict(path)
    assert not mark.exists()


def test_a_bare_pickle_with_code_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "hift.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(InputError, match="hift.pt"):
        read_state_dict(path)
    assert not mark.exists()


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_cut_files_are_damaged(tmp_path: Path, as_zip: bool, share: float) -> None:
    path = tmp_path / "llm.pt"
    torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=as_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="damaged"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "list"),
        (torch.zeros(1), "Tensor"),
        ({}, "empty"),
        ({"epoch": 1}, "empty"),
        ({"a": torch.zeros(1), "b": "text"}, "b are not named tensors"),
        ({3: torch.zeros(1)}, "3 are not named tensors"),
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, "training checkpoint"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "llm.pt")
    with pytest.raises(InputError, match=message):
        read_state_dict(tmp_path / "llm.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="llm.pt does not exist"):
        read_state_dict(tmp_path / "llm.pt")


def test_names_are_grouped_and_counted() -> None:
    flow = tiny("flow")
    state = flow.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.encoders.")}
    gone = len(state) - len(kept)
    message = mismatch(flow, {**kept, "strange.0.x": torch.zeros(1), "strange.1.x": torch.zeros(1)})
    assert f"{gone} missing (encoder.encoders.*" in message
    assert "2 unexpected (strange.*.x: 2)" in message


def test_a_scalar_and_a_wrong_shape_are_shown() -> None:
    message = mismatch(nn.Linear(3, 2), {"weight": torch.zeros(4, 3), "bias": torch.tensor(0.0)})
    assert "2 of another shape (bias a scalar, not 2, weight 4x3, not 2x3)" in message


def test_attention_naming_is_the_cause() -> None:
    flow = tiny("flow")
    renamed = {name.replace(".attn1.", ".attn."): tensor for name, tensor in flow.state_dict().items()}
    assert "named attn, not attn1" in mismatch(flow, renamed)


def test_cosyvoice2_is_the_cause() -> None:
    llm, flow = tiny("llm"), tiny("flow")
    assert "CosyVoice2" in mismatch(llm, {"llm.model.model.norm.weight": torch.zeros(2)})
    ahead = {"encoder.pre_lookahead_layer.conv1.bias": torch.zeros(2)}
    assert "CosyVoice2" in mismatch(flow, flow.state_dict() | ahead)
    assert "CosyVoice2" in mismatch(flow, flow.state_dict() | {"input_embedding.weight": torch.zeros(6561, 64)})


def test_25hz_is_the_cause() -> None:
    llm = tiny("llm")
    state = llm.state_dict() | {"text_embedding.weight": torch.zeros(60515, 32)}
    assert "25Hz" in mismatch(llm, state)


def test_adapters_and_other_parts_are_the_cause() -> None:
    flow = tiny("flow")
    assert "LoRA" in mismatch(flow, flow.state_dict() | {"encoder_proj.lora_a": torch.zeros(1)})
    assert "another part" in mismatch(flow, read_state_dict(PARITY_DIR / "tiny_hift.pt"))
    assert "incomplete" in mismatch(flow, {"encoder_proj.bias": torch.zeros(80)})


def test_a_refused_file_leaves_the_module_as_it_was() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    mismatch(module, {"weight": torch.zeros(2, 2)})
    assert torch.equal(module.weight, before)


def test_fingerprint_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"weights" * 1000)
    assert fingerprint_file(tmp_path / "x") == hashlib.sha256(b"weights" * 1000).hexdigest()


def test_a_fingerprint_of_weights_tells_others_apart(tmp_path: Path) -> None:
    """Whatever the file is called; a single value, shape or name makes other weights."""
    states = [
        {"a": torch.arange(6.0), "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "b": torch.tensor([0.0, 1e-7])},
        {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "c": torch.zeros(2)},
    ]
    for number, state in enumerate(states):
        torch.save(state, tmp_path / f"{number}.pt")
    torch.save(states[0], tmp_path / "same.pt")
    found = [fingerprint_weights(tmp_path / f"{number}.pt") for number in range(len(states))]
    assert len(set(found)) == len(states)
    assert fingerprint_weights(tmp_path / "same.pt") == found[0]
    old = tmp_path / "old.pt"
    torch.save(states[0], old, _use_new_zipfile_serialization=False)
    assert fingerprint_weights(old) == fingerprint_file(old)


def test_only_weights_are_left_in_their_file(tmp_path: Path) -> None:
    """Windows replaces no file that somebody holds, and voices and checkpoints are written anew."""
    path = tmp_path / "voice.pt"
    torch.save({"vector": torch.arange(1000.0)}, path)
    loaded, mapped = load_tensors(path, "make it anew")["vector"], load_tensors(path, "make it anew", mapped=True)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded, torch.arange(1000.0)) and not mapped["vector"].any()


def test_a_flipped_bit_anywhere_in_a_weights_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "llm.pt"
    save_tensors({"a": torch.arange(1000.0), "b": torch.ones(3, 4, dtype=torch.float16)}, path)
    content = path.read_bytes()
    read_state_dict(path)
    unnoticed = []
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            state = read_state_dict(path)
        except InputError:
            continue
        if not torch.equal(state["a"], torch.arange(1000.0)) or not torch.equal(state["b"].float(), torch.ones(3, 4)):
            unnoticed.append(place)
    assert not unnoticed
