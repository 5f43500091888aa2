"""Code planted where data belong: whichever file of a command holds it, none is run, and one line names the file."""

import io
import pickle
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import ROOT, Job
from planted import Bomb
from recipe import write_config, write_corpus

from cosyvoice.model_folder.folder import ModelFolder

MINI = ROOT / "examples" / "mini"
TRAIN = "train_joint.py --model-dir model --data-dir data --output-dir output --device cpu"
MERGE = "merge_joint_weights.py --model-dir model --output-dir output"
SPEAK = "inference_joint.py --model-dir model --output-dir output --device cpu --text Hello."
PARQUET = "tools/make_parquet_list.py --src_dir corpus --des_dir corpus/parquet --num_processes 1"
RECIPE = "cosyvoice/bin/train.py --model llm --config config.yaml --train_data data.list --cv_data data.list"
RECIPE += " --tensorboard_dir logs --ddp.dist_backend gloo"
CHECKPOINT = "output/joint_joint_last.ckpt"
# What a command reads -> the command. Base weights of a trained voice are compared with those it was trained on first.
READ = [
    ("model/llm.pt", f"{TRAIN} --mode llm_only"),
    ("model/flow.pt", f"{TRAIN} --mode flow_only"),
    (CHECKPOINT, f"{TRAIN} --resume auto --epochs 9"),
    (CHECKPOINT, f"{TRAIN} --mode flow_only --init {CHECKPOINT}"),
    ("model/spk2info.pt", MERGE),
    ("output/spk2info.pt", MERGE),
    (CHECKPOINT, MERGE),
    (CHECKPOINT, f"{MERGE} --ckpt {CHECKPOINT}"),
    ("output/llm_merged_joint.pt", SPEAK),
    ("output/flow_merged_joint.pt", SPEAK),
    ("model/hift.pt", SPEAK),
    ("model/spk2info.pt", SPEAK),
    ("output/spk2info.pt", SPEAK),
    ("model/llm.pt", f"{SPEAK} --flow flow_of_unknown_origin.pt --embedding zero"),
    ("model/flow.pt", f"{SPEAK} --llm llm_of_unknown_origin.pt --embedding zero"),
    (CHECKPOINT, f"{SPEAK} --adapter {CHECKPOINT}"),
    ("vector.pt", f"{SPEAK} --embedding vector.pt"),
    ("vector.npy", f"{SPEAK} --embedding vector.npy"),
    ("corpus/utt2embedding.pt", PARQUET),
    ("corpus/spk2embedding.pt", PARQUET),
    ("corpus/utt2speech_token.pt", PARQUET),
    (
        "corpus/.utt2embedding.parts/part-00000.pt",
        "tools/extract_embedding.py --dir corpus --onnx_path model/campplus.onnx --num_thread 1",
    ),
    (
        "corpus/.utt2speech_token.parts/part-00000.pt",
        "tools/extract_speech_token.py --dir corpus --onnx_path model/speech_tokenizer_v1.onnx --num_thread 1",
    ),
    ("start.pt", f"{RECIPE} --model_dir new --checkpoint start.pt"),
    ("run/last.ckpt", f"{RECIPE} --model_dir run --resume auto"),
    ("run/epoch_0_whole.pt", "cosyvoice/bin/average_model.py --src_path run --dst_model llm.pt --num 1 --val_best"),
    ("model/llm.pt", "cosyvoice/bin/export_jit.py --model_dir model"),
    ("model/flow.pt", "cosyvoice/bin/export_onnx.py --model_dir model"),
    (
        "voices/train/spk2embedding.pt",
        f"examples/mini/make_model_dir.py --recipe {MINI} --work_dir . --voices anna --model_dir made",
    ),
]
FORMS = ("pickle", "archive", "old archive")


@pytest.fixture(scope="module")
def places(finished: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file of every kind."""
    folder = tmp_path_factory.mktemp("planted")
    finished.copy(folder)
    (folder / "model").unlink()
    shutil.copytree(finished.folder / "model", folder / "model")
    torch.save({"anna": {"embedding": torch.ones(1, 192)}}, folder / "model" / "spk2info.pt")
    for part in ("llm", "flow"):
        shutil.copy(folder / f"output/{part}_merged_joint.pt", folder / f"{part}_of_unknown_origin.pt")
    wav = sorted((folder / "raw").glob("*.wav"))[0].resolve()
    for name, content in (("wav.scp", wav), ("text", "Hello."), ("utt2spk", "anna"), ("spk2utt", "u1")):
        (folder / "corpus").mkdir(exist_ok=True)
        (folder / "corpus" / name).write_text(f"{'anna' if name == 'spk2utt' else 'u1'} {content}\n")
    for name in ("utt2embedding", "spk2embedding", "utt2speech_token"):
        torch.save({"u1": [1.0] * 192, "anna": [1.0] * 192}, folder / "corpus" / f"{name}.pt")
    write_corpus(folder)
    write_config(folder)
    (folder / "run").mkdir()
    (folder / "run" / "epoch_0_whole.yaml").write_text("epoch: 0\nloss_dict: {loss: 1.0}\n")
    mini, recipe = runpy.run_path(str(MINI / "make_model_dir.py")), ModelFolder(MINI)
    results = [*mini["WEIGHTS"].values(), recipe.speaker_encoder.name, recipe.speech_tokenizer.name, mini["LEXICON"]]
    for result in results:
        (folder / result).parent.mkdir(parents=True, exist_ok=True)
        (folder / result).touch()
    return folder


def planted(form: str, name: str, mark: Path) -> bytes:
    """The content of a file that makes the folder `mark` where its code is run."""
    content, bomb = io.BytesIO(), Bomb(mark)
    if form == "pickle":
        pickle.dump(bomb, content, protocol=2)
    elif name.endswith(".npy"):
        np.save(content, np.array([bomb] * 192), allow_pickle=True)
    else:
        inside = {"anna": {"embedding": bomb}, "voice": bomb, "state_dict": {"weight": bomb}}
        torch.save(inside, content, _use_new_zipfile_serialization=form == "archive")
    return content.getvalue()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "command"), READ, ids=[f"{command.split()[0]} {name}" for name, command in READ])
def test_no_planted_code_is_run(
    places: Path,
    name: str,
    command: str,
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path, mark, (script, *options) = places / name, tmp_path / "ran", command.split()
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(planted(form, name, mark))
    monkeypatch.chdir(places)
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    errors = capfd.readouterr().err.splitlines()
    assert not mark.exists()
    assert left.value.code == 2 and len(errors) == 1, errors
    assert errors[0].startswith(f"{Path(script).name}: ") and Path(name).name in errors[0], errors
    assert name.endswith(".npy") or re.search("is refused: it wants to load .*mkdir, .* it was not run; ", errors[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llm.pt", "vector.npy"])
def test_what_is_planted_is_run_by_whatever_runs_code(form: str, name: str, tmp_path: Path) -> None:
    content, mark = io.BytesIO(planted(form, name, tmp_path / "ran")), tmp_path / "ran"
    if name == "vector.npy":
        np.load(content, allow_pickle=True)
    elif form == "pickle":
        pickle.load(content)
    else:
        torch.load(content, weights_only=False)
    assert mark.is_dir()
