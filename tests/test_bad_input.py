"""A user's mistake at a command: one line that says what to do, exit code 2, and no file touched."""

import csv
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import merge_joint_weights
import prepare_joint_data
import train_joint
from clips.recordings import find_recordings
from clips.store import with_column
from config import SEED
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.command import EXIT_INTERRUPTED, run
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import alone_in
from dataset import load_clips, split_clips
from llm_flow_model import JointModel
from lora import adapters
from tools.random_model import make_random_model
from training.checkpoints import CheckpointKeeper
from voices.run import read_run
from voices.sidecar import read_sidecar

COMMANDS = {"prepare": prepare_joint_data, "train": train_joint, "merge": merge_joint_weights}
DEFAULTS = {
    "prepare": "--model-dir {model} --input-dir {raw} --data-dir {data} --device cpu --workers 1",
    "train": "--model-dir {model} --data-dir {data} --output-dir {output} --device cpu --epochs 1",
    "merge": "--model-dir {model} --output-dir {output}",
}
CLIPS = 8  # the fewest of which some are held out


def command(name: str, options: str, places: dict[str, Path]) -> int:
    """The exit code of a command; in the options `{name}` stands for a place."""
    line = shlex.split(f"{DEFAULTS[name]} {options}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", [f"{name}.py", *(word.format(**places) for word in line)])
        run(COMMANDS[name].main)
    return left.value.code


# Places: a model, recordings, data and a finished run that are good, and many of each that are not


def say(folder: Path, name: str, wav: np.ndarray, text: str | bytes = "A tone.", rate: int = 16000) -> Path:
    path = folder / name
    soundfile.write(path, wav, rate)
    path.with_suffix(".txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def tone(hertz: float, seconds: float = 0.6, rate: int = 16000) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return 0.4 * np.sin(2 * np.pi * hertz * time) * (0.55 + 0.45 * np.sin(9 * time))


def model_variants(model: Path, root: Path) -> None:
    """Copies of the model folder with one file replaced, or taken away (None)."""
    config = (model / "cosyvoice.yaml").read_text(encoding="utf-8")
    llm_class = "!new:cosyvoice.llm.llm.TransformerLM"
    flow = torch.load(model / "flow.pt", weights_only=True)
    llm = torch.load(model / "llm.pt", weights_only=True)
    replaced = {
        "later": ("cosyvoice.yaml", config.replace(llm_class, "!new:cosyvoice.llm.llm.CosyVoice3LM").encode()),
        "popen": ("cosyvoice.yaml", config.replace(llm_class, "!new:subprocess.Popen").encode()),
        "system": ("cosyvoice.yaml", config.replace("22050", f"!apply:os.mkdir [{root}/ran]", 1).encode()),
        "python": ("cosyvoice.yaml", f"{config}\nx: !!python/object/apply:os.mkdir [{root}/ran]\n".encode()),
        "cut_yaml": ("cosyvoice.yaml", config.partition("get_tokenizer:")[0].encode()),
        "no_yaml": ("cosyvoice.yaml", None),
        "no_llm": ("llm.pt", None),
        "cut_llm": ("llm.pt", (model / "llm.pt").read_bytes()[:5000]),
        "empty_flow": ("flow.pt", b""),
        "cut_onnx": ("campplus.onnx", (model / "campplus.onnx").read_bytes()[:5000]),
        "other_llm": ("llm.pt", {name: tensor + 1 for name, tensor in llm.items()}),
        "cosyvoice2": ("llm.pt", {"llm.model.norm.weight": torch.zeros(2)}),
        "hz25": ("llm.pt", llm | {"text_embedding.weight": torch.zeros(60515, 32)}),
        "attn": ("flow.pt", {name.replace(".attn1.", ".attn."): tensor for name, tensor in flow.items()}),
    }
    for variant, (name, content) in replaced.items():
        folder = root / variant
        shutil.copytree(model, folder, copy_function=os.link)
        (folder / name).unlink()
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            torch.save(content, folder / name)


def data_variants(data: Path, root: Path) -> None:
    good = data / "clips-00000.parquet"
    table = pq.read_table(good, partitioning=None)
    tables = {
        "foreign": pa.table({"utt": ["a"], "text": ["b"]}),
        "numbers_as_text": table.set_column(0, "utt", pa.array(range(len(table)))),
        "no_rows": table.slice(0, 0),
        "two_speakers": with_column(table, "spk", ["ann"] * 3 + ["bob"] * (len(table) - 3)),
    }
    for name, content in tables.items():
        (root / name).mkdir()
        pq.write_table(content, root / name / "x.parquet")
    for name, content in {"junk": b"junk", "cut": good.read_bytes()[:-3000]}.items():
        (root / name).mkdir()
        (root / name / "x.parquet").write_bytes(content)
    (root / "hidden").mkdir()
    (root / "hidden" / ".clips-00000.7.parquet").write_bytes(b"left by a killed run")


def checkpoint_variants(output: Path, root: Path) -> None:
    good = (output / "joint_flow_only_last.ckpt").read_bytes()
    contents = {"cut": good[:4000], "empty": b"", "text": b"hello\n"}
    for name, content in contents.items():
        (root / f"{name}.ckpt").write_bytes(content)
    torch.save({"voice": {}, "state_dict": {}}, root / "hollow.ckpt")


# Places in a checkpoint, and what must not lie there.
SPOILT = [
    *((("voice", name), None) for name in ("config", "seed", "speaker", "run", "base", "epochs", "progress")),
    (("voice", "embedding"), [0.0] * 192),
    (("voice", "embedding"), torch.full((192,), torch.nan)),
    (("voice", "base", "flow"), 7),
    (("voice", "pace"), "fast"),
    (("voice", "pace"), float("nan")),
    (("voice", "config", "flow_lora"), {"lora_r": 8}),
    (("voice", "config", "flow_lora", "lora_r"), "8"),
    (("voice", "progress", "flow"), {}),
    (("voice", "progress", "flow", "history"), [[1, 2.0]]),
    (("voice", "progress", "flow", "best"), {1: "weights"}),
    (("voice", "progress", "flow", "best"), {"a.lora_A": torch.tensor([torch.inf])}),
    (("state_dict",), None),
    (("state_dict",), {"lora_A": torch.zeros(2)}),
    (("state_dict",), {"parts.vocoder.a.lora_A": torch.zeros(2)}),
    (("state_dict",), {"parts.flow.a.lora_A": 1.0}),
    (("state_dict",), {"parts.flow.a.lora_A": torch.zeros(2, dtype=torch.int64)}),
]


@pytest.mark.parametrize(("place", "value"), SPOILT, ids=[".".join(place) for place, _ in SPOILT])
def test_a_checkpoint_with_something_else_in_it_is_refused_in_one_line(
    place: tuple[str, ...], value: Any, places: dict[str, Path], tmp_path: Path
) -> None:
    content = torch.load(places["output"] / "joint_flow_only_last.ckpt")
    inside = content
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = value
    torch.save(content, tmp_path / "spoilt.ckpt")
    with pytest.raises(InputError, match=r"^\S*spoilt.ckpt(: | is damaged: )[^\n]+; [^\n]+$"):
        read_run(tmp_path / "spoilt.ckpt")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    names = ("model", "raw", "data", "output", "empty", "unpaired")
    places = {"root": root, "file": root / "file"} | {name: root / name for name in names}
    for name in ("raw", "empty", "unpaired"):
        places[name].mkdir()
    places["file"].write_text("a regular file")
    make_random_model(places["model"], seed=5)
    for number in range(CLIPS):
        say(places["raw"], f"{number:03d}.wav", tone(200 + 20 * number))
    say(places["unpaired"], "1.wav", tone(200)).with_suffix(".txt").rename(places["unpaired"] / "2.txt")
    assert command("prepare", "", places) == 0
    assert command("train", "--mode flow_only", places) == 0
    model_variants(places["model"], root)
    data_variants(places["data"], root)
    checkpoint_variants(places["output"], root)
    (places["data"] / ".clips-00000.7.parquet").write_bytes(b"left by a killed run")
    return places


# What is wrong -> words of the message

FLOW_LAST = "{output}/joint_flow_only_last.ckpt"
MISTAKES = [
    # the model folder
    ("prepare", "--model-dir {root}/nowhere", "is no model folder", "snapshot_download"),
    ("train", "--model-dir {root}/no_yaml", "is no model folder", "snapshot_download"),
    ("merge", "--model-dir {root}/no_yaml", "is no model folder", "snapshot_download"),
    ("prepare", "--model-dir {root}/cut_yaml", "no entry", "use the one of a CosyVoice-300M folder"),
    ("prepare", "--model-dir {root}/cut_onnx", "campplus.onnx", "damaged", "copy it again"),
    ("prepare", "--model-dir {root}/later", "CosyVoice3LM", "use a CosyVoice2 or CosyVoice-300M folder"),
    ("train", "--model-dir {root}/popen", "'subprocess.Popen' is not allowed"),
    ("train", "--model-dir {root}/system", "'os.mkdir' is not allowed"),
    ("train", "--model-dir {root}/python", "python/object/apply:os.mkdir"),
    ("train", "--model-dir {root}/no_llm", "llm.pt does not exist", "download the model again"),
    ("train", "--model-dir {root}/cut_llm", "llm.pt is damaged", "download it again"),
    ("train", "--model-dir {root}/empty_flow --mode flow_only", "flow.pt is damaged", "download it again"),
    ("train", "--model-dir {root}/cosyvoice2 --mode llm_only", "belongs to CosyVoice2", "use CosyVoice-300M"),
    ("train", "--model-dir {root}/hz25 --mode llm_only", "25Hz", "use the 50 Hz CosyVoice-300M"),
    ("train", "--model-dir {root}/attn --mode flow_only", "attn, not attn1", "another version"),
    # recordings and prepared data
    ("prepare", "--input-dir {root}/nowhere", "nowhere does not exist"),
    ("prepare", "--input-dir {file}", "file does not exist"),
    ("prepare", "--input-dir {empty}", "has no recording", "Put 001.wav and 001.txt there"),
    ("prepare", "--input-dir {unpaired}", "has a text", "Put 001.txt beside 001.wav"),
    ("train", "--data-dir {root}/nowhere", "no parquet file", "run prepare_joint_data.py first"),
    ("train", "--data-dir {root}/hidden", "no parquet file", "run prepare_joint_data.py first"),
    ("train", "--data-dir {root}/junk", "x.parquet cannot be read", "delete it and run prepare_joint_data.py"),
    ("train", "--data-dir {root}/cut", "x.parquet cannot be read", "delete it and run prepare_joint_data.py"),
    ("train", "--data-dir {root}/foreign", "columns spk, utt_embedding", "move it away"),
    ("train", "--data-dir {root}/numbers_as_text", "columns utt are", "another type", "move it away"),
    ("train", "--data-dir {root}/no_rows", "have no clip", "run prepare_joint_data.py again"),
    ("train", "--data-dir {root}/two_speakers", "several speakers (ann, bob)", "prepare one at a time"),
    # checkpoints
    ("merge", "--output-dir {empty}", "no joint_<mode>_last.ckpt", "run train_joint.py first"),
    ("merge", "--ckpt {root}/nothing.ckpt", "nothing.ckpt does not exist", "train first"),
    ("merge", "--ckpt {root}/cut.ckpt", "is damaged or of another kind", "another joint_<mode>"),
    ("merge", "--ckpt {root}/empty.ckpt", "is damaged or of another kind", "another joint_<mode>"),
    ("merge", "--ckpt {root}/text.ckpt", "is damaged or of another kind", "another joint_<mode>"),
    ("merge", "--ckpt {root}/hollow.ckpt", "no checkpoint of train_joint.py", "another joint_<mode>"),
    ("merge", "--ckpt {output}/flow_merged_flow_only.pt", "but merged or base weights", "another joint_<mode>"),
    ("merge", "--ckpt {model}/flow.pt", "but merged or base weights", "another joint_<mode>"),
    ("merge", f"--ckpt {FLOW_LAST} --llm-only", "--mode flow_only: it holds nothing for that part"),
    ("merge", "--llm-output {root}/llm.pt", "--llm-output is given, but the llm is not merged", "leave it out"),
    ("merge", "--model-dir {root}/attn", "another base model", "--model-dir"),
    ("train", "--mode flow_only --init {root}/cut.ckpt", "is damaged or of another kind"),
    ("train", "--mode flow_only --init {model}/flow.pt", "but merged or base weights"),
    ("train", f"--mode llm_only --resume {FLOW_LAST}", "run of --mode flow_only", "use --init"),
    ("train", "--mode flow_only --resume auto --model-dir {root}/attn", "another base model", "--model-dir"),
    ("train", "--mode flow_only --resume auto --lr 0.1 --epochs 2", "keeps the learning_rate of", "leave that"),
    ("train", "--mode flow_only --resume auto --set flow_lora.lora_r=2", "keeps the flow_lora of", "leave that"),
    ("train", "--mode flow_only --resume auto --batch-size 2", "keeps the batch_size of", "leave that"),
    ("train", "--mode flow_only --resume auto --memory 8GB", "keeps the batch_size of", "leave --memory out"),
    ("train", "--mode flow_only --resume auto --seed 7", "keeps the seed 1986 of", "leave --seed out"),
    ("train", f"--mode flow_only --init {FLOW_LAST} --set flow_lora.lora_r=2", "adapters do not fit", "of their own"),
    # settings and options
    (
        "train",
        "--set learnig_rate=1 a=1 b.c=2 d=3 llm_lora.lora_r=0 --lr nan --batch-size 0",
        *("learnig_rate is no setting", "a is no", "b.c is no", "d is no", "known: training_mode"),
        *("llm_lora.lora_r must be", "learning_rate must be", "batch_size must be"),
    ),
    ("train", "--set learning_rate", "takes KEY=VALUE"),
    ("train", "--set learning_rate.x=1", "use --set learning_rate=VALUE"),
    ("train", "--mode flow_only --set \"flow_lora.target_modules=['q_proj']\"", "q_proj", "remove them"),
    ("train", "--seed -1", "--seed -1", "whole number from 0"),
    ("train", "--device cuda", "no CUDA device", "--device cpu"),
    ("prepare", "--device cuda", "no CUDA", "onnxruntime-gpu"),
    ("prepare", "--speaker '\udce9'", "'\\udce9' is not UTF-8", "another name"),
    # places that cannot be written
    ("prepare", "--data-dir {file}/data", "cannot write", "choose another folder"),
    ("train", "--output-dir {file}/output", "cannot write", "choose another folder"),
    ("merge", "--flow-only --output-dir {file}/output --ckpt " + FLOW_LAST, "cannot write", "choose another folder"),
    ("merge", "--flow-output {file}/flow.pt", "cannot write", "choose another folder"),
    # what must not be replaced
    ("merge", "--flow-output {model}/flow.pt", "in the model folder", "choose another folder"),
    ("merge", "--flow-output {model}/spk2info.pt", "in the model folder", "choose another folder"),
    ("merge", "--flow-output {model}/merged/flow.pt", "in the model folder", "choose another folder"),
    ("merge", "--output-dir {model} --ckpt " + FLOW_LAST, "in the model folder", "choose another folder"),
    ("merge", "--flow-output {output}/spk2info.pt", "would replace another file", "another name"),
    ("merge", "--flow-output {output}/voice_flow_only.json", "would replace another file", "another name"),
    ("merge", "--flow-output {output}/joint_flow_only_last.ckpt", "would replace another file", "another name"),
    ("train", "--output-dir {model}", "in the model folder", "choose another folder"),
    ("prepare", "--data-dir {model}", "in the model folder", "choose another folder"),
]


def files(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "options", "words"), [(row[0], row[1], row[2:]) for row in MISTAKES])
def test_a_mistake_is_one_line_with_its_remedy(
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
    options: str,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    before = files(places["root"])
    code, lines = command(name, options, places), capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"{name}.py: ")
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert files(places["root"]) == before
    assert not (places["root"] / "ran").exists()


@pytest.mark.parametrize(
    "trouble",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmuch advice"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling 2.00 GiB.\nmuch advice"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2.00 GiB.\nmuch advice"),
        MemoryError("Unable to allocate 2.00 GiB."),
    ],
)
def test_a_full_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, trouble: Exception
) -> None:
    def fill(_argv: None) -> None:
        raise trouble

    monkeypatch.setattr(sys, "argv", ["train_joint.py"])
    with pytest.raises(SystemExit) as left:
        run(fill)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "2.00 GiB. See 'Out of memory' in docs/settings.md" in line


def test_a_folder_that_is_deleted_during_the_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_joint.py"])
    with pytest.raises(SystemExit) as left:
        run(lambda _argv: (tmp_path / "output" / "events").read_bytes())
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and f"({tmp_path}/output/events); was it moved or deleted during the run?" in line


# Single clips: a row in the report, and the rest goes on (the common faults are in test_prepare.py)


def test_more_faults_of_single_clips(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    long_name = "é" * 120  # 240 bytes: hardly room for a suffix
    say(tmp_path, f"{long_name}.wav", tone(300))
    say(tmp_path, "utf-16.wav", tone(310), "A tone.".encode("utf-16"))
    say(tmp_path, "utf-16-le.wav", tone(310), "A tone.".encode("utf-16-le"))
    say(tmp_path, "emoji.wav", tone(320), "\N{GRINNING FACE}")
    say(tmp_path, "rate.wav", tone(2, 4.0, 20), rate=20)
    flac = say(tmp_path, "cut.flac", tone(330))
    flac.write_bytes(flac.read_bytes()[:2000])
    say(tmp_path, "video.wav", tone(340)).write_bytes(b"\0\0\0 ftypM4A " + bytes(range(256)) * 9)
    options = f"--input-dir {tmp_path} --data-dir {tmp_path}/data"
    assert command("prepare", options, places) == 0

    with (tmp_path / "data" / "report.csv").open(encoding="utf-8", newline="") as file:
        lines = {line["utt"]: line for line in csv.DictReader(file)}
    expected = {
        long_name: "",
        "utf-16": "text is not UTF-8",
        "utf-16-le": "it has NUL characters",
        "emoji": "nothing to speak",
        "rate": "20 samples a second",
        "cut": "cannot be decoded",
        "video": "needs ffmpeg",
    }
    assert lines.keys() == expected.keys()
    for utt, words in expected.items():
        assert words in lines[utt]["reason"] and lines[utt]["kept"] == ("no" if words else "yes"), utt
    assert [clip.utt for clip in load_clips(tmp_path / "data", ModelFolder(places["model"]))] == [long_name]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_file_name_of_another_encoding_is_named(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + "/你好.wav".encode("gbk"))).touch()
    with pytest.raises(InputError, match="is not UTF-8. Rename"):
        find_recordings(tmp_path)


# What earlier runs left stays whole


@pytest.fixture
def scratch(places: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The places, with an output folder that may be written."""
    return places | {"output": shutil.copytree(places["output"], tmp_path / "output"), "scratch": tmp_path}


@pytest.mark.parametrize(("name", "folder"), [("prepare", "data"), ("train", "output"), ("merge", "output")])
def test_a_second_run_in_the_same_folder_is_refused(name: str, folder: str, scratch: dict[str, Path], capsys) -> None:
    script = Path(COMMANDS[name].__file__).name
    with alone_in(scratch[folder], script):
        before = files(scratch[folder])
        assert command(name, "", scratch) == 2
        assert f"another {script} is at work in {scratch[folder]}; wait until it ends" in capsys.readouterr().err
        assert files(scratch[folder]) == before
    if name == "merge":
        assert command(name, "", scratch) == 0


def test_a_held_out_loss_that_is_not_finite_ends_training(scratch: dict[str, Path], capsys) -> None:
    held_out = split_clips(load_clips(scratch["data"], ModelFolder(scratch["model"])), 0.1, SEED)[1][0].utt
    table = pq.read_table(scratch["data"] / "clips-00000.parquet", partitioning=None)
    mels = {row["utt"]: row["speech_feat"] for row in table.to_pylist()}
    mels[held_out] = [1e30] * len(mels[held_out])  # whose square is not finite
    (scratch["scratch"] / "huge").mkdir()
    table = with_column(table, "speech_feat", list(mels.values()))
    pq.write_table(table, scratch["scratch"] / "huge" / "clips-00000.parquet")
    before = files(scratch["output"])
    assert command("train", "--mode flow_only --data-dir {scratch}/huge", scratch) == 2
    assert re.search("flow loss became (nan|inf) in epoch 1", capsys.readouterr().err)
    assert files(scratch["output"]).items() >= before.items()


def test_adapters_that_are_not_finite_are_not_saved(
    scratch: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def spoil(self: JointModel, name: str, entry: dict[str, float]) -> None:
        next(adapters(self.parts[name])).lora_B.data[:] = np.nan

    before = files(scratch["output"])
    monkeypatch.setattr(JointModel, "judge", spoil)
    assert command("train", "--mode flow_only", scratch) == 2
    assert "last good checkpoint is kept" in capsys.readouterr().err
    assert files(scratch["output"]).items() >= before.items()
    assert not list(scratch["output"].glob(".*"))


@pytest.fixture
def ctrl_c_after_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed = CheckpointKeeper.on_train_batch_end

    def press_ctrl_c(self: CheckpointKeeper, trainer, model, *step) -> None:
        signal.raise_signal(signal.SIGINT)
        noticed(self, trainer, model, *step)

    monkeypatch.setattr(CheckpointKeeper, "on_train_batch_end", press_ctrl_c)


def test_a_run_stopped_in_its_first_epoch_can_be_resumed_but_not_merged(
    scratch: dict[str, Path], ctrl_c_after_each_batch: None, capsys
) -> None:
    scratch = scratch | {"output": scratch["scratch"] / "first"}
    assert command("train", "--mode flow_only --set accumulate_grad_batches=1", scratch) == EXIT_INTERRUPTED
    assert not list(scratch["output"].glob("joint_flow_only_epoch*"))
    folders = [f"--{name}-dir {scratch[name]}" for name in ("model", "data", "output")]
    assert f"--mode flow_only --resume auto {' '.join(folders)} --device cpu\n" in capsys.readouterr().out
    assert command("merge", "", scratch) == 2
    told = f"--mode flow_only --resume {scratch['output'] / 'joint_flow_only_last.ckpt'}"
    assert "no epoch of" in (said := capsys.readouterr().err) and said.endswith(f"python train_joint.py {told}\n")


def test_a_new_run_stopped_in_its_first_epoch_leaves_the_old_one(
    scratch: dict[str, Path], ctrl_c_after_each_batch: None, capsys
) -> None:
    """It was perhaps a forgotten --resume."""
    before = files(scratch["output"])
    assert command("train", "--mode flow_only --set accumulate_grad_batches=1", scratch) == EXIT_INTERRUPTED
    left = files(scratch["output"])
    assert {path: left[path] for path in before} == before
    assert all("joint_logs" in path.parts for path in left.keys() - before.keys())
    assert "replace" in (said := capsys.readouterr()).out and "what was finished is kept" in said.err


def test_a_finished_run_resumed_into_another_folder_is_merged_there(scratch: dict[str, Path]) -> None:
    assert command("train", f"--mode flow_only --resume {FLOW_LAST} --output-dir {{scratch}}/other", scratch) == 0
    name = "flow_merged_flow_only.pt"
    assert (scratch["scratch"] / "other" / name).read_bytes() == (scratch["output"] / name).read_bytes()


def test_a_damaged_sidecar_is_written_anew(scratch: dict[str, Path]) -> None:
    sidecar = scratch["output"] / "voice_flow_only.json"
    sidecar.write_text('{"files"')
    assert command("merge", "", scratch) == 0
    assert read_sidecar(sidecar).files == {"flow": scratch["output"] / "flow_merged_flow_only.pt"}
