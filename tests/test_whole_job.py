"""All four commands one after another on real recordings, as a user runs them."""

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import inference_joint
import merge_joint_weights
import prepare_joint_data
import train_joint
from config import JOINT_TRAINING_CONFIG
from cosyvoice.model_folder import model_yaml
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_part, read_state_dict
from lora import inject, load_adapters, merged
from tools.random_model import make_random_model
from voices.run import read_run

RECORDINGS = Path(__file__).parents[1] / "examples" / "raw_audio"
CPU = ["--device", "cpu"]


def whole_job(folder: Path, size: str, clips: int, finetuning: dict[str, int | float]) -> dict:
    """Run the commands in `folder`, with a base model that asks for these settings.

    Returns the `model` and `output` folders, and the options `into` that name both.
    """
    model, data, output, recordings = (folder / name for name in ("anna", "data", "output", "raw_audio"))
    make_random_model(model, seed=7, size=size)
    with (model / "cosyvoice.yaml").open("a", encoding="utf-8") as file:
        file.write("finetuning:\n" + "".join(f"    {name}: {value}\n" for name, value in finetuning.items()))
    recordings.mkdir()
    for number in range(1, clips + 1):
        for suffix in ("wav", "txt"):
            shutil.copy(RECORDINGS / f"{number:03d}.{suffix}", recordings)
    into = ["--model-dir", str(model), "--output-dir", str(output)]
    prepare = ["--model-dir", str(model), "--data-dir", str(data), "--input-dir", str(recordings)]
    run(prepare_joint_data, prepare)
    run(train_joint, [*into, "--data-dir", str(data), *CPU])
    settings = read_run(output / "joint_joint_last.ckpt").config
    assert settings == JOINT_TRAINING_CONFIG | finetuning, "the folder's settings are those of training"
    first = (output / "llm_merged_joint.pt").read_bytes()
    run(merge_joint_weights, into)
    assert (output / "llm_merged_joint.pt").read_bytes() == first, "merging twice gave another file"
    run(inference_joint, [*into, *CPU, "--text", "Two words."])
    return {"into": into, "output": output, "model": model}


def run(command: ModuleType, options: list[str]) -> None:
    """Run a command. It reads the model's YAML once, or never where it only merges."""
    load, reads = model_yaml.yaml.load, []

    def noted(text: str, Loader: type) -> Any:
        reads.append(Loader is model_yaml._Loader)
        return load(text, Loader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_yaml.yaml, "load", noted)
        assert command.main(options) == 0
    assert sum(reads) == (command is not merge_joint_weights), "the model's YAML is read once"


def assert_speech(path: Path) -> np.ndarray:
    audio, rate = soundfile.read(path)
    assert rate == 22050 and audio.ndim == 1 and len(audio) % 256 == 0
    assert np.isfinite(audio).all() and np.abs(audio).max() > 1e-3
    return audio


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict:
    finetuning = {"max_epochs": 1, "accumulate_grad_batches": 2, "learning_rate": 0.01}
    return whole_job(tmp_path_factory.mktemp("job"), "small", 8, finetuning)


def test_whole_job_speaks(job: dict) -> None:
    assert_speech(job["output"] / "result.wav")


def test_adapters_beside_the_base_speak_as_merged_ones(job: dict, tmp_path: Path) -> None:
    adapter = ["--adapter", str(job["output"] / "joint_joint_last.ckpt"), "--output", str(tmp_path / "adapted.wav")]
    assert inference_joint.main([*job["into"], *CPU, *adapter, "--text", "Two words."]) == 0
    adapted, merged_voice = assert_speech(tmp_path / "adapted.wav"), assert_speech(job["output"] / "result.wav")
    assert len(adapted) == len(merged_voice)
    assert np.abs(adapted - merged_voice).max() < 5e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-3)])
@torch.no_grad()
def test_merged_output_equals_base_and_adapter(job: dict, dtype: torch.dtype, tolerance: float) -> None:
    run = read_run(job["output"] / "joint_joint_last.ckpt")
    lora = run.config["flow_lora"]
    base = {name: tensor.to(dtype) for name, tensor in read_state_dict(job["model"] / "flow.pt").items()}
    adapted, merged_part = (load_part(ModelFolder(job["model"]), "flow") for _ in range(2))
    adapted.load_state_dict(base)
    inject(adapted, lora["target_modules"], lora["lora_r"], lora["lora_alpha"], dropout=0.0)
    load_adapters(adapted, run.adapters["flow"])
    result = merged(base, run.adapters["flow"], run.scale("flow"))
    assert all(tensor.dtype == dtype for tensor in result.values())
    merged_part.load_state_dict(result)
    torch.manual_seed(0)
    tokens, length = torch.randint(0, 4096, (1, 50)), torch.tensor([50])
    ours, expected = (part.encoder(part.input_embedding(tokens), length)[0] for part in (merged_part, adapted.eval()))
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


@pytest.mark.full_size
def test_whole_job_at_full_size(tmp_path: Path) -> None:
    """Two training steps, a merge and a sentence at the sizes of CosyVoice-300M."""
    finetuning = {"max_epochs": 1, "accumulate_grad_batches": 1, "max_feat_len": 100}
    job = whole_job(tmp_path, "300m", 2, finetuning)
    assert_speech(job["output"] / "result.wav")
