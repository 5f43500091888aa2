"""examples/sft: from a few clips to a fine-tuned model that was heard, for both generations, and bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from recipe import SHARED_SHELL

from cosyvoice.cli.frontend import read_spk2info
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_part
from tools.kaldi_folder import read_numbers, read_table
from tools.random_model import make_random_model

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "sft"
RECORDINGS = ROOT / "examples" / "raw_audio"
TRAINED, HELD_OUT = ("1_1", "1_2", "1_3"), ("2_4",)


def write_clips(corpus: Path) -> Path:
    """1.2 s of four recordings, as the document has them; a text without recording and a recording without text."""
    for folder, names in {"train": TRAINED, "test": HELD_OUT}.items():
        (corpus / folder).mkdir(parents=True)
        for name in names:
            number = int(name[-1])
            samples, rate = soundfile.read(RECORDINGS / f"{number:03d}.wav")
            soundfile.write(corpus / folder / f"{name}.wav", samples[rate : rate + int(1.2 * rate)], rate)
            (corpus / folder / f"{name}.normalized.txt").write_text("Go on.\n")
    (corpus / "train" / "1_8.normalized.txt").write_text("Who said this?\n")
    shutil.copy(corpus / "train" / "1_1.wav", corpus / "train" / "1_9.wav")
    return corpus


def copy_of_the_recipe(project: Path) -> Path:
    """A project folder of links, so that the recipe's results do not land in the repository."""
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("tools", "cosyvoice", "matcha", "clips", "voices"))]:
        (project / path.name).symlink_to(path)
    (project / "examples").mkdir()
    for name in (*SHARED_SHELL, "libritts"):
        (project / "examples" / name).symlink_to(ROOT / "examples" / name)
    ignored = shutil.ignore_patterns("data", "exp", "tensorboard")
    return Path(shutil.copytree(RECIPE, project / "examples" / "sft", symlinks=True, ignore=ignored))


class Project:
    def __init__(self, folder: Path, size: str) -> None:
        self.recipe = copy_of_the_recipe(folder)
        self.corpus = write_clips(folder / "ann")
        self.model_dir = make_random_model(folder / "model", seed=1, size=size)
        settings = (RECIPE / "conf" / "train.yaml").read_text()
        (folder / "train.yaml").write_text(settings.replace("max_epoch: 10", "max_epoch: 1"))
        (folder / "texts.txt").write_text("Hello.\n")
        (folder / "hidden").mkdir()
        (folder / "hidden" / "ctranslate2.py").write_text("raise ImportError('it is not installed')\n")
        self.variables = {
            "data_dir": str(self.corpus),
            "pretrained_model_dir": str(self.model_dir),
            "settings": str(folder / "train.yaml"),
            "texts": str(folder / "texts.txt"),
            "num_jobs": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder / "hidden"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, **changes: str) -> subprocess.CompletedProcess:
        command = ["bash", str(self.recipe / "run.sh")]
        return subprocess.run(command, env=self.variables | changes, capture_output=True, text=True)


@pytest.mark.parametrize("size", ["small", "small2"])
def test_stages_0_to_5(size: str, tmp_path: Path) -> None:
    project = Project(tmp_path, size)
    result = project.run(stop_stage="5")
    assert result.returncode == 0, result.stderr
    data, results = project.recipe / "data", project.recipe / "exp" / "ann"
    failed = read_table(data / "train" / "prepare_data.failed")
    assert failed.keys() == {"1_8", "1_9"} and "has no recording 1_8.wav" in failed["1_8"]
    assert read_table(data / "train" / "spk2utt") == {"ann": "1_1 1_2 1_3"}
    assert read_table(data / "test" / "spk2utt") == {"ann": "2_4"}

    vector = read_spk2info(results / "spk2info.pt")["ann"]["embedding"]
    mean = torch.tensor([read_numbers(data / "train" / "spk2embedding.pt")["ann"]])
    torch.testing.assert_close(vector, torch.nn.functional.normalize(mean))

    assert "samples are not judged" in result.stderr
    folder = ModelFolder(project.model_dir)
    for part, versions in {"llm": ["llm"], "flow": ["flow", "llm_flow"]}.items():
        load_part(folder, part, results / f"{part}.pt")  # it fits
        samples = results / part / "torch_ddp" / "samples" / "epoch_0000"
        rows = json.loads((samples / "samples.json").read_text())
        names = [f"{version}_{number}.wav" for version in versions for number in ("01", "02")]
        assert [row["file"] for row in rows] == ["reference.wav", *names]
        assert rows[2]["text"] == rows[0]["text"] == "Go on."
        for row in rows:
            speech, rate_hz = soundfile.read(samples / row["file"])
            assert rate_hz == folder.rates.sample_rate and (speech != 0).any()
            assert row["seconds"] == pytest.approx(len(speech) / rate_hz)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    project = Project(tmp_path, "small2")
    shutil.rmtree(project.corpus / "test")
    (project.corpus / "test").mkdir()
    for changes, message in [
        ({"stop_stage": "0"}, "test holds no recording"),
        ({"data_dir": ""}, "set data_dir to the folder that holds train/ and test/"),
        ({"speaker": "ann lee"}, "'ann lee' cannot be a speaker's name"),
        ({"pretrained_model_dir": str(tmp_path)}, "cosyvoice.yaml does not exist"),
        ({"stage": "5", "stop_stage": "5"}, "data/train/parquet/data.list does not exist; run stage 3 first"),
    ]:
        result = project.run(**changes)
        *others, last = result.stderr.splitlines()
        assert result.returncode == 2 and message in last
        assert len(others) == (changes == {"stop_stage": "0"}), others  # which tells of the training set's failures
