"""The four commands on a folder of CosyVoice2, as a user runs them."""

import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torch.nn.functional as F
from models import ORIGIN
from torch import Tensor, nn

import inference_joint
import merge_joint_weights
import prepare_joint_data
import train_joint
from config import JOINT_TRAINING_CONFIG, MODES, settings_for, with_changes
from cosyvoice.flow.causal_flow import CausalMaskedDiffWithXvec
from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.model_folder.folder import COSYVOICE2, ModelFolder
from cosyvoice.model_folder.weights import load_part, load_strict, read_state_dict
from cosyvoice.runtime.command import seed_all
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import load_wav
from dataset import check_vocabularies, collate, load_clips, speaker_embedding
from llm_flow_model import FLOW_DRAWS, JointModel
from lora import LoRALinear, inject, load_adapters
from tools.random_model import make_random_model
from voices.run import read_run

RECORDINGS = Path(__file__).parents[1] / "examples" / "raw_audio"
CLIPS = 8  # the fewest of which some are held out
FAST = ["accumulate_grad_batches=2", "max_feat_len=40", "learning_rate=0.01", "precision=32-true"]
TIED = ("llm.model.model.embed_tokens.weight", "llm.model.lm_head.weight")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model, recordings, and the data prepared from them."""
    root = tmp_path_factory.mktemp("cosyvoice2")
    places = {name: root / name for name in ("model", "raw", "data")}
    make_random_model(places["model"], seed=7, size="small2")
    places["raw"].mkdir()
    for number in range(1, CLIPS + 1):
        for suffix in ("wav", "txt"):
            shutil.copy(RECORDINGS / f"{number:03d}.{suffix}", places["raw"])
        if number % 2:  # few tokens of the small tokenizer, so that there is enough speech to take turns
            (places["raw"] / f"{number:03d}.txt").write_text("There is no other way to make people see what it was.")
    prepare(places["model"], places["raw"], places["data"])
    return places


def prepare(model: Path, raw: Path, data: Path) -> None:
    folders = ["--model-dir", str(model), "--input-dir", str(raw), "--data-dir", str(data)]
    assert prepare_joint_data.main([*folders, "--device", "cpu", "--workers", "1"]) == 0


@pytest.fixture
def train(places: dict[str, Path], tmp_path: Path):
    """Runs train_joint.py into a folder of the test; returns that folder."""

    def run(*options: str, output: str = "output") -> Path:
        folders = ["--model-dir", places["model"], "--data-dir", places["data"], "--output-dir", tmp_path / output]
        assert train_joint.main([*map(str, folders), "--device", "cpu", "--set", *FAST, *options]) == 0
        return tmp_path / output

    return run


def joint_model(places: dict[str, Path], *changes: str) -> JointModel:
    folder = ModelFolder(places["model"])
    config = with_changes(settings_for(folder), [*FAST, *changes])
    parts = {part: load_part(folder, part) for part in MODES[config["training_mode"]]}
    torch.manual_seed(3)
    return JointModel(parts, config, 0, speaker_embedding(load_clips(places["data"], folder)), ORIGIN).train()


# Preparing


def test_tokens_and_mel_end_together(places: dict[str, Path]) -> None:
    folder = ModelFolder(places["model"])
    feat_extractor = folder.parts(["feat_extractor"])["feat_extractor"]
    rows = pq.read_table(places["data"] / "clips-00000.parquet", partitioning=None).to_pylist()
    assert len(rows) == CLIPS
    for row in rows:
        tokens, frames = len(row["speech_token"]), row["speech_feat_shape"][0]
        assert frames == 2 * tokens and tokens == pytest.approx(25 * row["seconds"], abs=1.5)
        assert max(row["speech_token"]) > 4096, "of the larger vocabulary"
    speech = load_wav(places["raw"] / "001.wav", 24000)
    ends_within = -speech.size(1) % 960
    assert ends_within, "or nothing is padded"
    mel = feat_extractor(F.pad(speech, (0, ends_within)))[0].T
    found = torch.tensor(rows[0]["speech_feat"]).view(-1, 80)
    assert torch.equal(found, mel[: len(found)]) and len(mel) - len(found) in (0, 2)


def test_data_survives_a_move_of_the_model_but_not_another_tokenizer(places: dict[str, Path], tmp_path: Path) -> None:
    moved = shutil.copytree(places["model"], tmp_path / "moved")
    assert len(load_clips(places["data"], ModelFolder(moved))) == CLIPS
    with (moved / "CosyVoice-BlankEN" / "merges.txt").open("a", encoding="utf-8") as merges:
        merges.write("t h\n")
    with pytest.raises(InputError, match="were prepared with another model than .*moved; run prepare_joint_data.py"):
        load_clips(places["data"], ModelFolder(moved))


def test_rows_of_another_generation_are_made_again(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, data = tmp_path / "raw", shutil.copytree(places["data"], tmp_path / "data")
    raw.mkdir()
    for suffix in ("wav", "txt"):
        shutil.copy(RECORDINGS / f"001.{suffix}", raw)
    first = make_random_model(tmp_path / "v1", seed=7)
    with pytest.raises(InputError, match="were prepared with another model than .*v1; run prepare_joint_data.py"):
        load_clips(data, ModelFolder(first))
    prepare(first, raw, data)
    told = capsys.readouterr().out
    assert f"{data} has {CLIPS} clips of another model than {first}. They are made again." in told
    assert "(0 unchanged)" in told
    (clip,) = load_clips(data, ModelFolder(first))
    assert len(clip.mel) == ModelFolder(first).rates.mel_frames(len(clip.speech_token))
    prepare(places["model"], raw, data)
    (clip,) = load_clips(data, ModelFolder(places["model"]))
    assert len(clip.mel) == 2 * len(clip.speech_token)


@pytest.mark.parametrize(("part", "kind"), [("llm", "text"), ("llm", "speech"), ("flow", "speech")])
def test_tokens_that_the_model_has_no_vector_for_are_refused(places: dict[str, Path], part: str, kind: str) -> None:
    folder = ModelFolder(places["model"])
    clips, module = load_clips(places["data"], folder), load_part(folder, part)
    check_vocabularies(clips, module)
    getattr(clips[0], f"{kind}_token")[0] = 6561  # of speech: the end token
    with pytest.raises(InputError, match=f"has the {kind} token 6561, but the model's end at"):
        check_vocabularies(clips, module)


# Training and merging


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_its_adapters_and_merges_strictly(train, places: dict[str, Path], mode: str) -> None:
    output = train("--mode", mode, "--epochs", "1")
    trained = read_run(output / f"joint_{mode}_last.ckpt")
    folder = ModelFolder(places["model"])
    settings = with_changes(settings_for(folder), [*FAST, f"training_mode={mode}", "max_epochs=1"])
    assert trained.config == settings and trained.parts == MODES[mode]
    adapted = {part: {name.rpartition(".")[0] for name in tensors} for part, tensors in trained.adapters.items()}
    for part in trained.parts:
        file = output / f"{part}_merged_{mode}.pt"
        merged, base = read_state_dict(file), read_state_dict(places["model"] / f"{part}.pt")
        load_strict(load_part(folder, part), merged, file.name)
        assert merged.keys() == base.keys()
        changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
        assert changed == {f"{layer}.weight" for layer in adapted[part]}
        assert {layer.rpartition(".")[2] for layer in adapted[part]} >= endings(part)
    if "llm" in trained.parts:
        merged = read_state_dict(output / f"llm_merged_{mode}.pt")
        assert merged[TIED[0]].data_ptr() == merged[TIED[1]].data_ptr(), "one tensor under two names"
        assert (output / f"llm_merged_{mode}.pt").stat().st_size < 1.1 * (places["model"] / "llm.pt").stat().st_size
        assert not any("lm_head" in layer or "llm_decoder" in layer for layer in adapted["llm"])


def endings(part: str) -> set[str]:
    """Return the last names of the layers that must have adapters."""
    if part == "llm":
        return set(COSYVOICE2.finetuning["llm_lora"]["target_modules"])
    return {"linear_q", "linear_k", "linear_v", "linear_out", "w_1", "w_2", "to_q", "to_k", "to_v", "0", "proj", "2"}


def test_both_encoders_of_the_flow_and_every_layer_of_qwen2_have_adapters(places: dict[str, Path]) -> None:
    model = joint_model(places)
    layers = Counter(
        ".".join(name.split(".")[:-2]) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)
    )
    for number in range(2):
        assert layers[f"parts.llm.llm.model.model.layers.{number}"] == 7
        assert layers[f"parts.flow.encoder.encoders.{number}"] == 6
    for number in range(4):
        assert layers[f"parts.flow.encoder.up_encoders.{number}"] == 6


@torch.no_grad()
def test_merged_weights_compute_what_base_and_adapters_do(train, places: dict[str, Path]) -> None:
    output = train("--epochs", "1")
    assert merge_joint_weights.main(["--model-dir", str(places["model"]), "--output-dir", str(output)]) == 0
    trained = read_run(output / "joint_joint_last.ckpt")
    folder = ModelFolder(places["model"])
    batch = collate(load_clips(places["data"], folder)[:2]) | {"bistream": torch.tensor([True, False])}
    losses = {}
    for kind in ("base", "adapted", "merged"):
        parts = {part: load_part(folder, part) for part in MODES["joint"]}
        for name, part in parts.items():
            lora = trained.config[f"{name}_lora"]
            if kind == "adapted":
                inject(part, lora["target_modules"], lora["lora_r"], lora["lora_alpha"], dropout=0.0)
                load_adapters(part, trained.best(name))
            if kind == "merged":
                load_strict(part, read_state_dict(output / f"{name}_merged_joint.pt"), name)
        losses[kind] = all_losses(parts, batch)
    torch.testing.assert_close(losses["merged"], losses["adapted"], atol=1e-4, rtol=0)
    assert all((losses["merged"] - losses["base"]).abs() > 1e-3)


def all_losses(parts: dict[str, nn.Module], batch: dict[str, Tensor]) -> Tensor:
    """(3,): of the LLM, and of the flow with full attention and by chunks, from the same draws."""
    found = [parts["llm"](batch, torch.device("cpu"))["loss"]]
    names = ("speech_token", "speech_token_len", "speech_feat", "speech_feat_len", "embedding")
    for streaming in (False, True):
        torch.manual_seed(1)
        found.append(parts["flow"].eval().loss(*(batch[name] for name in names), [0, 0], streaming=streaming))
    return torch.stack(found)


def test_a_resumed_run_equals_an_uninterrupted_one(train) -> None:
    whole = train("--epochs", "2", output="whole")
    resumed = train("--epochs", "2", "--resume", str(first_epoch(whole)), output="resumed")
    assert_same(*(read_run(folder / "joint_joint_last.ckpt") for folder in (whole, resumed)))


def first_epoch(output: Path) -> Path:
    return next(output.glob("joint_joint_epoch0001_*.ckpt"))


def assert_same(one: Any, other: Any) -> None:
    for part in one.parts:
        assert one.state.progress[part].history == other.state.progress[part].history
        for name, tensor in one.adapters[part].items():
            assert torch.equal(tensor, other.adapters[part][name]), name


def test_another_run_starts_from_the_adapters_of_one(train, capsys: pytest.CaptureFixture[str]) -> None:
    output = train("--mode", "llm_only", "--epochs", "1")
    train("--epochs", "1", "--init", str(output / "joint_llm_only_last.ckpt"), output="joint")
    assert "llm: starting from" in capsys.readouterr().out


def test_memory_decides_how_many_clips_are_a_pass(train, capsys: pytest.CaptureFixture[str]) -> None:
    output = train("--epochs", "1", "--memory", "4GB", "--set", "accumulate_grad_batches=4")
    assert "4 GB: batch_size=4, accumulate_grad_batches=1" in capsys.readouterr().out
    assert read_run(output / "joint_joint_last.ckpt").config["batch_size"] == 4


# What is drawn


def test_turns_of_text_and_speech_are_a_setting_of_models_that_have_them(
    train, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings_for(ModelFolder(places["model"]))["bistream_ratio"] == 0.5
    drawn, draw = [], Qwen2LM.drawn_layouts
    monkeypatch.setattr(Qwen2LM, "drawn_layouts", lambda llm, batch: drawn.append(draw(llm, batch)) or drawn[-1])
    for ratio in (0, 1):
        drawn.clear()
        train("--mode", "llm_only", "--epochs", "1", "--set", f"bistream_ratio={ratio}", output=str(ratio))
        assert torch.cat(drawn).sum() == ratio * CLIPS // 2, "every second clip has enough speech"
    with pytest.raises(InputError, match="bistream_ratio is no setting of this model"):
        with_changes(JOINT_TRAINING_CONFIG, ["bistream_ratio=0.3"])
    with pytest.raises(InputError, match="bistream_ratio must be a number at least 0 and at most 1, not 2"):
        with_changes(settings_for(ModelFolder(places["model"])), ["bistream_ratio=2"])


def test_attention_by_chunks_is_a_coin_a_batch_and_half_of_what_is_held_out(
    train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    loss = CausalMaskedDiffWithXvec.loss

    def listen(flow: CausalMaskedDiffWithXvec, *args: Any, streaming: bool, **options: Any) -> Tensor:
        seen.append((options["drops_conditions"], streaming))
        return loss(flow, *args, streaming=streaming, **options)

    monkeypatch.setattr(CausalMaskedDiffWithXvec, "loss", listen)
    first = train("--mode", "flow_only", "--epochs", "4", output="first")
    coins = [streaming for training, streaming in seen if training]
    held_out = [streaming for training, streaming in seen if not training]
    assert len(coins) == 4 * (CLIPS - 2) and set(coins) == {False, True}
    assert held_out == [False, True] * (4 * 2 * FLOW_DRAWS // 2)
    resumed = next(first.glob("joint_flow_only_epoch0002_*.ckpt"))
    seen.clear()
    train("--mode", "flow_only", "--epochs", "4", "--resume", str(resumed), output="second")
    assert [streaming for training, streaming in seen if training] == coins[len(coins) // 2 :]


def test_windows_of_one_batch_share_the_coin(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = joint_model(places, "training_mode=flow_only", "max_feat_len=1000")
    batch = collate(load_clips(places["data"], ModelFolder(places["model"])))
    seen = []
    monkeypatch.setattr(
        model.parts["flow"], "loss", lambda *_, streaming, **__: seen.append(streaming) or torch.ones(())
    )
    coins = set()
    for number in range(12):
        seed_all(0, 0, number)
        seen.clear()
        model.flow_loss(batch, torch.zeros(CLIPS, 192))
        assert len(seen) > 3 and len(set(seen)) == 1, "clips of several lengths, and one coin"
        coins.add(seen[0])
    assert coins == {False, True}


# Memory and precision


def test_blocks_computed_again_keep_less_and_give_the_same_gradients(places: dict[str, Path]) -> None:
    batch = collate(load_clips(places["data"], ModelFolder(places["model"]))[:2])
    gradients, kept = [], []
    for recompute in (False, True):
        model, saved = joint_model(places, f"recompute={recompute}", "max_feat_len=250"), {}
        seed_all(5)
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, saved), lambda tensor: tensor):
            losses = model.losses(batch, model.active())
        kept.append(sum(saved.values()))
        (losses["llm_loss"] + losses["flow_loss"]).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    blocks = Counter(type(block).__name__ for block in model.recomputed_blocks())
    assert blocks == {"EncoderLayer": 6, "ResnetBlock1D": 4, "BasicTransformerBlock": 4, "Qwen2DecoderLayer": 2}
    assert kept[1] < 0.6 * kept[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def keep(saved: dict[int, int], tensor: Tensor) -> Tensor:
    """Note the bytes of a tensor that is saved for gradients, by its place in memory."""
    saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


def test_a_base_in_half_precision_trains_adapters_in_float32(places: dict[str, Path]) -> None:
    batch = collate(load_clips(places["data"], ModelFolder(places["model"]))[:2])
    found = []
    for half in (False, True):
        model = joint_model(places)
        seed_all(5)
        if half:
            model.keep_base_in(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = model.losses(batch, model.active())
        (losses["llm_loss"] + losses["flow_loss"]).backward()
        found.append(torch.stack([losses["llm_loss"], losses["flow_loss"]]).detach())
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)


def spoken(into: list[str], *options: str) -> np.ndarray:
    """Speak with the newest voice, and return the samples."""
    assert inference_joint.main([*into, "--device", "cpu", "--text", "Two words.", *options]) == 0
    samples, rate = soundfile.read(Path(into[-1]) / "result.wav")
    assert rate == 24000 and samples.ndim == 1 and len(samples) % 480 == 0 and np.abs(samples).max() > 1e-3
    return samples


def test_a_trained_voice_speaks_at_once_and_in_pieces(places: dict[str, Path], train, tmp_path: Path) -> None:
    output = train("max_epochs=1")
    into = ["--model-dir", str(places["model"]), "--output-dir", str(output)]
    merged = spoken(into)
    adapted = ["--adapter", str(output / "joint_joint_last.ckpt"), "--precision", "float32"]
    exact = ["--precision", "float32"]
    np.testing.assert_allclose(spoken(into, *adapted), spoken(into, *exact), atol=5e-3)
    assert len(merged) > 0
    streamed = spoken(into, "--stream")
    pieces = [soundfile.read(path)[0] for path in sorted(output.glob("result.piece*.wav"))]
    assert np.array_equal(np.concatenate(pieces), streamed)


@pytest.mark.full_size
def test_the_whole_job_at_full_size(tmp_path: Path) -> None:
    """Two training steps, a merge, a sentence and a stream at the sizes of CosyVoice2-0.5B, with random weights."""
    model, raw, data, output = (tmp_path / name for name in ("model", "raw", "data", "output"))
    make_random_model(model, seed=7, size="cosyvoice2-0.5b")
    raw.mkdir()
    for number in (1, 2):
        for suffix in ("wav", "txt"):
            shutil.copy(RECORDINGS / f"{number:03d}.{suffix}", raw)
    prepare(model, raw, data)
    into = ["--model-dir", str(model), "--output-dir", str(output)]
    steps = ["--epochs", "1", "--set", "accumulate_grad_batches=1", "max_feat_len=100"]
    assert train_joint.main([*into, "--data-dir", str(data), "--device", "cpu", *steps]) == 0
    assert merge_joint_weights.main(into) == 0
    merged = read_state_dict(output / "llm_merged_joint.pt")
    assert merged[TIED[0]].data_ptr() == merged[TIED[1]].data_ptr()
    load_strict(load_part(ModelFolder(model), "llm"), merged, "llm_merged_joint.pt")
    del merged
    spoken(into)
    spoken(into, "--stream")
