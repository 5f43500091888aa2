"""The shell scripts of the recipes: what each stage is told, and CosyVoice2's from a corpus to a voice that speaks."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from recipe import copy_of_the_project, write_config
from torch import Tensor

from cosyvoice.bin import train
from cosyvoice.cli.cosyvoice import AutoModel
from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import save_tensors
from tools import extract_speech_token, make_parquet_list
from tools.kaldi_folder import read_table, write_tables
from tools.random_model import make_random_model

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "libritts"
RECORDINGS = ROOT / "examples" / "raw_audio"
TRAIN_SETS = ("train-clean-100", "train-clean-360", "train-other-500")
DEV_SETS = ("dev-clean", "dev-other")
# Where a stage calls Python or torchrun, this writes down its words.
RECORDER = """#!/bin/sh
if [ "$1" = -c ]; then echo "$GPUS"; else echo "${0##*/} $*" >>"$CALLS"; fi
"""


def load_prepare_reject_sample() -> Callable[[list[str]], None]:
    script = RECIPES / "cosyvoice2" / "local" / "prepare_reject_sample.py"
    spec = importlib.util.spec_from_file_location("prepare_reject_sample", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module.main


prepare_reject_sample = load_prepare_reject_sample()


def run(script: Path, **settings: str) -> subprocess.CompletedProcess:
    path = f"{settings.pop('path', '')}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": os.environ.get("HOME", ""), "OMP_NUM_THREADS": "1", **settings}
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)


# What the stages are told


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs stages with a Python that only writes down how it was called."""
    recipes, programs = copy_of_the_project(tmp_path / "project"), tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "torchrun"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    model = tmp_path / "model"
    model.mkdir()
    (model / "hift.pt").touch()

    def run_stages(script: str, gpus: int = 0, **settings: str) -> list[str]:
        calls = tmp_path / "calls"
        calls.write_text("")
        for x in (*TRAIN_SETS, *DEV_SETS):
            for folder in (x, f"{x}_reject"):
                listed = recipes / Path(script).parent / "data" / folder / "parquet" / "data.list"
                listed.parent.mkdir(parents=True, exist_ok=True)
                listed.write_text(f"{folder}.tar\n")
        given = {"CALLS": str(calls), "GPUS": str(gpus), "pretrained_model_dir": str(model), "num_jobs": "1"}
        result = run(recipes / script, path=f"{programs}{os.pathsep}", **given | settings)
        assert result.returncode == 0, result.stderr
        return calls.read_text().splitlines()

    return run_stages


def options(call: str) -> dict[str, str]:
    """Return the options of a call by name; those without a value have none."""
    words = call.split()
    following = dict(zip(words, [*words[1:], ""], strict=True))
    return {word: "" if value.startswith("--") else value for word, value in following.items() if word[:2] == "--"}


@pytest.mark.parametrize(("recipe", "version"), [("cosyvoice", "v1"), ("cosyvoice2", "v2")])
def test_preparation_is_told_of_every_set(told: Callable[..., list[str]], recipe: str, version: str) -> None:
    calls = told(f"{recipe}/run.sh", stage="0", stop_stage="3")
    sets = [*TRAIN_SETS, *DEV_SETS, "test-clean", "test-other"]
    scripts = ["local/prepare_data.py", "tools/extract_embedding.py", "tools/extract_speech_token.py"]
    assert [call.split()[1] for call in calls] == [
        script for script in (*scripts, "tools/make_parquet_list.py") for _ in sets
    ]
    tokens = [options(call) for call in calls if "extract_speech_token" in call]
    assert [found["--dir"] for found in tokens] == [f"data/{x}" for x in sets]
    assert {Path(found["--onnx_path"]).name for found in tokens} == {f"speech_tokenizer_{version}.onnx"}
    for call in calls:
        assert (RECIPES / recipe / call.split()[1]).is_file()


def test_training_is_told_of_the_text_model_and_of_the_vocoders_file(told: Callable[..., list[str]]) -> None:
    calls = told("cosyvoice2/run.sh", stage="5", stop_stage="6")
    trained, averaged = calls[:3], [options(call) for call in calls[3:]]
    for call, model in zip(trained, ("llm", "flow", "hifigan"), strict=True):
        args = train.parse(call.split()[2:])
        assert (args.model, args.train_engine, args.dist_backend, args.dpo) == (model, "torch_ddp", "gloo", False)
        assert args.qwen_pretrain_path.name == "CosyVoice-BlankEN"
        assert args.checkpoint.name == {"hifigan": "hift.pt"}.get(model, f"{model}.pt")
        assert args.model_dir.parts[-4:] == ("exp", "cosyvoice2", model, "torch_ddp")
        assert Path(averaged[len(averaged) and ("llm", "flow", "hifigan").index(model)]["--src_path"]) == args.model_dir
    v1 = train.parse(told("cosyvoice/run.sh", stage="5", stop_stage="5")[0].split()[2:])
    assert v1.qwen_pretrain_path is None and v1.model_dir.parts[-3:] == ("cosyvoice", "llm", "torch_ddp")


def test_training_on_several_gpus_with_deepspeed(told: Callable[..., list[str]]) -> None:
    given = {"stage": "5", "stop_stage": "5", "models": "llm flow", "train_engine": "deepspeed", "from_scratch": "true"}
    for recipe in ("cosyvoice", "cosyvoice2"):
        for call, model in zip(told(f"{recipe}/run.sh", gpus=2, **given), ("llm", "flow"), strict=True):
            program, *words = call.split()
            start = words.index("cosyvoice/bin/train.py")
            assert program == "torchrun" and words[:start] == ["--standalone", "--nproc_per_node=2"]
            args = train.parse(words[start + 1 :])
            assert (args.model, args.train_engine, args.dist_backend) == (model, "deepspeed", "nccl")
            assert args.use_amp and args.pin_memory and args.checkpoint is None
            asked = json.loads((RECIPES / recipe / args.deepspeed_config).read_text())
            assert not asked.keys() & {"optimizer", "scheduler"}  # those of train_conf count


def test_several_machines_share_the_work(told: Callable[..., list[str]]) -> None:
    for engine in ({}, {"engine": "ray"}):
        calls = told("cosyvoice/run.sh", stage="1", stop_stage="3", **engine)
        assert {options(call)["--engine"] for call in calls} == {engine.get("engine", "pool")}
    meet = "--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=first:29500"
    given = {"stage": "5", "stop_stage": "5", "models": "llm", "torchrun_options": meet}
    (call,) = told("cosyvoice/run.sh", gpus=4, **given)
    assert call.startswith(f"torchrun {meet} --nproc_per_node=4 cosyvoice/bin/train.py ")


def test_rejected_samples_are_made_of_every_set_that_is_trained_on(told: Callable[..., list[str]]) -> None:
    calls = told("cosyvoice2/run_dpo.sh", stage="3", stop_stage="6")
    for x in (*TRAIN_SETS, *DEV_SETS):
        spoken, tokens, parquet, *calls = calls
        assert options(spoken).items() >= {"--src_dir": f"data/{x}", "--des_dir": f"data/{x}_reject"}.items()
        assert tokens.startswith(f"python tools/extract_speech_token.py --dir data/{x}_reject ")
        found = options(parquet)
        assert (found["--src_dir"], found["--des_dir"], found["--dpo"]) == (f"data/{x}", f"data/{x}_reject/parquet", "")
    trained, averaged = calls
    args = train.parse(trained.split()[2:])
    assert (args.model, args.dpo, args.ref_model.name, args.checkpoint.name) == ("llm", True, "llm.pt", "llm.pt")
    assert (args.train_data.name, args.cv_data.name) == ("train_reject.data.list", "dev_reject.data.list")
    assert args.model_dir.parts[-3:] == ("cosyvoice2_dpo", "llm", "torch_ddp")
    assert Path(options(averaged)["--src_path"]) == args.model_dir


def test_missing_lists_and_sets_are_named(tmp_path: Path) -> None:
    recipes = copy_of_the_project(tmp_path / "project")
    for script in ("cosyvoice/run.sh", "cosyvoice2/run.sh", "cosyvoice2/run_dpo.sh"):
        result = run(recipes / script, stage="5", stop_stage="5")
        assert result.returncode == 2 and "parquet/data.list does not exist; run stage 3 first" in result.stderr
    result = run(recipes / "cosyvoice2" / "run.sh", stage="5", stop_stage="5", train_sets="")
    assert result.returncode == 2 and "name some in train_sets and dev_sets" in result.stderr


# CosyVoice2's from a corpus to a voice


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(make_random_model(tmp_path_factory.mktemp("model2"), 1, "small2"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, model: ModelFolder) -> tuple[Path, dict[str, str]]:
    """The recipes with a corpus of a minute, and the settings that they run on it with."""
    folder = tmp_path_factory.mktemp("minute")
    for number in range(1, 16):
        samples, rate = soundfile.read(RECORDINGS / f"{number:03d}.wav")
        wav = folder / "corpus" / ("train" if number < 13 else "dev") / f"{number % 2}_{number}.wav"
        wav.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(wav, samples[: 4 * rate], rate)
        shutil.copy(RECORDINGS / f"{number:03d}.txt", wav.with_suffix(".normalized.txt"))
    config = write_config(folder, "small2.yaml", model.yaml, max_frames_in_batch=600, truncate_length=4800, max_epoch=1)
    settings = {"corpus_dir": str(folder / "corpus"), "train_sets": "train", "dev_sets": "dev", "test_sets": ""}
    settings |= {"pretrained_model_dir": str(model.path), "config": str(config), "average_num": "1", "num_jobs": "2"}
    return copy_of_the_project(folder / "project") / "cosyvoice2", settings | {"CUDA_VISIBLE_DEVICES": ""}


def rows(parquet: Path) -> list[dict]:
    return [row for file in sorted(parquet.glob("*.tar")) for row in pq.read_table(file).to_pylist()]


def test_cosyvoice2_from_a_corpus_to_a_voice_and_its_preferences(
    project: tuple[Path, dict[str, str]], model: ModelFolder
) -> None:
    recipe, settings = project
    result = run(recipe / "run.sh", stage="0", stop_stage="7", **settings)
    assert result.returncode == 0, result.stderr
    found = rows(recipe / "data" / "train" / "parquet")
    assert len(found) == 12 and "reject_speech_token" not in found[0]
    assert all(abs(len(row["speech_token"]) - 25 * len(soundfile.read(row["wav"])[0]) / 16000) <= 1 for row in found)
    assert (model.path / "flow.encoder.fp32.zip").is_file() and not list(model.path.glob("llm.*.zip"))
    assert (model.path / "flow.decoder.estimator.fp32.onnx").is_file()

    trained = {part: recipe / "exp" / "cosyvoice2" / part / "torch_ddp" for part in ("llm", "flow", "hifigan")}
    weights = {part: trained[part] / f"{part}.pt" for part in ("llm", "flow")}
    voice = AutoModel(model.path, device="cpu", weights=weights | {"hift": trained["hifigan"] / "hift.pt"})
    prompt = str(RECORDINGS / "001.wav")
    (spoken,) = voice.inference_cross_lingual("Hello there.", prompt)
    assert spoken["tts_speech"].isfinite().all()

    result = run(recipe / "run_dpo.sh", stage="3", stop_stage="6", **settings)
    assert result.returncode == 0, result.stderr
    pairs = rows(recipe / "data" / "train_reject" / "parquet")
    assert [row["utt"] for row in pairs] == [row["utt"] for row in found]
    assert all(len(row["reject_speech_token"]) and row["reject_speech_token"] != row["speech_token"] for row in pairs)
    assert [row["speech_token"] for row in pairs] == [row["speech_token"] for row in found]
    assert (recipe / "exp" / "cosyvoice2_dpo" / "llm" / "torch_ddp" / "llm.pt").is_file()


# Rejected samples


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A Kaldi-style folder of four utterances of two speakers, with the tokens and vectors of stages 1 and 2."""
    folder, utts = tmp_path / "train", ("a1", "a2", "a3", "b1")
    wavs = {utt: str(tmp_path / f"{utt}.wav") for utt in utts}
    for number, wav in enumerate(wavs.values(), start=1):
        samples, rate = soundfile.read(RECORDINGS / f"{number:03d}.wav")
        soundfile.write(wav, samples[rate : 2 * rate], rate)
    texts = dict(zip(utts, ("good morning", "long day", "people find the way", "some more"), strict=True))
    write_tables(wavs, texts, {utt: utt[0] for utt in utts}, folder)
    save_tensors({utt: list(range(25)) for utt in utts}, folder / "utt2speech_token.pt")
    save_tensors({utt: [1.0] * 192 for utt in utts}, folder / "utt2embedding.pt")
    save_tensors({spk: [1.0] * 192 for spk in "ab"}, folder / "spk2embedding.pt")
    return folder


def reject(data: Path, model: ModelFolder, *given: str) -> Path:
    folder = data.with_name("train_reject")
    prepare_reject_sample(["--src_dir", str(data), "--des_dir", str(folder), "--ref_model", str(model.path), *given])
    return folder


def test_a_rejected_sample_of_no_tokens_is_named_and_the_rest_goes_on(
    data: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, inference = AutoModel(model.path, device="cpu").frontend.encode("people find the way"), Qwen2LM.inference

    def write(llm: Qwen2LM, text: Tensor, *others: Tensor, **limits: float) -> object:
        return iter(()) if text[0].tolist() == silent else inference(llm, text, *others, **limits)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2LM, "inference", write)
        folder = reject(data, model)
    assert read_table(folder / "prepare_reject_sample.failed").keys() == {"a3"}
    assert "no speech tokens" in read_table(folder / "prepare_reject_sample.failed")["a3"]
    assert list(read_table(folder / "wav.scp")) == ["a1", "a2", "b1"]
    tokens = ["--dir", str(folder), "--onnx_path", str(model.speech_tokenizer), "--num_thread", "1"]
    extract_speech_token.main(tokens)
    parquet = ["--src_dir", str(data), "--des_dir", str(folder / "parquet"), "--dpo"]
    make_parquet_list.main(parquet)
    assert [row["utt"] for row in rows(folder / "parquet")] == ["a1", "a2", "b1"]
    assert read_table(folder / "make_parquet_list.failed") == {"a3": "it has no reject_speech_token"}

    reject(data, model)  # the model has found its tongue
    extract_speech_token.main(tokens)
    make_parquet_list.main(parquet)
    assert [row["utt"] for row in rows(folder / "parquet")] == ["a1", "a2", "a3", "b1"]
    assert not (data / "make_parquet_list.failed").exists()


def test_samples_that_are_there_are_not_spoken_again(
    data: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is spoken beside a sample nor how often matters to it."""
    spoken, inference = [], Qwen2LM.inference

    def count(llm: Qwen2LM, text: Tensor, *others: Tensor, **limits: float) -> object:
        spoken.append(text)
        return inference(llm, text, *others, **limits)

    monkeypatch.setattr(Qwen2LM, "inference", count)
    folder = reject(data, model)
    before = {path.name: path.read_bytes() for path in (folder / "wavs").glob("*.wav")}
    assert len(before) == len(spoken) == 4
    reject(data, model)
    assert len(spoken) == 4
    (folder / "wavs" / "a2.wav").unlink()
    reject(data, model)
    assert len(spoken) == 5
    assert {path.name: path.read_bytes() for path in (folder / "wavs").glob("*.wav")} == before
    reject(data, model, "--seed", "7")
    assert len(spoken) == 9
    assert (folder / "wavs" / "a2.wav").read_bytes() != before["a2.wav"]


def test_mistakes_of_rejected_samples(data: Path, model: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no model folder"):
        prepare_reject_sample(["--src_dir", str(data), "--des_dir", str(tmp_path), "--ref_model", "nowhere"])
    half = shutil.copytree(model.path, tmp_path / "half")
    (half / "flow.pt").unlink()
    with pytest.raises(InputError, match="flow.pt does not exist. Give a whole model folder"):
        reject(data, ModelFolder(half))
    parquet = ["--src_dir", str(data), "--des_dir", str(tmp_path / "parquet"), "--dpo"]
    with pytest.raises(InputError, match="train_reject/utt2speech_token.pt does not exist; run the stage before"):
        make_parquet_list.main(parquet)


def test_an_option_that_is_missing_is_asked_for(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    with pytest.raises(SystemExit) as left:
        extract_speech_token.main(["--dir", str(data)])
    assert left.value.code == 2 and "--onnx_path" in capsys.readouterr().err


# DeepSpeed


def test_deepspeed_is_told_what_the_recipe_says(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning as pl

    given: dict[str, object] = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    config = RECIPES / "cosyvoice2" / "conf" / "ds_stage2.json"
    words = ["--model", "llm", "--config", str(model.yaml), "--train_data", "t", "--cv_data", "c", "--model_dir", "m"]
    args = train.parse([*words, "--train_engine", "deepspeed", "--deepspeed_config", str(config)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="deepspeed trains on GPUs"):
        train.check_engine(args)
    monkeypatch.setattr("cosyvoice.runtime.device.cuda_problem", lambda: "")
    train.check_engine(args)
    for wrong, message in (({"model": "hifigan"}, "two optimisers"), ({"deepspeed_config": Path("x")}, "not exist")):
        with pytest.raises(InputError, match=message):
            train.check_engine(type(args)(**vars(args) | wrong))

    monkeypatch.setattr(pl, "Trainer", lambda **options: given.update(options))
    monkeypatch.setattr("pytorch_lightning.strategies.DeepSpeedStrategy", lambda config: ("deepspeed", config))
    train.build_trainer(args, train.own_or_common(args, train.read_recipe(args), "train_conf"), [pl.Callback()])
    assert given["strategy"] == ("deepspeed", str(config))
    assert given["gradient_clip_val"] == 5 and given["accumulate_grad_batches"] == 2
    assert given["plugins"] is None  # it writes its own checkpoints
