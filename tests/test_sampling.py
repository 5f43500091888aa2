"""Training that is heard: what is left of the samples, and that training does not notice them."""

import json
import re
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from models import tiny_model_dir
from PIL import Image
from recipe import TrainingRuns, train_as, write_config, write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PageEvents
from torch import nn

from cosyvoice.bin import memory, train
from cosyvoice.bin.sample_files import FIGURES_FILE, picture
from cosyvoice.bin.sample_parts import StoredPart, TrainedPart
from cosyvoice.bin.sample_voice import SampleVoice
from cosyvoice.bin.sampling import Judge, Recording
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_part, read_state_dict
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import save_tensors
from lora import adapters, inject
from training.listening import AdaptedPart, BasePart

RATE_HZ = 22050


class Heard(TrainingRuns):
    """Runs of train.py on one corpus, with the options of samples and without them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.config = folder, write_corpus(folder), write_config(folder)
        (folder / "model").mkdir()
        self.model_dir = tiny_model_dir(folder / "model")
        (folder / "texts.txt").write_text("Hello.\n\n...\nGo on.\n")
        torch.manual_seed(0)
        save_tensors({"reader": {"embedding": torch.randn(1, 192)}}, folder / "spk2info.pt")

    def samples(self, every: int = 1) -> list[str]:
        paths = {"model_dir": self.model_dir, "texts": self.folder / "texts.txt"}
        paths |= {"speakers": self.folder / "spk2info.pt"}
        given = [text for name, path in paths.items() for text in (f"--sample_{name}", str(path))]
        return ["--sample_every", str(every), *given]

    def options(self, part: str, run: str, *options: str, config: Path | None = None) -> list[str]:
        start = "--checkpoint", str(self.model_dir / f"{part}.pt")
        return super().options(part, run, *start, *options, config=config)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    return Heard(tmp_path_factory.mktemp("heard"))


def weights(folder: Path, epoch: int = 1) -> dict[str, torch.Tensor]:
    return read_state_dict(folder / f"epoch_{epoch}_whole.pt")


def assert_same_run(one: Path, other: Path) -> None:
    """Equal weights after the last epoch, and equal losses of every epoch."""
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    for epoch in range(2):
        numbers = [re.findall(r"loss.*", (run / f"epoch_{epoch}_whole.yaml").read_text()) for run in (one, other)]
        assert numbers[0] == numbers[1]


def files(folder: Path, suffix: str = ".wav") -> list[str]:
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))


@pytest.mark.parametrize("part", ["llm", "flow"])
def test_training_is_heard_and_does_not_notice(part: str, heard: Heard) -> None:
    asked: list[Sequence[Recording]] = []

    def open_judge(recordings: Sequence[Recording], texts: Sequence[str]) -> Judge:
        asked.append(recordings)
        torch.manual_seed(0)  # a judge may draw
        return lambda speech, rate_hz, text: {"word_error": len(text) / 100 + torch.rand(()).item() * 0}

    trained = ["--sample_llm", str(heard.model_dir / "llm.pt")] if part == "flow" else []
    silent = heard.train(part, f"{part}_silent")
    spoken = heard.train(part, f"{part}_heard", *heard.samples(), *trained, judge=open_judge)
    assert_same_run(silent, spoken)
    assert not (silent / "samples").exists()
    versions = ["llm"] if part == "llm" else ["flow", "llm_flow"]
    expected = sorted(["reference", *(f"{version}_{number:02d}" for version in versions for number in (1, 2, 3))])
    for epoch in range(2):
        folder = spoken / "samples" / f"epoch_{epoch:04d}"
        assert files(folder) == files(folder, ".png") == expected
        for name in expected:
            speech, rate_hz = soundfile.read(folder / f"{name}.wav")
            assert rate_hz == RATE_HZ and len(speech) and (speech != 0).any()
            assert Image.open(folder / f"{name}.png").size == (len(speech) // 256, 160)
        rows = {row["file"]: row for row in json.loads((folder / FIGURES_FILE).read_text())}
        assert rows[f"{part}_01.wav"]["text"] == "Hello." and rows[f"{part}_01.wav"]["word_error"] == 0.06
        assert rows[f"{part}_03.wav"]["text"] == rows["reference.wav"]["text"]  # what the held-out clip says
    assert len(asked[0]) == 8 and asked[0][0].rate_hz == 16000
    (events,) = (heard.folder / "tensorboard" / f"{part}_heard").glob("events*")
    log = EventAccumulator(str(events), {"audio": 0, "images": 0, "scalars": 0}).Reload()
    assert set(log.Tags()["audio"]) == set(map(tag_of, expected))
    page = PageEvents(str(events)).Reload()  # what the page shows: of two kinds under one tag, only the first
    assert {tag.removesuffix("/mel") for tag in page.PluginTagToContent("images")} == set(log.Tags()["audio"])
    assert [event.step for event in log.Audio(f"01/{part}")] == [0, 1]
    assert [event.step for event in log.Audio("reference")] == [0]
    assert {event.step for event in log.Images(f"03/{part}/mel")} == {0, 1}
    seconds = [row["seconds"] for name, row in rows.items() if re.fullmatch(rf"{part}_\d\d.wav", name)]
    assert log.Scalars(f"SAMPLES/seconds/{part}")[1].value == pytest.approx(sum(seconds) / 3)
    curves = {"TRAIN/loss", "CV/loss", "TRAIN/lr_0", "TRAIN/grad_norm"}
    if part == "llm":
        curves |= {"TRAIN/acc", "CV/acc"}
    assert curves <= set(log.Tags()["scalars"])


def tag_of(name: str) -> str:
    version, _, number = name.rpartition("_")
    return f"{number}/{version}" if version else name


def test_a_sample_is_what_the_weights_of_its_epoch_say(heard: Heard) -> None:
    run, folder = heard.folder / "flow_heard", ModelFolder(heard.model_dir)
    if not run.exists():
        heard.train("flow", "flow_heard", *heard.samples())
    with StoredPart(folder, "llm").lend(torch.device("cpu")) as llm:
        flow = load_part(folder, "flow", run / "epoch_1_whole.pt")
        embedding = torch.load(heard.folder / "spk2info.pt")["reader"]["embedding"]
        voice = SampleVoice(folder, llm, flow, embedding, torch.device("cpu"), 1986)
        speech = voice.sound(flow, voice.write(llm, 2, "Go on."))
    found, _ = soundfile.read(run / "samples" / "epoch_0001" / "flow_02.wav", dtype="float32")
    torch.testing.assert_close(torch.from_numpy(found), speech[0], atol=1e-4, rtol=0)  # 16 bits


def test_a_failing_sample_is_one_line(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = SampleVoice.sound

    def fail(voice: SampleVoice, flow: nn.Module, written: Any) -> torch.Tensor:
        speech = sound(voice, flow, written)
        calls.append(speech)
        if len(calls) % 3 == 1:
            raise torch.OutOfMemoryError("too little\nmemory")
        return speech * (torch.nan if len(calls) % 3 == 2 else 1)

    calls: list[torch.Tensor] = []
    monkeypatch.setattr(SampleVoice, "sound", fail)
    folder = heard.train("llm", "failing", *heard.samples(every=2))
    said = capsys.readouterr().out
    assert "epoch 1: llm 01 failed: too little\n" in said
    assert "epoch 1: llm 02 failed: its samples are not finite numbers\n" in said
    assert files(folder / "samples" / "epoch_0001") == ["llm_03", "reference"]
    assert not (folder / "samples" / "epoch_0000").exists()  # every second one


def test_other_processes_wait_while_the_first_one_speaks(heard: Heard) -> None:
    """Longer than a process waits for another where they exchange gradients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = heard.options("llm", "together", *heard.samples(every=2))
    torch.multiprocessing.start_processes(speak_slowly, args=(2, port, argv), nprocs=2, start_method="spawn")
    assert files(heard.folder / "together" / "samples" / "epoch_0001") == ["llm_01", "llm_02", "llm_03", "reference"]


def speak_slowly(rank: int, processes: int, port: int, argv: list[str]) -> None:
    import time

    from pytorch_lightning.strategies import DDPStrategy

    write = SampleVoice.write
    SampleVoice.write = lambda *arguments: time.sleep(4) or write(*arguments)
    train.strategy = lambda args: DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=10))
    train_as(rank, processes, port, argv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample_every", "1"], "needs --sample_model_dir and --sample_texts and --sample_speakers"),
        (["--sample_every", "-1"], "--sample_every -1"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str, heard: Heard) -> None:
    with pytest.raises(InputError, match=message):
        heard.train("llm", "refused", *options)


def test_what_samples_need_is_looked_for_before_training(heard: Heard, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave it out for hifigan"):
        train.main(["--model", "hifigan", *heard.options("llm", "refused", *heard.samples())[2:]])
    (tmp_path / "empty.txt").write_text("...\n")
    with pytest.raises(InputError, match="empty.txt has nothing to speak"):
        heard.train("llm", "refused", *heard.samples(), "--sample_texts", str(tmp_path / "empty.txt"))
    save_tensors({"other": {"embedding": torch.zeros(1, 192)}}, tmp_path / "spk2info.pt")
    with pytest.raises(InputError, match="has no speaker 'reader'"):
        heard.train("llm", "refused", *heard.samples(), "--sample_speakers", str(tmp_path / "spk2info.pt"))


def test_a_model_that_cannot_fit_is_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda device: 8.6e9)
    with torch.device("meta"):
        part = nn.Linear(1000, 506_000, bias=False)
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match=r"506 million weights of the llm takes more than 9\.6 GB .* 8\.6 GB.*joint"):
        memory.check_memory(part, "llm", cpu, in_half=True, processes=1)
    memory.check_memory(part, "llm", cpu, in_half=False, processes=1)  # 8.596 GB
    with pytest.raises(InputError, match="has 4.3 GB"):
        memory.check_memory(part, "llm", cpu, in_half=False, processes=2)


def test_a_lent_part_is_given_back_as_it_was() -> None:
    part = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Linear(4, 2)))
    part[2].eval()
    before = {name: value.clone() for name, value in part.state_dict().items()}
    with TrainedPart(part).lend(torch.device("cpu")) as lent:
        assert lent is part and not any(module.training for module in part.modules())
    assert [module.training for module in part] == [True, True, False] and part.training
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())


def test_the_base_is_heard_through_the_adapted_part() -> None:
    torch.manual_seed(0)
    part, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    expected = part(x)
    inject(part, ["0"], rank=2, alpha=4, dropout=0.5)
    for layer in adapters(part):
        nn.init.normal_(layer.lora_B)
    with BasePart(part, None).lend(torch.device("cpu")) as lent:
        assert torch.equal(lent(x), expected)
    with AdaptedPart(part, None).lend(torch.device("cpu")) as lent:
        assert not torch.allclose(lent(x), expected)
    assert [layer.scale for layer in adapters(part)] == [2.0]


def test_a_picture_shows_time_and_pitch() -> None:
    mel = torch.full((80, 3), -11.6)
    mel[0, 2] = 5.0  # the lowest bin of the last frame
    pixels = picture(mel)
    assert pixels.shape == (160, 3, 3) and (pixels[-2:, 2] > 180).all()
    assert (pixels[:-2] < 10).all()
