"""Several devices train as one with more accumulation: who computes what, and two processes on a CPU."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import worker_tasks
from made_clips import FAST, clips, write_clips
from models import ORIGIN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, SequentialSampler

import train_joint
from config import JOINT_TRAINING_CONFIG, with_changes
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_part
from cosyvoice.runtime.errors import InputError
from dataset import DealtBatches, EpochOrder, collate
from llm_flow_model import JointModel
from tools.random_model import make_random_model
from training.checkpoints import CheckpointKeeper
from training.devices import check_devices, passes_a_device
from training.workers import Place, WorkerFailed, with_workers
from voices.run import read_run

ROOT = Path(__file__).parents[1]
CLIPS = 16  # 3 held out; 13 in batches of 2, of which the second step of an epoch has 4 and one clip, in three batches
EXACT = [*FAST, "precision=32-true", "batch_size=2", "validation_ratio=0.2", "max_epochs=2"]
LAST = "joint_joint_last.ckpt"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `data`."""
    folder = tmp_path_factory.mktemp("devices")
    make_random_model(folder / "model", seed=3, size="small")
    write_clips(CLIPS, ModelFolder(folder / "model"), folder / "data")
    return folder


def options(places: Path, output: Path, *more: str) -> list[str]:
    folders = ["--model-dir", str(places / "model"), "--data-dir", str(places / "data"), "--output-dir", str(output)]
    return [*folders, "--device", "cpu", "--set", *EXACT, *more]


@pytest.fixture
def train(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs train_joint.py, whose first process is this one. Returns the folder of results."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the workers, too

    def run(*more: str, output: str, code: int = 0) -> Path:
        assert train_joint.main(options(places, tmp_path / output, *more)) == code
        assert not torch.distributed.is_initialized()
        return tmp_path / output

    return run


@pytest.fixture(scope="module")
def one_device(places: Path) -> Path:
    """The results of one device."""
    assert train_joint.main(options(places, places / "one", "llm_loss_threshold=100")) == 0
    return places / "one"


def assert_same(one: Path, two: Path) -> None:
    first, second = read_run(one / LAST), read_run(two / LAST)
    for part in first.parts:
        for name, tensor in first.adapters[part].items():
            # where a gradient is nearly zero, the optimiser makes a step of its rounding
            torch.testing.assert_close(second.adapters[part][name], tensor, atol=1e-4, rtol=0, msg=name)
        was, now = first.state.progress[part], second.state.progress[part]
        assert (now.stopped, now.best_epoch) == (was.stopped, was.best_epoch)
        for before, after in zip(was.history, now.history, strict=True):
            assert vars(after) == pytest.approx(vars(before), rel=1e-5)


def logged(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of what TensorBoard shows for every epoch, by name."""
    (folder,) = (output / "joint_logs" / "joint").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    names = [name for name in events.Tags()["scalars"] if name.endswith("_epoch") or name.startswith("val_")]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


# Who computes what


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("skip", [0, 12])
def test_devices_take_the_batches_in_turn(devices: int, skip: int) -> None:
    whole = EpochOrder(19, seed=1)
    shuffled = list(whole)
    expected = [shuffled[start : start + 2] for start in range(skip, 19, 2)]
    dealt = []
    for rank in range(devices):
        order = EpochOrder(19, seed=1)
        batches = DealtBatches(order, 2, rank, devices)
        order.skip = skip
        dealt.append(list(batches))
        assert len(batches) == -(-10 // devices)
    assert len({len(own) for own in dealt}) == 1
    found = [batch for turn in zip(*dealt, strict=True) for batch in turn]
    assert found[: len(expected)] == expected
    assert not any(found[len(expected) :]) and len(found) < len(expected) + devices
    assert collate([]) == {}


def test_clips_have_the_same_draws_and_weights_on_all_devices(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three steps, the last one shorter and the last batch smaller."""
    monkeypatch.setattr("llm_flow_model.seed_all", lambda *numbers: seeds.append(numbers))
    config = with_changes(JOINT_TRAINING_CONFIG, [*EXACT, "accumulate_grad_batches=6"])
    model = JointModel({"flow": load_part(ModelFolder(places / "model"), "flow")}, config, 7, torch.ones(192), ORIGIN)
    made = clips(29)

    def computed(devices: int) -> dict[tuple[int, ...], list[Any]]:
        """What each batch is computed with, by the names of its clips."""
        found = {}
        for rank in range(devices):
            batches = DealtBatches(SequentialSampler(made), 2, rank, devices)
            loader = DataLoader(made, batch_sampler=batches, collate_fn=lambda chosen: chosen)
            model._trainer = SimpleNamespace(
                world_size=devices,
                global_rank=rank,
                current_epoch=3,
                accumulate_grad_batches=passes_a_device(config, devices),
                train_dataloader=SimpleNamespace(dataset=made),
            )
            for i, batch in enumerate(loader):
                model.on_train_batch_start({}, i)
                number = model.batch_number(i)
                share = round(model.group_share(len(batch), number) / model.trainer.accumulate_grad_batches, 12)
                utts = tuple(clip.utt for clip in batch)
                found[utts] = [seeds.pop(), model.spread_times(len(batch), number).tolist(), share]
        return found

    seeds: list[tuple[int, ...]] = []
    one = computed(1)
    assert [draws for draws, _, _ in one.values()] == [(7, 3, number) for number in range(15)]
    by_step = [[share for _, _, share in list(one.values())[start : start + 6]] for start in (0, 6, 12)]
    assert [sum(shares) for shares in by_step] == pytest.approx([1, 1, 1])
    assert by_step[2] == pytest.approx([2 / 5, 2 / 5, 1 / 5])
    for devices in (2, 3, 6):
        several = computed(devices)
        idle = several.pop((), None)
        assert idle is None or idle[1:] == [[], 0]
        assert several == one


@pytest.mark.parametrize(
    ("size", "passes", "devices", "expected"),
    [
        (1, 16, 1, 16),
        (1, 16, 4, 4),
        (4, 4, 4, 1),
        (4, 4, 8, "--set batch_size=2 accumulate_grad_batches=8 can be"),
        (4, 4, 3, "--set accumulate_grad_batches=6 can be"),
        (6, 1, 4, "--set accumulate_grad_batches=4 can be"),
    ],
)
def test_a_step_is_shared_evenly_or_not_at_all(size: int, passes: int, devices: int, expected: int | str) -> None:
    config = {"batch_size": size, "accumulate_grad_batches": passes}
    if isinstance(expected, int):
        assert passes_a_device(config, devices) == expected
        return
    with pytest.raises(InputError, match=f"accumulate_grad_batches={passes} cannot be shared .*; {expected}"):
        passes_a_device(config, devices)
    with pytest.raises(InputError, match="give a number that divides it"):
        passes_a_device(config, devices, resumed=True)


def test_more_devices_than_there_are_is_one_line(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.devices.cuda_problem", lambda: "torch sees no CUDA device here")
    with pytest.raises(InputError, match="^--devices 2 needs as many GPUs, and .* CUDA device here; leave it out"):
        train_joint.main([*options(places, tmp_path), "--device", "auto", "--devices", "2"])
    monkeypatch.setattr("training.devices.cuda_problem", lambda: "")
    for count, remedy in ((1, "leave it out"), (3, "give --devices 3")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(InputError, match=f"torch sees {count} here; {remedy}"):
            check_devices(4, "cuda")
    check_devices(3, "auto")
    with pytest.raises(InputError, match="--devices 0: at least 1"):
        train_joint.main([*options(places, tmp_path), "--devices", "0"])


# Workers


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        (worker_tasks.make_a_mistake, InputError, "^there is no parquet file; prepare one$"),
        (worker_tasks.divide_by_zero, WorkerFailed, "(?s:.*)ZeroDivisionError"),
        (worker_tasks.be_killed, InputError, r"ended from outside \(exit code -9\); is the memory full"),
    ],
)
def test_what_a_worker_fails_with_is_told(
    task: Callable[[Place], None], kind: type[Exception], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(kind, match=message), with_workers(2, task) as place:
        place.meet()
    assert capfd.readouterr() == ("", "")


def test_a_lost_connection_is_told_by_its_cause() -> None:
    with pytest.raises(InputError, match="the disk is full"), with_workers(2, worker_tasks.fail_after_meeting) as place:
        place.meet()
        time.sleep(1)
        raise RuntimeError("connection closed")
    with pytest.raises(RuntimeError, match="our own"), with_workers(2, worker_tasks.sleep) as place:
        place.meet()
        raise RuntimeError("our own")


# Two processes


def test_two_devices_equal_one_with_twice_the_accumulation(
    train: Callable[..., Path], one_device: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the language model stops after the first epoch, and where one device has no batch in the last turn."""
    two = train("llm_loss_threshold=100", "--devices", "2", output="two")
    said = capfd.readouterr()
    for line in ("2 x cpu, 32-true", "4 optimiser steps planned, 2 in each of 2 epochs, at most 8 clips", "epoch 2: "):
        assert said.out.count(line) == 1, said.out
    assert "Warning" not in said.err and "[rank" not in said.err, said.err
    assert_same(one_device, two)
    one_logged, two_logged = logged(one_device), logged(two)
    assert one_logged.keys() == two_logged.keys() and len(one_logged) == 7
    for name, values in one_logged.items():
        assert two_logged[name] == [pytest.approx(value, rel=1e-5) for value in values], name
    assert {path.name for path in two.iterdir()} == {path.name for path in one_device.iterdir()}


def press_ctrl_c(keeper: CheckpointKeeper, trainer: Any, model: JointModel, *step: Any) -> None:
    if model.epoch_number == 2 and step[-1] == 0:
        signal.raise_signal(signal.SIGINT)
    NOTICED(keeper, trainer, model, *step)


NOTICED = CheckpointKeeper.on_train_batch_end


@pytest.mark.parametrize(
    ("first", "second"), [("2", "1"), pytest.param("1", "2", marks=pytest.mark.slow)], ids=["2 then 1", "1 then 2"]
)
def test_ctrl_c_in_an_epoch_is_resumed_by_another_number_of_devices(
    train: Callable[..., Path],
    one_device: Path,
    first: str,
    second: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first process is asked to stop, and all save together."""
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "on_train_batch_end", press_ctrl_c)
        output = train("llm_loss_threshold=100", "--devices", first, output="parts", code=train_joint.EXIT_INTERRUPTED)
    assert (" --devices 2" in capsys.readouterr().out.splitlines()[-1]) == (first == "2")
    state = read_run(output / LAST).state
    assert (state.epochs, state.batches_done) == (1, 4)
    train("llm_loss_threshold=100", "--resume", "auto", "--devices", second, output="parts")
    assert_same(one_device, output)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("2", "1"), ("1", "2")])
def test_an_epochs_end_is_resumed_by_another_number_of_devices(
    train: Callable[..., Path], one_device: Path, first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = CheckpointKeeper.on_train_epoch_end

    def stop_after_first(keeper: CheckpointKeeper, trainer: Any, model: JointModel) -> None:
        keeper.interrupted = model.epoch_number == 1
        ended(keeper, trainer, model)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "on_train_epoch_end", stop_after_first)
        output = train("llm_loss_threshold=100", "--devices", first, output="parts", code=train_joint.EXIT_INTERRUPTED)
    train("llm_loss_threshold=100", "--resume", "auto", "--devices", second, output="parts")
    assert_same(one_device, output)


@pytest.mark.slow
def test_two_devices_wait_while_the_first_one_speaks(train: Callable[..., Path], one_device: Path) -> None:
    heard = train("llm_loss_threshold=100", "--listen", "Hello there.", "--devices", "2", output="heard")
    assert_same(one_device, heard)
    samples = heard / "joint_logs/joint/version_0/samples"
    for epoch in ("epoch_0001", "epoch_0002"):
        assert sorted(path.stem for path in (samples / epoch).glob("*.wav")) == ["flow_01", "llm_01", "llm_flow_01"]


class Command:
    """`python train_joint.py --devices 2` as a user runs it, with all its processes in a session of their own."""

    def __init__(self, places: Path, output: Path, *more: str) -> None:
        self.said = output.with_suffix(".said")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "train_joint.py"), *options(places, output, "max_epochs=500", *more)]
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--devices", "2"], env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def wait_for(self, text: str) -> None:
        ended = time.monotonic() + 300
        while text not in self.said.read_text():
            assert self.process.poll() is None and time.monotonic() < ended, self.said.read_text()
            time.sleep(0.1)

    def processes(self) -> list[int]:
        found = subprocess.run(["ps", "-o", "pid=", "-s", str(self.process.pid)], capture_output=True, text=True)
        return [int(number) for number in found.stdout.split()]

    def end(self) -> list[str]:
        """Wait until it has ended and left no process. Returns what it said last, beginning with a mark of training."""
        self.process.wait(timeout=120)
        ended = time.monotonic() + 30
        while self.processes():
            assert time.monotonic() < ended, "a process is left"
            time.sleep(0.1)
        return self.said.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to_all", "number", "code", "last"),
    [
        (True, signal.SIGINT, 130, "--resume auto"),  # as a terminal does
        (False, signal.SIGINT, 130, "--resume auto"),
        (True, signal.SIGTERM, 130, "train_joint.py: interrupted; what was finished is kept"),
        (False, signal.SIGTERM, 130, "train_joint.py: interrupted; what was finished is kept"),
        (False, signal.SIGKILL, -9, ""),
    ],
)
def test_a_command_that_is_stopped_leaves_no_process(
    to_all: bool, number: int, code: int, last: str, places: Path, tmp_path: Path
) -> None:
    command = Command(places, tmp_path / "output")
    command.wait_for("epoch 1: ")
    assert len(command.processes()) > 1
    (os.killpg if to_all else os.kill)(command.process.pid, number)
    said = command.end()
    assert command.process.returncode == code
    assert last in said[-1] and "Traceback" not in "\n".join(said), said
    assert not list((tmp_path / "output").glob(".*")) or code < 0


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_command_with_one_line(places: Path, tmp_path: Path) -> None:
    command = Command(places, tmp_path / "output")
    command.wait_for("epoch 1: ")
    for number in command.processes():
        arguments = Path(f"/proc/{number}/cmdline").read_text()
        if "spawn_main" in arguments:
            os.kill(number, signal.SIGKILL)
    said = command.end()
    assert command.process.returncode == 2
    assert "was ended from outside (exit code -9)" in said[-1] and "Traceback" not in "\n".join(said), said


@pytest.mark.slow
def test_a_mistake_is_one_line(places: Path, tmp_path: Path) -> None:
    """It is the same in both processes."""
    command = Command(places, tmp_path / "output", "accumulate_grad_batches=3")
    said = command.end()
    assert command.process.returncode == 2
    told = "--set batch_size=1 accumulate_grad_batches=6 can be"
    assert said[-1].startswith("train_joint.py: accumulate_grad_batches=3 cannot be shared") and told in said[-1]
    assert sum("train_joint.py: " in line for line in said) == 1 and "Traceback" not in "\n".join(said)
