"""Stages 5 to 7 of the recipe on a corpus of a few seconds: training, resuming, two processes, averaging, export."""

import math
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import yaml
from models import tiny, tiny_model_dir
from recipe import CLIPS_A_FILE, FILES, TrainingRuns, train_as, write_config, write_corpus
from torch import Tensor

from cosyvoice.bin import average_model, export_jit, export_onnx, train
from cosyvoice.bin.recipe_checkpoints import LAST, STATE_KEY, CheckpointWriter, RecipeCheckpoints
from cosyvoice.bin.recipe_models import SpeechModel
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.model_folder.weights import load_strict, read_state_dict
from cosyvoice.runtime.errors import InputError

PARTS = ("llm", "flow", "hifigan")


class Recipe(TrainingRuns):
    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, write_corpus(folder)
        self.config = write_config(folder)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def finished(recipe: Recipe) -> Callable[[str], Path]:
    """The folder of an uninterrupted run of two epochs."""

    def run(part: str) -> Path:
        folder = recipe.folder / part
        return folder if folder.exists() else recipe.train(part, part)

    return run


def said_of(folder: Path, epoch: int) -> dict[str, Any]:
    return yaml.safe_load((folder / f"epoch_{epoch}_whole.yaml").read_text())


def losses(folder: Path, epoch: int) -> dict[str, float]:
    return said_of(folder, epoch)["loss_dict"]


def assert_same_weights(one: Path, other: Path, atol: float = 0.0) -> None:
    first, second = read_state_dict(one), read_state_dict(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("part", ["llm", "flow"])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_half_precision_where_the_processor_has_it(
    part: str, has_bfloat16: bool, recipe: Recipe, finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    half, single = recipe.train(part, f"{part}_{has_bfloat16}", "--use_amp"), finished(part)
    assert losses(half, 1)["loss"] == pytest.approx(losses(single, 1)["loss"], rel=0.02)
    weights = [read_state_dict(folder / "epoch_1_whole.pt") for folder in (half, single)]
    same = [torch.equal(weights[0][name], weights[1][name]) for name in weights[0]]
    assert all(same) != has_bfloat16
    assert {tensor.dtype for tensor in weights[0].values()} == {tensor.dtype for tensor in weights[1].values()}


@pytest.mark.parametrize("part", PARTS)
def test_training_lowers_the_loss_and_leaves_exchangeable_files(
    part: str, recipe: Recipe, finished: Callable[[str], Path]
) -> None:
    folder = finished(part)
    watched = "loss_mel" if part == "hifigan" else "loss"
    assert losses(folder, 1)[watched] < losses(folder, 0)[watched]
    assert ("acc" in losses(folder, 1)) == (part == "llm")
    module = load_model_yaml(recipe.config, parts=(part,))[part]
    for name in ("init.pt", "epoch_0_whole.pt", "epoch_1_whole.pt"):
        module.load_state_dict(read_state_dict(folder / name), strict=True)
    raw = torch.load(folder / "epoch_1_whole.pt", weights_only=True)
    clips, accumulated = FILES * CLIPS_A_FILE, 1 if part == "hifigan" else 2
    batches = 2 if part == "hifigan" else clips  # of five crops of 12 frames, or of one clip
    assert (raw["epoch"], raw["step"]) == (1, 2 * batches // accumulated)
    assert list((recipe.folder / "tensorboard" / part).glob("events.*"))


@pytest.mark.parametrize("part", PARTS)
def test_a_resumed_run_equals_an_uninterrupted_one(
    part: str, recipe: Recipe, finished: Callable[[str], Path]
) -> None:
    run = f"{part}_resumed"
    recipe.train(part, run, "--max_epoch", "1")
    folder = recipe.train(part, run, "--resume", "auto")
    assert_same_weights(finished(part) / "epoch_1_whole.pt", folder / "epoch_1_whole.pt")
    assert losses(folder, 1) == losses(finished(part), 1)


def test_a_run_stopped_within_an_epoch_resumes_exactly(
    recipe: Recipe, finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(recipe.folder, "often.yaml", save_per_step=3)
    save_last = RecipeCheckpoints.save_last

    def save_and_stop(self: RecipeCheckpoints, trainer: object, epochs: int, batches: int) -> None:
        save_last(self, trainer, epochs, batches)
        if batches:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecipeCheckpoints, "save_last", save_and_stop)
        recipe.train("llm", "stopped", config=config)
    assert sorted(path.name for path in (recipe.folder / "stopped").glob("epoch*")) == ["epoch_0_step_3.pt"]
    with pytest.raises(InputError, match="num_workers 0, not 1"):
        recipe.train("llm", "stopped", "--resume", "auto", "--num_workers", "1", config=config)
    larger = write_config(recipe.folder, "larger.yaml", save_per_step=3, max_frames_in_batch=250)
    with pytest.raises(InputError, match="run with data_pipeline .*; give the same to resume"):
        recipe.train("llm", "stopped", "--resume", "auto", config=larger)
    folder = recipe.train("llm", "stopped", "--resume", "auto", config=config)
    assert_same_weights(finished("llm") / "epoch_1_whole.pt", folder / "epoch_1_whole.pt")
    for epoch in range(2):
        assert said_of(folder, epoch)["train_loss"] == said_of(finished("llm"), epoch)["train_loss"]
    recipe.train("llm", "stopped", "--resume", "auto", "--max_epoch", "3", config=larger)
    assert said_of(folder, 2)["step"] < 1.5 * said_of(folder, 1)["step"]  # fewer batches


def test_a_run_stopped_in_the_last_validation_of_an_epoch_resumes_exactly(
    recipe: Recipe, finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(recipe.folder, "each_step.yaml", save_per_step=1)  # also the last one

    def stop(self: SpeechModel) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechModel, "on_validation_epoch_start", stop)
        recipe.train("llm", "unjudged", config=config)
    folder = recipe.train("llm", "unjudged", "--resume", "auto", config=config)
    for epoch in range(2):
        assert_same_weights(finished("llm") / f"epoch_{epoch}_whole.pt", folder / f"epoch_{epoch}_whole.pt")
        assert losses(folder, epoch) == losses(finished("llm"), epoch)


def test_the_length_of_the_schedule_may_be_given(recipe: Recipe) -> None:
    cosine = write_config(recipe.folder, "cosine.yaml", scheduler="cosine", warmup_steps="1\n        total_steps: 999")
    steps = 2 * FILES * CLIPS_A_FILE // 2  # of two epochs
    folder = recipe.train("llm", "short", "--total_steps", str(steps), config=cosine)
    last = said_of(folder, 1)
    assert (last["step"], last["scheduler_conf"]["total_steps"]) == (steps, steps)
    assert last["lr"] < 0.1 * said_of(folder, 0)["lr"] < 0.1 * 0.002
    with pytest.raises(InputError, match="'total_steps': 8}, not .*'total_steps': 999}"):
        recipe.train("llm", "short", "--resume", "auto", config=cosine)
    with pytest.raises(InputError, match="--total_steps is for scheduler: cosine, not warmuplr"):
        recipe.train("llm", "endless", "--total_steps", "8")
    with pytest.raises(InputError, match="scheduler_conf of train_conf is None"):
        train.with_total_steps({"scheduler": "cosine", "scheduler_conf": None}, 8)


def test_a_run_is_resumed_only_with_its_settings_and_its_data(
    recipe: Recipe, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    finished("llm")
    for changes, message in [
        ({"lr": 0.5}, "optim_conf {'lr': 0.002}, not {'lr': 0.5}"),
        ({"grad_clip": 1}, "grad_clip 5, not 1"),
        ({"text_encoder_input_size": 8}, r"last.ckpt does not fit.*shape"),
    ]:
        changed = write_config(recipe.folder, "changed.yaml", **changes)
        with pytest.raises(InputError, match=message):
            recipe.train("llm", "llm", "--resume", "auto", config=changed)
    with pytest.raises(InputError, match="train_data .*; give the same to resume, or train anew"):
        recipe.train("llm", "llm", "--resume", "auto", "--train_data", str(write_corpus(tmp_path, seed=8)))
    unlogged = write_config(recipe.folder, "unlogged.yaml", log_interval=50, save_per_step=2)
    recipe.train("llm", "llm", "--resume", "auto", config=unlogged)


def test_a_run_without_its_last_checkpoint_is_not_begun_anew(recipe: Recipe) -> None:
    folder = recipe.train("llm", "beheaded", "--max_epoch", "1")
    (folder / "last.ckpt").unlink()
    with pytest.raises(InputError, match="epoch_0_whole.pt is of an earlier run"):
        recipe.train("llm", "beheaded", "--resume", "auto")


def test_a_run_of_another_version_is_not_resumed(recipe: Recipe) -> None:
    last = recipe.train("llm", "earlier", "--max_epoch", "1") / LAST
    content = torch.load(last, weights_only=True)
    del content[STATE_KEY]["loss_sum"]
    torch.save(content, last)
    with pytest.raises(InputError, match=f"{last} is no state of a training run of this version"):
        recipe.train("llm", "earlier", "--resume", "auto")


def test_a_damaged_file_of_data_is_named(recipe: Recipe, tmp_path: Path) -> None:
    """Also where the reason that Arrow gives has several lines."""
    data = write_corpus(tmp_path)
    file = Path(data.read_text().splitlines()[0])
    content = file.read_bytes()
    file.write_bytes(content[:4] + bytes(20) + content[24:])
    with pytest.raises(InputError, match=f"{file} is not a readable parquet file: .*; make it again"):
        recipe.train("llm", "damaged", "--train_data", str(data))


def test_a_checkpoint_that_finds_no_room_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match="last.ckpt: File too large; make room"):
            CheckpointWriter().save_checkpoint({"state_dict": torch.zeros(1000)}, tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_checkpoints_need_no_room_in_the_systems_temporary_folder(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(recipe.folder / "nowhere"))
    assert (recipe.train("llm", "no_tmp", "--max_epoch", "1") / "last.ckpt").is_file()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def two_processes(recipe: Recipe) -> Path:
    """The folder of a run of two processes on one machine."""
    config = write_config(recipe.folder, "unaccumulated.yaml", accum_grad=1)
    argv = recipe.options("llm", "two_processes", config=config)
    slow = ["pytorch_lightning", "whisper.tokenizer", "torchaudio.transforms", "hydra.utils", "pyarrow.parquet"]
    multiprocessing.set_forkserver_preload(slow)  # imported once for both, and for their workers
    torch.multiprocessing.start_processes(train_as, args=(2, free_port(), argv), nprocs=2, start_method="forkserver")
    return recipe.folder / "two_processes"


def test_two_processes_equal_one_with_twice_the_accumulation(recipe: Recipe, two_processes: Path) -> None:
    """The one process has two workers, whose batches it takes in turn: those of the two processes."""
    one = recipe.train("llm", "one_process", "--num_workers", "2")
    for epoch in range(2):
        assert losses(two_processes, epoch) == pytest.approx(losses(one, epoch), rel=1e-5)
    assert_same_weights(one / "epoch_1_whole.pt", two_processes / "epoch_1_whole.pt", atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines_equal_one_with_two_processes(recipe: Recipe, two_processes: Path, rendezvous: str) -> None:
    """Each machine is a torchrun of its own, with one process."""
    config = recipe.folder / "unaccumulated.yaml"
    argv = [str(Path(train.__file__)), *recipe.options("llm", rendezvous, config=config)]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    port = free_port()
    meet = {
        "static": ["--node_rank={}", "--master_addr=127.0.0.1", f"--master_port={port}"],
        "c10d": ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"],
    }
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    commands = [[*start, *(option.format(rank) for option in meet[rendezvous]), *argv] for rank in range(2)]
    machines = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        said = [machine.communicate(timeout=300)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    for epoch in range(2):
        assert losses(recipe.folder / rendezvous, epoch) == losses(two_processes, epoch)
    assert_same_weights(recipe.folder / rendezvous / "epoch_1_whole.pt", two_processes / "epoch_1_whole.pt")


def test_a_checkpoint_is_where_training_starts(recipe: Recipe, finished: Callable[[str], Path]) -> None:
    weights = finished("flow") / "epoch_1_whole.pt"
    folder = recipe.train("flow", "continued", "--checkpoint", str(weights), "--max_epoch", "1")
    assert_same_weights(weights, folder / "init.pt")


@pytest.mark.parametrize("given", ["generator.", ("generator.", "discriminator.")])
def test_a_vocoder_starts_from_what_is_given(
    recipe: Recipe, finished: Callable[[str], Path], tmp_path: Path, given: str | tuple[str, ...]
) -> None:
    """A generator may come alone, as hift.pt does: its discriminators then keep their random weights."""
    trained = read_state_dict(finished("hifigan") / "epoch_1_whole.pt")
    part = load_model_yaml(recipe.config, parts=("hifigan",))["hifigan"]
    expected = {name: value.clone() for name, value in part.state_dict().items()}
    assert not all(torch.equal(value, trained[name]) for name, value in expected.items())
    expected |= {name: value for name, value in trained.items() if name.startswith(given)}
    start = {name.removeprefix("generator."): value for name, value in trained.items() if name.startswith(given)}
    torch.save(start, tmp_path / "start.pt")
    train.load_weights(part, tmp_path / "start.pt")
    for name, value in part.state_dict().items():
        assert torch.equal(value, expected[name]), name


def average(folder: Path, name: str, *options: str) -> dict[str, Tensor]:
    average_model.main(["--dst_model", str(folder / name), "--src_path", str(folder), *options])
    return read_state_dict(folder / name)


def test_averaging(finished: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(finished("llm"), tmp_path / "llm")
    first, second = (read_state_dict(folder / f"epoch_{epoch}_whole.pt") for epoch in range(2))
    for name, value in average(folder, "llm.pt", "--num", "2", "--val_best").items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=0, atol=1e-7)
    sidecar = folder / "epoch_0_whole.yaml"
    info = yaml.safe_load(sidecar.read_text())
    sidecar.write_text(yaml.safe_dump(info | {"loss_dict": {"loss": 0.0}}))
    best, last = average(folder, "best.pt", "--num", "1", "--val_best"), average(folder, "last.pt", "--num", "1")
    assert all(torch.equal(best[name], first[name]) and torch.equal(last[name], second[name]) for name in first)
    with pytest.raises(InputError, match="holds 2 epochs"):
        average(folder, "llm.pt", "--num", "3")
    sidecar.write_text(yaml.safe_dump(info | {"loss_dict": {"loss": math.nan}}))
    assert torch.equal(average(folder, "best.pt", "--num", "1", "--val_best")[name], second[name])
    with pytest.raises(InputError, match="holds 1 epochs with a finite loss"):
        average(folder, "llm.pt", "--num", "2", "--val_best")


def test_an_averaged_vocoder_speaks(recipe: Recipe, finished: Callable[[str], Path]) -> None:
    folder = finished("hifigan")
    average(folder, "hifigan.pt", "--num", "2")
    vocoder = load_model_yaml(recipe.config, parts=("hift",))["hift"]
    load_strict(vocoder, read_state_dict(folder / "hift.pt"), "hift.pt")
    assert vocoder.eval().inference(torch.zeros(1, 80, 5))[0].shape == (1, 5 * 256)


def test_exports_equal_their_modules(tmp_path: Path) -> None:
    folder = ["--model_dir", str(tiny_model_dir(tmp_path))]
    export_jit.main(folder)
    export_onnx.main(folder)
    llm, flow = tiny("llm"), tiny("flow")
    for name, stack in (("llm.text_encoder", llm.text_encoder), ("llm.llm", llm.llm), ("flow.encoder", flow.encoder)):
        inputs = export_jit.example(stack, 2, 11)
        with torch.no_grad():
            found, wanted = torch.jit.load(tmp_path / f"{name}.fp32.zip")(*inputs), stack(*inputs)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    session = onnxruntime.InferenceSession(str(tmp_path / "flow.decoder.estimator.fp32.onnx"))
    inputs = export_onnx.example(80, 23)
    (found,) = session.run(["estimator_out"], {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        wanted = flow.decoder.estimator(*inputs.values())
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)


def test_an_export_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_jit, "TOLERANCE", -1.0)
    with pytest.raises(InputError, match="is not written"):
        export_jit.export(tiny("llm").text_encoder, tmp_path / "x.zip")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_said_before_training(
    recipe: Recipe, finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished("llm")
    with pytest.raises(InputError, match="is of an earlier run; give another --model_dir"):
        recipe.train("llm", "llm")
    with pytest.raises(InputError, match="has done 2 epochs, not 1"):
        recipe.train("llm", "llm", "--resume", "auto", "--max_epoch", "1")
    for option, least in (("max_epoch", 1), ("total_steps", 1), ("seed", 0), ("num_workers", 0), ("prefetch", 1)):
        with pytest.raises(InputError, match=f"--{option} {least - 1}: at least {least} is needed"):
            recipe.train("llm", "wrong", f"--{option}={least - 1}")
    with pytest.raises(InputError, match="deepspeed is not installed"):
        recipe.train("llm", "deep", "--train_engine", "deepspeed")
    with pytest.raises(InputError, match="model llm, not flow"):
        recipe.train("flow", "llm", "--resume", "auto")
    for name, value in (("accum_grad", 0), ("grad_clip", "none")):
        with pytest.raises(InputError, match=f"{name} of train_conf is {value}"):
            recipe.train("llm", "numbers", config=write_config(recipe.folder, "numbers.yaml", **{name: value}))
    with pytest.raises(InputError, match="accum_grad 3"):
        recipe.train("hifigan", "grouped", config=write_config(recipe.folder, "grouped.yaml", accum_grad=3))
    with pytest.raises(InputError, match="scheduler 'noam'"):
        recipe.train("llm", "noam", config=write_config(recipe.folder, "noam.yaml", scheduler="noam"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="use --ddp.dist_backend gloo"):
        recipe.train("llm", "nccl", "--ddp.dist_backend", "nccl")
