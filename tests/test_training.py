"""Training on a handful of made-up clips: what is trained, resuming, stopping, merging."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from made_clips import FAST, clips
from models import ORIGIN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import inference_joint
import merge_joint_weights
import train_joint
from config import JOINT_TRAINING_CONFIG, with_changes
from cosyvoice.bin.memory import PROCESS_BYTES, TRAINED_BYTES
from cosyvoice.bin.sample_voice import SampleVoice
from cosyvoice.bin.sampling import Recording
from cosyvoice.cli.frontend import read_spk2info
from cosyvoice.flow.flow_matching import ConditionalCFM, TrainingDraw
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_part, read_state_dict
from cosyvoice.runtime import temporary_files
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.scheduler import learning_rate_factor
from dataset import Clip, collate, speaker_embedding
from llm_flow_model import FLOW_DRAWS, JointModel
from lora import Dropout, LoRALinear, adapter_state, adapters, inject, merged
from tools.random_model import make_random_model
from training.checkpoints import CheckpointKeeper, Interrupted
from training.memory import (
    PASSING_SHARE,
    clips_a_pass,
    kept_bytes,
    saved_bytes,
    weight_bytes,
)
from training.precision import FIRST_LOSS_SCALE, LossScaler, compute_precision
from voices.lines import Line
from voices.merge import merge_run, merged_path
from voices.run import newest_run, read_run
from voices.sidecar import newest_voice
from voices.synthesis import ReadyVoice

NOISE = torch.randn(1, 16000, generator=torch.Generator().manual_seed(1)) / 10


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_random_model(folder, seed=3, size="small")
    return folder


@pytest.fixture
def train(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs train_joint.py's main on made-up clips; returns its exit code."""

    def run(*options: str, output: str = "output", count: int = 10, made: list[Clip] | None = None) -> int:
        monkeypatch.setattr("dataset.load_clips", lambda *folders: made or clips(count))
        folders = ["--model-dir", str(model_dir), "--output-dir", str(tmp_path / output), "--device", "cpu"]
        return train_joint.main([*folders, "--set", *FAST, *options])

    return run


def assert_same_run(one: Path, other: Path) -> None:
    first, second = read_run(one), read_run(other)
    assert first.adapters.keys() == second.adapters.keys()
    for part in first.parts:
        for name, tensor in first.adapters[part].items():
            assert torch.equal(tensor, second.adapters[part][name]), name
        assert first.state.progress[part].history == second.state.progress[part].history


def test_lora_starts_at_the_base_and_merges_exactly() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    x = torch.randn(3, 6)
    expected = base(x)
    assert inject(base, ["0", "2"], rank=2, alpha=6, dropout=0.0) == ["0", "2"]
    assert torch.equal(base(x), expected)
    for layer in base:
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B)
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    plain.load_state_dict(merged(before, adapter_state(base), scale=3.0))
    torch.testing.assert_close(plain(x), base(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = Dropout(0.15), torch.ones(3, 101, 333, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / 0.85], dtype=dtype))
    assert abs((y == 0).float().mean().item() - 0.15) < 0.005  # four standard deviations
    assert torch.equal(x.grad, y)
    assert not torch.equal(layer(x), y)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    assert layer.eval()(x) is x


@pytest.mark.parametrize(("part", "expected"), [("llm", 4 * 6), ("flow", 2 * 6 + 6 * 6)])
def test_adapters_sit_where_they_should(model_dir: Path, part: str, expected: int) -> None:
    """Small model: LLM 2 + 2 attention blocks of six layers; Flow 2 blocks and 6 estimator blocks of six layers."""
    module = load_part(ModelFolder(model_dir), part)
    lora = JOINT_TRAINING_CONFIG[f"{part}_lora"]
    names = inject(module, lora["target_modules"], 2, 4, 0.0)
    assert len(names) == expected
    assert not any("linear_pos" in name for name in names)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{tensor}" for name in names for tensor in ("lora_A", "lora_B")}


@pytest.mark.parametrize("mode", ["joint", "llm_only", "flow_only"])
def test_modes_write_what_they_train(train, tmp_path: Path, model_dir: Path, mode: str) -> None:
    assert train("--mode", mode, "--epochs", "2") == 0
    output = tmp_path / "output"
    voice = newest_voice(output)
    parts = {"joint": {"llm", "flow"}, "llm_only": {"llm"}, "flow_only": {"flow"}}[mode]
    assert set(voice.files) == parts
    for part, file in voice.files.items():
        state, base = read_state_dict(file), read_state_dict(model_dir / f"{part}.pt")
        assert state.keys() == base.keys()
        changed = {name for name in base if not torch.equal(state[name], base[name])}
        assert changed and all(name.endswith(".weight") for name in changed)
    speakers = read_spk2info(output / "spk2info.pt")
    assert speakers["ann"]["embedding"].shape == (1, 192)
    assert len(list(output.glob(f"joint_{mode}_epoch*.ckpt"))) == 2
    assert list((output / "joint_logs" / mode).rglob("events.out.tfevents*"))


def test_the_pace_of_the_speaker_is_kept_with_an_llm_that_has_learned_it(
    train, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = clips(7)  # of which none is held out
    slowest = max(len(clip.speech_token) / len(clip.text_token) for clip in made)
    spoken_at = []

    def silent(voice: ReadyVoice, *_: Any) -> Iterator[Any]:
        spoken_at.append(voice.cosyvoice.model.llm.pace)
        yield Line(1, "", tmp_path / "1.wav"), torch.zeros(1, 100)

    monkeypatch.setattr(ReadyVoice, "speak", silent)
    output = tmp_path / "output"
    folders = ["--model-dir", str(model_dir), "--output-dir", str(output), "--device", "cpu", "--text", "Hello."]

    def pace(*options: str) -> float | None:
        inference_joint.main([*folders, *options])
        return spoken_at.pop()

    train("--epochs", "1", made=made)
    assert newest_voice(output).pace == read_run(output / "joint_joint_last.ckpt").pace == slowest
    assert pace() == pace("--adapter", str(output / "joint_joint_last.ckpt")) == slowest
    assert pace("--llm", str(output / "llm_merged_joint.pt")) == slowest
    assert pace("--flow", str(output / "flow_merged_joint.pt")) is None  # with the base's LLM
    train("--mode", "flow_only", "--epochs", "1", made=made)
    assert pace() is None
    both = ["--llm", str(output / "llm_merged_joint.pt"), "--flow", str(output / "flow_merged_flow_only.pt")]
    assert pace(*both) == slowest

    for path in (output / "voice_joint.json", output / "voice_flow_only.json"):  # as older versions wrote them
        content = json.loads(path.read_text())
        del content["pace"]
        path.write_text(json.dumps(content))
    assert pace(*both) is None
    older = torch.load(output / "joint_joint_last.ckpt")
    del older["voice"]["pace"]
    torch.save(older, output / "joint_joint_last.ckpt")
    assert pace("--adapter", str(output / "joint_joint_last.ckpt")) is None
    merge_run(read_run(output / "joint_joint_last.ckpt"), ModelFolder(model_dir), output, {}, use_best=True)
    assert "pace" not in json.loads((output / "voice_joint.json").read_text())


@pytest.mark.parametrize(("text", "expected"), [("8GB", 8 * 10**9), ("0.5 gb", 5 * 10**8), ("6000MB", 6 * 10**9)])
def test_a_memory_size(text: str, expected: int) -> None:
    assert train_joint.memory_size(text) == expected


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "8 GiB"])
def test_no_memory_size(train, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train("--memory", text)
    assert stop.value.code == 2 and "8GB" in capsys.readouterr().err


def joint_model(model_dir: Path, *changes: str) -> JointModel:
    config = with_changes(JOINT_TRAINING_CONFIG, [*FAST, "batch_size=2", "accumulate_grad_batches=6", *changes])
    parts = {part: load_part(ModelFolder(model_dir), part) for part in ("llm", "flow")}
    return JointModel(parts, config, 0, torch.randn(192), ORIGIN)


def test_more_memory_takes_more_clips_at_once(model_dir: Path) -> None:
    """Twice the clip keeps twice as much; 12 clips a step are divided evenly."""
    torch.manual_seed(0)
    model, made = joint_model(model_dir, "precision=32-true"), clips(10)
    model.train()
    one, two = (kept_bytes(model, collate(made[-1:] * count)) for count in (1, 2))
    assert one > sum(len(made[-1].speech_token) * 4 * 2 * width for width in (128, 80))  # at the very least
    assert 1.9 < two / one < 2.1
    weights = sum(weight.numel() * (TRAINED_BYTES if weight.requires_grad else 4) for weight in model.parameters())
    found = [
        clips_a_pass(model, made, round(PROCESS_BYTES + weights + PASSING_SHARE * one * room), "cpu")
        for room in (-1.0, 0.5, 1.1, 3.2, 5.5, 6.5, 100.0)
    ]
    assert found == [0, 0, 1, 3, 4, 6, 12]
    assert clips_a_pass(model, made, 10**12, "cpu", devices=4) == 3  # each has a fourth of the step


def test_half_precision_takes_about_half_the_memory(model_dir: Path) -> None:
    """Copies of weights are counted with the weights, once, and not with the clips."""
    torch.manual_seed(0)
    model, made = joint_model(model_dir).train(), clips(10)
    exact, half, two = (
        kept_bytes(model, collate(made[-1:] * count), in_half) for count, in_half in ((1, False), (1, True), (2, True))
    )
    assert 0.45 < half / exact < 0.8
    assert 1.9 < two / half < 2.1, "something is counted that does not grow with the clips"
    weights = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = weights - trained
    found = [
        weight_bytes(model, in_half, device) for in_half, device in ((False, "cpu"), (True, "cpu"), (True, "cuda"))
    ]
    assert found == [frozen * size + trained * TRAINED_BYTES for size in (4, 6, 2)]
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_memory_is_judged_in_the_precision_that_will_be_used(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, made = [], clips(10)
    monkeypatch.setattr("training.memory.kept_bytes", lambda model, batch, in_half: asked.append(in_half) or 10**8)
    for has_bfloat16 in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_bfloat16: has_it)
        for precision in ("32-true", "16-mixed", "bf16-mixed"):
            for device in ("cpu", "cuda"):
                clips_a_pass(joint_model(model_dir, f"precision={precision}"), made, 10**9, device)
    without, with_bfloat16 = asked[:6], asked[6:]
    assert without == [False, False, False, True, True, True]
    assert with_bfloat16 == [False, False, True, True, True, True]


def test_recomputed_blocks_give_the_same_gradients_in_less_memory(model_dir: Path) -> None:
    """With the adapters' dropout on, which has to drop the same again."""
    batch, found = collate(clips(10)[-2:]), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = joint_model(model_dir, f"recompute={recompute}").train()
        for layer in adapters(model):
            nn.init.normal_(layer.lora_B, std=0.1)
        torch.manual_seed(1)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        saved = saved_bytes(lambda model=model: model.losses(batch, model.active()), weights)
        assert (kept_bytes(model, batch) > saved) == recompute  # one block at a time takes what it needs
        torch.manual_seed(1)
        sum(model.losses(batch, model.active())[f"{part}_loss"] for part in ("llm", "flow")).backward()
        found.append((saved, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}))
    (most, expected), (least, gradients) = found
    assert least < 0.5 * most
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-5)


def test_the_flow_is_shown_beginnings_of_as_many_clips_as_asked(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(ratio: float) -> list[int]:
        """Frames by clip."""
        model, frames = joint_model(model_dir, f"flow_prompt_ratio={ratio}"), []
        loss = model.parts["flow"].loss

        def noted(*inputs: Any, **named: Any) -> Tensor:
            frames.extend(inputs[5])
            return loss(*inputs, **named)

        monkeypatch.setattr(model.parts["flow"], "loss", noted)
        torch.manual_seed(0)
        model.flow_loss(collate(clips(10)), torch.zeros(10, 192))
        return frames

    none, half, all_of_them = map(shown, (0, 0.5, 1))
    assert not any(none) and len(none) == 10
    assert 2 <= sum(map(bool, half)) < sum(map(bool, all_of_them))  # of which some are shown no frame, too
    assert 5 <= max(all_of_them) <= 0.3 * 40


def test_memory_changes_how_many_passes_a_step_has(train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--memory", "64GB", "--epochs", "1") == 0
    assert "64 GB: batch_size=4, accumulate_grad_batches=1\n" in capsys.readouterr().out
    config = read_run(tmp_path / "output" / "joint_joint_last.ckpt").config
    assert (config["batch_size"], config["accumulate_grad_batches"]) == (4, 1)
    assert train("--memory", "1MB", "--epochs", "1") == 0
    said = capsys.readouterr().out
    assert "even one clip" in said and "0.001 GB: batch_size=1, accumulate_grad_batches=4\n" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (4, 4)),
        (["--batch-size", "1"], (1, 16)),
        (["--set", "accumulate_grad_batches=8"], (1, 8)),
        (["--set", "batch_size = 1", "accumulate_grad_batches=16"], (1, 16)),
        (["--memory", "1MB"], (1, 16)),
    ],
)
def test_a_gpu_computes_a_step_in_fewer_passes_unless_the_user_says_how_many(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    expected: tuple[int, int],
) -> None:
    used = []

    def noted(model: JointModel, loaders: Any, *_options: Any) -> None:
        config = model.config
        used.append((config["batch_size"], config["accumulate_grad_batches"]))
        assert loaders[0].batch_sampler.batch_size == config["batch_size"]
        raise Interrupted(tmp_path)

    monkeypatch.setattr("training.trainer.fit", noted)
    monkeypatch.setattr("dataset.load_clips", lambda *folders: clips(10))
    monkeypatch.setattr(train_joint, "pick_device", lambda name: torch.device("cuda"))
    folders = ["--model-dir", str(model_dir), "--output-dir", str(tmp_path)]
    train_joint.main([*folders, *options])
    assert used == [expected]
    assert ("on a GPU: batch_size=4, accumulate_grad_batches=4;" in capsys.readouterr().out) == (expected == (4, 4))
    monkeypatch.setitem(train_joint.JOINT_TRAINING_CONFIG, "batch_size", 3)  # as if this base had settings of its own
    monkeypatch.setattr(train_joint, "settings_for", lambda folder: JOINT_TRAINING_CONFIG | {"batch_size": 1})
    train_joint.main([*folders, *options])
    assert used[1] == ((1, 16) if expected == (4, 4) else expected)


def test_resuming_after_an_epoch_equals_not_having_stopped(train, tmp_path: Path, monkeypatch) -> None:
    train("--epochs", "3", output="whole")
    asked = CheckpointKeeper.on_train_epoch_end

    def stop_after_first(self: CheckpointKeeper, trainer, model) -> None:
        self.interrupted = model.epoch_number == 1
        asked(self, trainer, model)

    monkeypatch.setattr(CheckpointKeeper, "on_train_epoch_end", stop_after_first)
    assert train("--epochs", "3", output="parts") == train_joint.EXIT_INTERRUPTED
    monkeypatch.setattr(CheckpointKeeper, "on_train_epoch_end", asked)
    assert train("--resume", "auto", output="parts") == 0
    assert_same_run(tmp_path / "whole/joint_joint_last.ckpt", tmp_path / "parts/joint_joint_last.ckpt")
    merged_files = [tmp_path / output / "llm_merged_joint.pt" for output in ("whole", "parts")]
    assert merged_files[0].read_bytes() == merged_files[1].read_bytes()


@pytest.mark.parametrize("one_part_stops", [[], ["--set", "llm_loss_threshold=100"]])
def test_ctrl_c_in_an_epoch_saves_and_resumes_exactly(train, tmp_path: Path, monkeypatch, one_part_stops) -> None:
    train("--epochs", "2", *one_part_stops, output="whole")
    noticed = CheckpointKeeper.on_train_batch_end

    def press_ctrl_c(self: CheckpointKeeper, trainer, model, *step) -> None:
        if model.epoch_number == 2 and step[-1] == 1:
            signal.raise_signal(signal.SIGINT)
        noticed(self, trainer, model, *step)

    monkeypatch.setattr(CheckpointKeeper, "on_train_batch_end", press_ctrl_c)
    assert train("--epochs", "2", *one_part_stops, output="parts") == train_joint.EXIT_INTERRUPTED
    state = read_run(tmp_path / "parts/joint_joint_last.ckpt").state
    assert (state.epochs, state.batches_done) == (1, 4)
    assert bool(state.progress["llm"].stopped) == bool(one_part_stops)
    monkeypatch.setattr(CheckpointKeeper, "on_train_batch_end", noticed)
    assert train("--resume", "auto", output="parts") == 0
    assert_same_run(tmp_path / "whole/joint_joint_last.ckpt", tmp_path / "parts/joint_joint_last.ckpt")


def test_a_finished_run_is_concluded_with_the_epochs_asked_now(train, tmp_path: Path, capsys) -> None:
    train("--mode", "llm_only", "--epochs", "2")
    assert train("--mode", "llm_only", "--resume", "auto", "--epochs", "1") == 0
    assert "max_epochs (1) reached" in capsys.readouterr().out
    assert json.loads((tmp_path / "output/voice_llm_only.json").read_text())["settings"]["max_epochs"] == 1


def test_going_on_from_an_earlier_epoch_drops_the_later_ones(train, tmp_path: Path, capsys) -> None:
    train("--mode", "llm_only", "--epochs", "3")
    output = tmp_path / "output"
    first = next(output.glob("joint_llm_only_epoch0001*"))
    assert train("--mode", "llm_only", "--resume", str(first), "--epochs", "2") == 0
    assert f"will replace {output / 'joint_llm_only_last.ckpt'}" in capsys.readouterr().out
    assert {path.name[:24] for path in output.glob("*_epoch*")} == {f"joint_llm_only_epoch000{n}" for n in (1, 2)}
    assert read_run(output / "joint_llm_only_last.ckpt").state.epochs == 2


def test_going_on_in_the_folder_of_another_run_is_refused(train, tmp_path: Path) -> None:
    for output in ("one", "other"):
        train("--mode", "llm_only", "--epochs", "1", output=output)
    last, resume = (tmp_path / output / "joint_llm_only_last.ckpt" for output in ("other", "one"))
    before, options = last.read_bytes(), ["--mode", "llm_only", "--resume", str(resume), "--epochs", "2"]
    with pytest.raises(InputError, match="is of another run than .*; give another --output-dir"):
        train(*options, output="other")
    assert last.read_bytes() == before
    last.write_bytes(before[:100])  # damaged, it is no loss
    assert train(*options, output="other") == 0


def test_a_part_stops_at_its_threshold_and_the_other_goes_on(train, tmp_path: Path) -> None:
    train("--epochs", "2", "--set", "llm_loss_threshold=100")
    run = read_run(tmp_path / "output/joint_joint_last.ckpt")
    llm, flow = run.state.progress["llm"], run.state.progress["flow"]
    assert "threshold" in llm.stopped and len(llm.history) == 1
    assert not flow.stopped and len(flow.history) == 2
    assert all(torch.equal(tensor, llm.best[name]) for name, tensor in run.adapters["llm"].items())


def test_each_epoch_is_heard_as_it_will_speak(train, model_dir: Path, tmp_path: Path) -> None:
    mode = ["--mode", "llm_only", "--epochs", "2"]
    train(*mode, output="silent")
    assert train(*mode, "--listen", "Hello there.", output="heard") == 0
    assert_same_run(tmp_path / "silent/joint_llm_only_last.ckpt", tmp_path / "heard/joint_llm_only_last.ckpt")
    (logs,) = (tmp_path / "heard/joint_logs/llm_only").iterdir()
    samples = logs / "samples"
    assert [path.name for path in sorted(samples.iterdir())] == ["epoch_0001", "epoch_0002"]
    assert [event.step for event in EventAccumulator(str(logs)).Reload().Audio("01/llm")] == [1, 2]

    spoken = tmp_path / "spoken.wav"
    folders = ["--model-dir", str(model_dir), "--output-dir", str(tmp_path / "heard"), "--device", "cpu"]
    voice = ["--adapter", str(tmp_path / "heard/joint_llm_only_last.ckpt"), "--precision", "float32"]
    inference_joint.main([*folders, *voice, "--text", "Hello there.", "--output", str(spoken)])
    (expected, _), (found, _) = map(soundfile.read, (spoken, samples / "epoch_0002/llm_01.wav"))
    np.testing.assert_allclose(found, expected, atol=1e-3)  # merged weights round in another way
    with pytest.raises(InputError, match="--listen has nothing to speak"):
        train("--listen", "...")


def test_both_parts_are_heard_alone_and_together(
    train, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "lines.txt"
    texts.write_text("Hello.\n\nGo on.\n")
    train("--epochs", "1", output="silent")
    monkeypatch.setattr("training.listening.read_recordings", lambda *request: [Recording("Hello.", NOISE, 16000)])
    options = ["--epochs", "1", "--set", "recompute=True", "--listen-file", str(texts)]
    monkeypatch.setattr("tools.sample_judge.open_sample_judge", lambda recordings, texts: None)
    assert train(*options, output="heard") == 0
    assert_same_run(tmp_path / "silent/joint_joint_last.ckpt", tmp_path / "heard/joint_joint_last.ckpt")
    folder = tmp_path / "heard/joint_logs/joint/version_0/samples/epoch_0001"
    names = [f"{version}_{number}" for version in ("flow", "llm", "llm_flow") for number in ("01", "03")]
    assert sorted(path.stem for path in folder.glob("*.wav")) == [*names, "reference"]
    speeches = {name: soundfile.read(folder / f"{name}.wav")[0] for name in names}
    base = {part: load_part(ModelFolder(model_dir), part) for part in ("llm", "flow")}
    run = read_run(tmp_path / "heard/joint_joint_last.ckpt")
    voice = SampleVoice(ModelFolder(model_dir), *base.values(), run.embedding, torch.device("cpu"), run.state.seed)
    base["llm"].pace = run.pace
    tuned = {}
    for part, module in base.items():
        tuned[part] = load_part(ModelFolder(model_dir), part)
        tuned[part].load_state_dict(merged(module.state_dict(), run.adapters[part], run.scale(part)))
    tuned["llm"].pace = run.pace
    for version, llm, flow in [("llm", tuned, base), ("flow", base, tuned), ("llm_flow", tuned, tuned)]:
        expected = voice.sound(flow["flow"], voice.write(llm["llm"], 3, "Go on."))[0]
        np.testing.assert_allclose(speeches[f"{version}_03"], expected, atol=1e-3)

    def fail(*request: object) -> None:
        raise torch.OutOfMemoryError("too little")

    monkeypatch.setattr(SampleVoice, "sound", fail)
    assert train(*options, output="still") == 0
    assert "epoch 1: llm_flow 03 failed: too little" in capsys.readouterr().out


def test_a_share_of_the_clips_trains_without_a_speaker(model_dir: Path) -> None:
    model = joint_model(model_dir, "zero_embedding_ratio=0.3").train()
    torch.manual_seed(0)
    given = model.training_embeddings(2000)
    zero = (given == 0).all(dim=1)
    assert zero.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(given[~zero], model.speaker_embedding.expand(int((~zero).sum()), -1))
    assert torch.equal(model.eval().training_embeddings(50), model.speaker_embedding.expand(50, -1))


def test_the_best_epoch_is_merged_not_the_last(
    train, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, epochs = JointModel.judge, []

    def worse_each_time(self: JointModel, name: str, losses: list[float]) -> None:
        epochs.append(adapter_state(self.parts[name]))
        judge(self, name, [float(self.epoch_number)])

    monkeypatch.setattr(JointModel, "judge", worse_each_time)
    train("--mode", "llm_only", "--epochs", "2")
    output = tmp_path / "output"
    run = read_run(output / "joint_llm_only_last.ckpt")
    expected = merged(read_state_dict(model_dir / "llm.pt"), epochs[0], run.scale("llm"))
    found = read_state_dict(output / "llm_merged_llm_only.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(run.adapters["llm"][name], tensor) for name, tensor in epochs[0].items())
    assert newest_voice(output).merged_epoch == {"llm": 1}


def test_the_three_best_epochs_are_kept(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 5.0, 2.0, 4.0])
    monkeypatch.setattr(JointModel, "combined_loss", lambda self: next(losses))
    train("--mode", "llm_only", "--epochs", "5")
    kept = sorted(path.name for path in (tmp_path / "output").glob("joint_llm_only_epoch*.ckpt"))
    assert [name[-len("1.0000.ckpt") :] for name in kept] == ["3.0000.ckpt", "1.0000.ckpt", "2.0000.ckpt"]


def test_an_epoch_that_a_killed_run_could_not_copy_is_kept_by_the_next(train, tmp_path: Path) -> None:
    mode, output = ["--mode", "llm_only"], tmp_path / "output"
    train(*mode, "--epochs", "1")
    (first,) = output.glob("joint_llm_only_epoch0001_*.ckpt")
    content = first.read_bytes()
    first.unlink()
    stray = first.with_name(f".joint.{temporary_files._machine()}-{os.getpid()}-0123abcd.part.ckpt")
    stray.write_bytes(content[:1000])
    temporary_files._remove_abandoned.cache_clear()  # as in a new process
    train(*mode, "--epochs", "2", "--resume", "auto")
    assert first.read_bytes() == content and not stray.exists()
    assert len(list(output.glob("joint_llm_only_epoch*.ckpt"))) == 2


def test_epochs_differ_in_order_and_draws_and_validations_do_not(train, monkeypatch: pytest.MonkeyPatch) -> None:
    clip_losses, seen = TransformerLM.clip_losses, {True: [], False: []}

    def noted(self: TransformerLM, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        seen[torch.is_grad_enabled()].append((batch["text_token_len"].tolist(), torch.get_rng_state().tolist()))
        return clip_losses(self, batch, device)

    monkeypatch.setattr(TransformerLM, "clip_losses", noted)
    train("--mode", "llm_only", "--epochs", "2")
    lengths, draws = zip(*seen[True], strict=True)
    assert len(lengths) == 16 and sorted(lengths[:8]) == sorted(lengths[8:]) and lengths[:8] != lengths[8:]
    assert len({tuple(state) for state in draws}) == 16
    assert seen[False][:2] == seen[False][2:] and len(seen[False]) == 4


def test_held_out_clips_are_judged_at_times_spread_over_the_whole_path(train, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_loss, seen = ConditionalCFM.compute_loss, []

    def noted(self: ConditionalCFM, x1: Tensor, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            assert not named["drops_conditions"]
            seen.extend(zip(x1.tolist(), named["times"].tolist(), strict=True))
        return compute_loss(self, x1, *inputs, **named)

    monkeypatch.setattr(ConditionalCFM, "compute_loss", noted)
    train("--mode", "flow_only", "--epochs", "2")
    assert len(seen) == 2 * 2 * FLOW_DRAWS and seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    for clip in (0, 1):
        times = [time for _, time in seen[clip * FLOW_DRAWS : (clip + 1) * FLOW_DRAWS]]
        assert sorted(int(time * FLOW_DRAWS) for time in times) == list(range(FLOW_DRAWS))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_flow_times_lie_evenly_over_the_clips_of_a_step(model_dir: Path, size: int, monkeypatch: Any) -> None:
    model = joint_model(model_dir, f"batch_size={size}", f"accumulate_grad_batches={4 // size}")
    steps = []
    for epoch in range(30):
        monkeypatch.setattr(JointModel, "current_epoch", epoch)
        steps += [
            torch.cat([model.spread_times(size, 4 // size * step + i) for i in range(4 // size)]) for step in (0, 1)
        ]
    offsets = torch.stack(steps) * 4 % 1
    assert all(sorted((4 * times).int().tolist()) == [0, 1, 2, 3] for times in steps)
    torch.testing.assert_close(offsets, offsets[:, :1].expand(-1, 4), atol=1e-4, rtol=0)
    assert len({round(offset.item(), 4) for offset in offsets[:, 0]}) == len(steps)
    assert 0.4 < offsets.mean() < 0.6


def test_steps_warm_up_and_are_clipped(train, monkeypatch: pytest.MonkeyPatch) -> None:
    step, taken = torch.optim.AdamW.step, []

    def record(self: torch.optim.AdamW, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            closure()
        parameters = self.param_groups[0]["params"]
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()
        taken.append((self.param_groups[0]["lr"], norm))
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train("--mode", "llm_only", "--epochs", "4", "--set", "warmup_ratio=0.5", "gradient_clip_val=0.01")
    rates, norms = zip(*taken, strict=True)
    assert rates == pytest.approx([0.01 * learning_rate_factor(n, 4, 8) for n in range(8)])
    assert norms == pytest.approx([0.01] * 8, rel=1e-3)


def test_the_newest_voice_and_run_are_taken(tmp_path: Path) -> None:
    for age, mode in enumerate(("joint", "llm_only", "flow_only")):
        for file in (tmp_path / f"voice_{mode}.json", tmp_path / f"joint_{mode}_last.ckpt"):
            nothing = dict.fromkeys(("files", "base", "merged_epoch"), {})
            file.write_text(json.dumps({"speaker": mode, "run": "1", **nothing}))
            os.utime(file, (1e9 - age, 1e9 - age))
    assert newest_voice(tmp_path).speaker == "joint"
    assert newest_run(tmp_path).name == "joint_joint_last.ckpt"


def test_merging_part_by_part_names_both_and_keeps_other_speakers(train, model_dir: Path, tmp_path: Path) -> None:
    train("--epochs", "1")
    output = tmp_path / "output"
    stored = read_spk2info(output / "spk2info.pt")
    others = {name: {"embedding": torch.ones(1, 192)} for name in ("ann", "bob")}  # ann was another's name before
    torch.save(others, output / "spk2info.pt")
    (output / "voice_joint.json").unlink()
    own = tmp_path / "model"
    own.mkdir()
    for file in model_dir.iterdir():
        (own / file.name).symlink_to(file)
    torch.save({"base": others["bob"]}, own / "spk2info.pt")
    run = read_run(output / "joint_joint_last.ckpt")
    for part in ("llm", "flow"):
        merge_run(run, ModelFolder(own), output, {part: merged_path(output, part, "joint")}, use_best=True)
    assert newest_voice(output).files.keys() == {"llm", "flow"}
    speakers = read_spk2info(output / "spk2info.pt")
    assert speakers.keys() == {"ann", "bob", "base"}
    assert torch.equal(speakers["ann"]["embedding"], stored["ann"]["embedding"])
    assert torch.equal(speakers["bob"]["embedding"], others["bob"]["embedding"])


def test_a_merge_that_fails_halfway_leaves_the_earlier_voice(train, model_dir: Path, tmp_path: Path) -> None:
    train("--epochs", "1")
    output = tmp_path / "output"
    before = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    run = read_run(output / "joint_joint_last.ckpt")
    run.adapters["llm"] = {name: tensor + 1 for name, tensor in run.adapters["llm"].items()}
    run.adapters["flow"] = {"no_layer.lora_A": torch.zeros(1)}
    targets = {part: merged_path(output, part, "joint") for part in ("llm", "flow")}
    with pytest.raises(InputError, match="it has no layer no_layer"):
        merge_run(run, ModelFolder(model_dir), output, targets, use_best=False)
    assert {path: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_a_merge_by_half_lies_halfway_between_base_and_voice(train, model_dir: Path, tmp_path: Path) -> None:
    train("--mode", "flow_only", "--epochs", "1", "--lr", "0.01")
    output, merge = tmp_path / "output", ["--model-dir", str(model_dir), "--output-dir", str(tmp_path / "output")]
    base, whole = (torch.load(path) for path in (model_dir / "flow.pt", output / "flow_merged_flow_only.pt"))
    assert json.loads((output / "voice_flow_only.json").read_text())["merged_scale"] == {"flow": 1.0}
    merge_joint_weights.main([*merge, "--scale", "0.5"])
    half = torch.load(output / "flow_merged_flow_only.pt")
    assert any(not torch.equal(base[name], whole[name]) for name in base)
    for name, weight in half.items():
        torch.testing.assert_close(weight, (base[name] + whole[name]) / 2)
    assert json.loads((output / "voice_flow_only.json").read_text())["merged_scale"] == {"flow": 0.5}
    for scale in ("0", "-1", "2.1", "nan"):
        with pytest.raises(InputError, match="--scale .*: give a number above 0 and at most 2"):
            merge_joint_weights.main([*merge, f"--scale={scale}"])


def test_patience_ends_training(train, tmp_path: Path) -> None:
    train("--mode", "llm_only", "--epochs", "30", "--set", "early_stopping_patience=1", "--lr", "1.0")
    progress = read_run(tmp_path / "output/joint_llm_only_last.ckpt").state.progress["llm"]
    assert "no better loss" in progress.stopped
    losses = [epoch.val for epoch in progress.history]
    assert progress.best_epoch == len(losses) - 1  # after which one epoch is no better, or not beyond chance
    assert progress.best_loss == losses[-2] <= losses[-1] + progress.history[-1].val_error
    kept = sorted(path.name for path in (tmp_path / "output").glob("joint_llm_only_epoch*.ckpt"))
    assert 1 <= len(kept) <= 3


def test_training_lowers_the_loss(train, tmp_path: Path) -> None:
    train("--mode", "flow_only", "--epochs", "6", "--batch-size", "2")
    history = read_run(tmp_path / "output/joint_flow_only_last.ckpt").state.progress["flow"].history
    assert history[-1].train < history[0].train


def test_each_clip_of_a_step_counts_the_same(train, tmp_path: Path) -> None:
    """Seven clips: a step of four, and one of two and one more."""
    exact = ["--set", "precision=32-true", "llm_lora.lora_dropout=0", "zero_embedding_ratio=0"]
    for size in (1, 2):
        options = [*exact, f"batch_size={size}", f"accumulate_grad_batches={4 // size}"]
        train("--mode", "llm_only", "--epochs", "1", *options, output=str(size), count=9)
    one, two = (read_run(tmp_path / size / "joint_llm_only_last.ckpt").adapters["llm"] for size in "12")
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


def test_init_starts_from_the_shared_part(train, tmp_path: Path) -> None:
    train("--epochs", "1", output="joint")
    first = tmp_path / "joint/joint_joint_last.ckpt"
    options = ["--mode", "flow_only", "--init", str(first), "--epochs", "1", "--lr", "1e-12"]
    for output, alpha, change in (("staged", 32, 1.0), ("stronger", 64, 0.5)):  # another alpha, the same voice
        train(*options, "--set", f"flow_lora.lora_alpha={alpha}", output=output)
        staged = read_run(tmp_path / output / "joint_flow_only_last.ckpt").adapters["flow"]
        for name, tensor in read_run(first).adapters["flow"].items():
            wanted = tensor * change if name.endswith("lora_B") else tensor
            torch.testing.assert_close(staged[name], wanted, atol=1e-6, rtol=0)
    changed = {
        **torch.load(first),
        "state_dict": {
            f"parts.{part}.{name}": tensor + 1
            for part in ("llm", "flow")
            for name, tensor in read_run(first).adapters[part].items()
        },
    }  # as if more epochs had followed the best one
    torch.save(changed, first)
    later = first.with_name("joint_joint_epoch0002_loss9.0000.ckpt")
    later.write_bytes(first.read_bytes())
    for start, wanted in ((first, read_run(first).best("flow")), (later, read_run(first).adapters["flow"])):
        train("--mode", "flow_only", "--init", str(start), "--epochs", "1", "--lr", "1e-12", output=start.stem)
        found = read_run(tmp_path / start.stem / "joint_flow_only_last.ckpt").adapters["flow"]
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="shares no part"):
        train("--mode", "llm_only", "--init", str(tmp_path / "staged/joint_flow_only_last.ckpt"))


def test_resume_refuses_another_mode_base_or_data(train, tmp_path: Path) -> None:
    train("--mode", "llm_only", "--epochs", "1")
    checkpoint = str(tmp_path / "output/joint_llm_only_last.ckpt")
    with pytest.raises(InputError, match="llm_only"):
        train("--mode", "flow_only", "--resume", checkpoint)
    with pytest.raises(InputError, match="data has changed"):
        train("--mode", "llm_only", "--resume", checkpoint, count=9)
    other = tmp_path / "other"
    make_random_model(other, seed=4, size="small")
    with pytest.raises(InputError, match="another base"):
        train("--mode", "llm_only", "--resume", checkpoint, "--model-dir", str(other))
    with pytest.raises(InputError, match="weights"):
        train("--resume", str(tmp_path / "output/llm_merged_llm_only.pt"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_gives_nearly_the_same_losses(model_dir: Path, dtype: torch.dtype) -> None:
    """What a GPU computes in, tried with the CPU's autocast: half the memory for the base, adapters in float32."""
    losses, gradients = {}, {}
    for base in (torch.float32, dtype):
        torch.manual_seed(0)
        parts = {part: load_part(ModelFolder(model_dir), part) for part in ("llm", "flow")}
        model = JointModel(parts, JOINT_TRAINING_CONFIG, 0, speaker_embedding(clips(2)), {})
        if base != torch.float32:
            model.keep_base_in(base)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype, enabled=base != torch.float32):
            losses[base] = model.train().losses(collate(clips(2)), ["llm", "flow"])
        (losses[base]["llm_loss"] + losses[base]["flow_loss"]).backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(parameter.grad.dtype == torch.float32 for parameter in trained)
        gradients[base] = torch.stack([parameter.grad.norm() for parameter in trained])
    for name in ("llm_loss", "flow_loss"):
        torch.testing.assert_close(losses[dtype][name], losses[torch.float32][name], rtol=5e-3, atol=0)
    torch.testing.assert_close(gradients[dtype].sum(), gradients[torch.float32].sum(), rtol=0.05, atol=0)


def test_more_epochs_go_on_at_their_place_in_the_longer_schedule(train, tmp_path: Path) -> None:
    """The schedule of one step ends at a rate of zero; the second step of a longer one trains."""
    one_step = ["--set", "accumulate_grad_batches=8"]
    train("--epochs", "1", *one_step)
    before = read_run(tmp_path / "output/joint_joint_last.ckpt").adapters
    assert train("--epochs", "2", "--resume", "auto", *one_step) == 0
    after = read_run(tmp_path / "output/joint_joint_last.ckpt").adapters
    assert not torch.equal(next(iter(before["llm"].values())), next(iter(after["llm"].values())))


def test_clips_computed_together_weigh_as_each_alone(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of one batch are the means of those of its clips, of equal lengths or not, in both parts."""
    without_dropout = {name: JOINT_TRAINING_CONFIG[name] | {"lora_dropout": 0.0} for name in ("llm_lora", "flow_lora")}
    config = JOINT_TRAINING_CONFIG | without_dropout | {"zero_embedding_ratio": 0.0}
    parts = {part: load_part(ModelFolder(model_dir), part) for part in ("llm", "flow")}
    model = JointModel(parts, config, 0, torch.ones(192), {}).train()

    def draw(decoder: ConditionalCFM, x1: Tensor) -> TrainingDraw:
        """Numbers that follow from the mel alone."""
        t = x1.mean(dim=(1, 2), keepdim=True).sigmoid()
        return TrainingDraw(t, x1.flip(2), t.flatten() < 2)

    monkeypatch.setattr(ConditionalCFM, "draw_training", draw)
    several = [*clips(3), *(replace(clip, mel=clip.mel.flip(0)) for clip in clips(2))]

    def gradients(*batches: list[Clip]) -> list[Tensor]:
        model.zero_grad()
        for batch in batches:
            losses = model.losses(collate(batch), ["llm", "flow"])
            ((losses["llm_loss"] + losses["flow_loss"]) / len(batches)).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    together, alone = gradients(several), gradients(*([clip] for clip in several))
    assert any(gradient.abs().max() > 1e-4 for gradient in alone)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_staged_training_names_the_files_of_both_runs(train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train("--mode", "llm_only", "--epochs", "1")
    train("--mode", "flow_only", "--epochs", "1")
    told = capsys.readouterr().out.splitlines()[-1]
    assert "llm_merged_llm_only.pt" in told and "flow_merged_flow_only.pt" in told
    sidecar = tmp_path / "output/voice_llm_only.json"
    of_another_base = {"base": dict.fromkeys(("llm", "flow"), "another's")}
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | of_another_base))
    train("--mode", "flow_only", "--epochs", "1")
    assert "llm_merged_llm_only.pt" not in capsys.readouterr().out.splitlines()[-1]


def test_few_clips_are_all_trained_on(train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train("--epochs", "1", count=7)
    assert "7 clips to train on, 0 held out" in capsys.readouterr().out
    assert read_run(tmp_path / "output/joint_joint_last.ckpt").state.progress["llm"].history[0].val is None


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(train, tmp_path: Path) -> None:
    train("--epochs", "1")
    before = (tmp_path / "output/joint_joint_last.ckpt").read_bytes()
    spoiled = clips(10)
    for clip in spoiled:
        clip.mel[:] = np.nan
    with pytest.raises(InputError, match="flow loss became nan"):
        train("--epochs", "1", made=spoiled)
    assert (tmp_path / "output/joint_joint_last.ckpt").read_bytes() == before


def test_settings_are_checked_together() -> None:
    with pytest.raises(InputError) as caught:
        with_changes(JOINT_TRAINING_CONFIG, ["learning_rat=1", "max_epochs=0", "llm_lora.lora_r=x", "precision=8-bit"])
    for name in ("learning_rat ", "max_epochs", "llm_lora.lora_r", "precision"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "device", "has_bfloat16", "found"),
    [
        ("16-mixed", "cuda", True, "16-mixed"),
        ("16-mixed", "cpu", True, "bf16-mixed"),
        ("16-mixed", "cpu", False, "32-true"),
        ("32-true", "cpu", True, "32-true"),
    ],
)
def test_a_cpu_takes_the_half_precision_that_it_has(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, has_bfloat16: bool, found: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    assert compute_precision({"precision": wanted}, device) == found


def test_an_adapted_layer_casts_its_input_once() -> None:
    base = nn.Linear(6, 5)
    layer, x = LoRALinear(base, rank=2, alpha=4, dropout=0.5), torch.randn(3, 6, requires_grad=True)
    nn.init.normal_(layer.lora_B)
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            casts.append(function is torch.ops.aten._to_copy.default and args[0].shape == x.shape)
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16), Casts():
        y = layer(x)
    assert y.dtype == torch.bfloat16 and sum(casts) == 1
    y.float().sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


def overflow(scaler: LossScaler, optimizer: torch.optim.Optimizer, value: float) -> None:
    """One step whose gradient is `value`."""
    parameter = optimizer.param_groups[0]["params"][0]
    optimizer.zero_grad()
    scaler.scale(parameter.sum() * value).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def test_steps_that_overflow_are_counted_and_many_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    scaler, parameter = LossScaler("cpu"), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    overflow(scaler, optimizer, 1.0)
    assert scaler.get_scale() == FIRST_LOSS_SCALE and scaler.skipped == 0 and parameter[0] == -1
    for count in range(1, 6):
        overflow(scaler, optimizer, float("inf"))
        said = capsys.readouterr().out
        assert scaler.skipped == count and ("4 optimiser steps were left out" in said) == (count == 4), count
        assert said.count("precision=bf16-mixed or 32-true") == (count == 4)
    assert parameter[0] == -1 and scaler.get_scale() == FIRST_LOSS_SCALE / 2**5


def test_training_in_float16_goes_on_after_overflows(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, tried on the CPU."""
    monkeypatch.setattr("training.precision.compute_precision", lambda config, device: "16-mixed")
    monkeypatch.setattr("training.precision.FIRST_LOSS_SCALE", 2.0**28)
    assert train("--mode", "llm_only", "--epochs", "6") == 0
    checkpoint = tmp_path / "output/joint_llm_only_last.ckpt"
    assert all(tensor.dtype == torch.float32 for tensor in read_run(checkpoint).adapters["llm"].values())
    scale = torch.load(checkpoint)["MixedPrecision"]["scale"]
    assert scale <= 2**24 and "4 optimiser steps were left out" in capsys.readouterr().out
    assert train("--mode", "llm_only", "--epochs", "7", "--resume", "auto") == 0
    assert torch.load(checkpoint)["MixedPrecision"]["scale"] <= scale


def test_half_precision_base_trains_on_any_device(train, tmp_path: Path) -> None:
    train("--epochs", "1", "--set", "precision=bf16-mixed")
    run = read_run(tmp_path / "output/joint_joint_last.ckpt")
    assert all(tensor.dtype == torch.float32 for part in run.adapters.values() for tensor in part.values())
