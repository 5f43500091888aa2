"""Training on a GPU: the numbers of the CPU, the memory that was estimated, and runs that go on where they stopped."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_clips import FAST, clips
from models import ORIGIN
from torch import Tensor

import train_joint
from config import JOINT_TRAINING_CONFIG, PROJECT_DIR, with_changes
from cosyvoice.flow.flow_matching import ConditionalCFM, TrainingDraw
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_part
from dataset import collate
from llm_flow_model import JointModel
from lora import adapters
from tools.random_model import make_random_model
from training.checkpoints import CheckpointKeeper
from training.memory import PASSING_SHARE, kept_bytes
from voices.run import Run, read_run

CERTAIN = ["llm_lora.lora_dropout=0.0", "flow_lora.lora_dropout=0.0", "zero_embedding_ratio=0.0"]
HALF = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_random_model(folder, seed=3, size="small")
    return folder


@pytest.fixture
def draws_from_the_mel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's generator draws other numbers than the CPU's."""

    def draw(decoder: ConditionalCFM, x1: Tensor) -> TrainingDraw:
        t = x1.mean(dim=(1, 2), keepdim=True).sigmoid()
        return TrainingDraw(t, x1.flip(2), t.flatten() < 2)

    monkeypatch.setattr(ConditionalCFM, "draw_training", draw)


def joint_model(model_dir: Path, device: torch.device, *changes: str) -> JointModel:
    torch.manual_seed(0)
    config = with_changes(JOINT_TRAINING_CONFIG, [*FAST, *CERTAIN, *changes])
    parts = {part: load_part(ModelFolder(model_dir), part) for part in ("llm", "flow")}
    model = JointModel(parts, config, 0, torch.ones(192), ORIGIN)
    for layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.to(device).train()


def learn(model: JointModel, half: torch.dtype | None = None) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of two clips, on the CPU."""
    torch.manual_seed(1)
    batch = {name: value.to(model.device) for name, value in collate(clips(10)[-2:]).items()}
    with torch.autocast(model.device.type, dtype=half, enabled=half is not None):
        losses = model.losses(batch, model.active())
    (losses["llm_loss"] + losses["flow_loss"]).backward()
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: value.item() for name, value in losses.items()}, gradients


def test_losses_and_gradients_are_those_of_the_cpu(
    model_dir: Path, gpu: torch.device, draws_from_the_mel: None
) -> None:
    (expected, gradients), (losses, found) = (learn(joint_model(model_dir, torch.device(d))) for d in ("cpu", gpu))
    assert losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(found, gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", HALF)
def test_half_precision_is_near(model_dir: Path, gpu: torch.device, precision: str, draws_from_the_mel: None) -> None:
    if precision == "bf16-mixed" and not torch.cuda.is_bf16_supported():
        pytest.skip("this card has no bfloat16")
    expected, gradients = learn(joint_model(model_dir, gpu))
    model = joint_model(model_dir, gpu)
    model.keep_base_in(HALF[precision])
    losses, found = learn(model, HALF[precision])
    for name in ("llm_loss", "flow_loss"):
        assert losses[name] == pytest.approx(expected[name], rel=0.01)
    norms = [torch.stack([gradient.norm() for gradient in each.values()]).norm() for each in (gradients, found)]
    assert norms[1] == pytest.approx(norms[0].item(), rel=0.05)


def test_recomputed_blocks_give_the_same_gradients(model_dir: Path, gpu: torch.device) -> None:
    (_, expected), (_, found) = (learn(joint_model(model_dir, gpu, f"recompute={it}")) for it in (False, True))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("precision", "recompute"), [("16-mixed", False), ("16-mixed", True), ("32-true", False)])
def test_a_pass_takes_no_more_memory_than_was_estimated(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, precision: str, recompute: bool
) -> None:
    """At 300M sizes, four clips of 2.9 s; and the estimate is not twice too careful."""
    monkeypatch.setattr(sys, "path", [str(PROJECT_DIR / "bench"), *sys.path])
    from measuring import CONFIGS, build
    from train_steps import random_clip

    torch.manual_seed(0)
    config = with_changes(JOINT_TRAINING_CONFIG, [f"precision={precision}", f"recompute={recompute}"])
    parts = {part: build(CONFIGS["300m"], part) for part in ("llm", "flow")}
    model = JointModel(parts, config, 0, torch.ones(192), ORIGIN).train()
    batch, half = collate([random_clip(1) for _ in range(4)]), HALF.get(precision)
    estimate = PASSING_SHARE * kept_bytes(model, batch, half is not None)
    if half:
        model.keep_base_in(half)
    model.to(gpu)
    batch = {name: value.to(gpu) for name, value in batch.items()}
    for _ in range(2):  # the first makes the gradients' memory, which counts with the weights
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=half, enabled=half is not None):
            losses = model.losses(batch, model.active())
        sum(losses[f"{part}_loss"] for part in model.active()).backward()
    taken = torch.cuda.max_memory_allocated() - before
    print(f"{precision}, recompute={recompute}: {taken / 1e9:.2f} GB, estimated {estimate / 1e9:.2f} GB")
    assert 0.5 * estimate < taken <= estimate


class Trainer:
    """Runs train_joint.py on made-up clips, on the GPU."""

    def __init__(self, model_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dataset.load_clips", lambda *folders: clips(10))
        self.folder, self.options = folder, ["--model-dir", str(model_dir), "--device", "cuda", "--set", *FAST]

    def run(self, output: str, *options: str) -> int:
        return train_joint.main(["--output-dir", str(self.folder / output), *self.options, *options])

    def read(self, output: str) -> Run:
        return read_run(self.folder / output / "joint_joint_last.ckpt")


@pytest.fixture
def trainer(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    return Trainer(model_dir, tmp_path, monkeypatch)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_run_is_like_one_that_never_stopped(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Up to rounding: some sums of a GPU are formed in another order each time."""
    settings = [f"precision={precision}", "--epochs", "3"]
    assert trainer.run("whole", *settings) == 0
    asked = CheckpointKeeper.on_train_epoch_end

    def stop_after_first(self: CheckpointKeeper, *trained: Any) -> None:
        self.interrupted = trained[1].epoch_number == 1
        asked(self, *trained)

    with monkeypatch.context() as interrupting:
        interrupting.setattr(CheckpointKeeper, "on_train_epoch_end", stop_after_first)
        assert trainer.run("parts", *settings) == train_joint.EXIT_INTERRUPTED
    assert trainer.run("parts", *settings, "--resume", "auto") == 0
    whole, parts = trainer.read("whole"), trainer.read("parts")
    for part in whole.parts:
        torch.testing.assert_close(parts.adapters[part], whole.adapters[part], atol=2e-3, rtol=1e-2)
        histories = [[epoch.train for epoch in run.state.progress[part].history] for run in (parts, whole)]
        assert histories[0] == pytest.approx(histories[1], rel=1e-3)


def test_training_on_a_gpu_lowers_the_losses(trainer: Trainer) -> None:
    assert trainer.run("output", "--epochs", "6") == 0
    for part, progress in trainer.read("output").state.progress.items():
        assert progress.history[-1].train < progress.history[0].train, part
