"""A model folder answers for its files, its generation and its settings."""

import shutil
from pathlib import Path

import pytest
import torch
from parity import V2

import config
from config import JOINT_TRAINING_CONFIG, PROJECT_DIR, find_model_dir, settings_for
from cosyvoice.model_folder.folder import ModelFolder, is_model_folder
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.frames import Rates
from utils import limit_threads

MINI = PROJECT_DIR / "pretrained_models" / "CosyVoice-mini"


def folder_with(path: Path, yaml: str) -> Path:
    path.mkdir()
    (path / "cosyvoice.yaml").write_text(yaml, encoding="utf-8")
    return path


def test_a_folder_names_its_files() -> None:
    folder = ModelFolder(MINI)
    files = [folder.yaml, folder.speech_tokenizer, folder.speaker_encoder, folder.stored_speakers]
    files += [folder.weights(part) for part in ("llm", "flow", "hift")]
    assert all(file.is_file() for file in files) and len(set(files)) == 7
    assert folder.generation.name == "CosyVoice-300M" and is_model_folder(MINI)


def test_settings_and_threads_travel_with_a_renamed_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "anna"
    copy.mkdir()
    for name in ("cosyvoice.yaml", "lexicon.txt.gz"):
        shutil.copy(MINI / name, copy)
    settings = settings_for(ModelFolder(copy))
    assert settings == settings_for(ModelFolder(MINI)) != JOINT_TRAINING_CONFIG
    assert settings["flow_lora"]["lora_r"] == 32 and settings["llm_lora"]["lora_r"] == 8
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    limit_threads(ModelFolder(copy))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    limit_threads(ModelFolder(copy))
    assert chosen == [1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    (copy / "cosyvoice.yaml").write_text("sample_rate: 22050\n")
    for processes in (1, 4, 32):
        limit_threads(ModelFolder(copy), processes)
    assert chosen == [1, 4, 1]


def test_a_folder_that_asks_for_nothing_gets_the_defaults(tmp_path: Path) -> None:
    folder = ModelFolder(folder_with(tmp_path / "CosyVoice-mini", "sample_rate: 22050\n"))
    assert settings_for(folder) == JOINT_TRAINING_CONFIG and folder.threads is None


@pytest.mark.parametrize(
    "entry, message",
    [
        ("finetuning: [1]", "finetuning holds .1.. Give settings of config.py by their names"),
        ("finetuning: {wings: 2}", "the finetuning entry of .*cosyvoice.yaml needs a change: wings is no setting"),
        ("finetuning: {bistream_ratio: 0.5}", "needs a change: bistream_ratio is no setting of this model"),
        ("finetuning: {llm_lora: 2}", "needs a change: llm_lora is no setting; llm_lora.lora_r is missing"),
        ("finetuning: {flow_lora: {lora_r: many}}", "flow_lora.lora_r must be a whole number at least 1"),
        ("finetuning: {learning_rate: {a: 1}}", "needs a change: learning_rate.a is no setting"),
    ],
)
def test_impossible_settings_of_a_folder_are_refused(entry: str, message: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", f"{entry}\n")
    with pytest.raises(InputError, match=message) as error:
        settings_for(ModelFolder(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["0", "true", "1.5", "many", "1025", "[1]"])
def test_impossible_threads_of_a_folder_are_refused(value: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", f"threads: {value}\n")
    with pytest.raises(InputError, match="threads is .*. Give a number from 1 to 1024"):
        limit_threads(ModelFolder(folder))


def test_folders_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no model folder .*; download CosyVoice-300M from https://"):
        ModelFolder(tmp_path / "nowhere")
    folder = folder_with(tmp_path / "model", "")
    (folder / "cosyvoice2.yaml").touch()
    with pytest.raises(InputError, match="model has cosyvoice.yaml and cosyvoice2.yaml. Remove the one"):
        ModelFolder(folder)
    (folder / "cosyvoice2.yaml").rename(folder / "cosyvoice3.yaml")
    with pytest.raises(InputError, match="model is a CosyVoice3 folder; use CosyVoice-300M or CosyVoice2-0.5B"):
        ModelFolder(folder)


def test_a_folder_of_cosyvoice2_answers_for_its_own(tmp_path: Path) -> None:
    shutil.copy(V2.folder / "tiny2.yaml", tmp_path / "cosyvoice2.yaml")
    folder = ModelFolder(tmp_path)
    assert folder.speech_tokenizer.name == "speech_tokenizer_v2.onnx" and folder.rates == Rates(24000, 480, 25)
    assert folder.parts(["qwen_pretrain_path"]) == {"qwen_pretrain_path": str(tmp_path / "CosyVoice-BlankEN")}
    settings = settings_for(folder)
    assert "q_proj" in settings["llm_lora"]["target_modules"] and settings["llm_lora"]["lora_r"] == 8
    assert settings["flow_lora"] == JOINT_TRAINING_CONFIG["flow_lora"]
    assert settings["bistream_ratio"] == 0.5 and "bistream_ratio" not in JOINT_TRAINING_CONFIG
    with (tmp_path / "cosyvoice2.yaml").open("a") as file:
        file.write("finetuning: {llm_lora: {lora_r: 4}}\n")
    settings = settings_for(ModelFolder(tmp_path))["llm_lora"]
    assert "q_proj" in settings["target_modules"] and settings["lora_r"] == 4, "both changes count"
    assert ModelFolder(MINI).rates == Rates(22050, 256, 50)


def test_of_several_models_the_one_in_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "PROJECT_DIR", tmp_path)
    second = tmp_path / "pretrained_models" / "CosyVoice2-0.5B"
    second.mkdir(parents=True)
    (second / "cosyvoice2.yaml").touch()
    assert find_model_dir(None).path == second and not capsys.readouterr().out
    first = folder_with(second.with_name("CosyVoice-300M"), "")
    assert find_model_dir(None).path == first
    assert capsys.readouterr().out == f"using {first}; --model-dir chooses CosyVoice2-0.5B instead\n"
    assert find_model_dir(second).path == second
