"""A user's mistake with a CosyVoice2 folder: one line that says what to do, exit code 2, and no file touched."""

import os
import re
import shutil
from pathlib import Path

import pytest
from test_bad_input import command, say, tone

from tools.random_model import make_random_model

CLIPS = 8
TEXT_MODEL = "CosyVoice-BlankEN"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each generation, on the same recordings, and CosyVoice2 folders that are not good.

    Places of CosyVoice-300M are called `model1`, `data1` and `output1`.
    """
    root = tmp_path_factory.mktemp("places")
    names = ("raw", "data", "output", "data1", "output1")
    places = {"root": root} | {name: root / name for name in names}
    places["raw"].mkdir()
    for number in range(CLIPS):
        say(places["raw"], f"{number:03d}.wav", tone(200 + 20 * number))
    places["model"] = make_random_model(root / "model", seed=5, size="small2")
    places["model1"] = make_random_model(root / "model1", seed=5)
    for number in ("1", ""):
        own = places | {name: places[f"{name}{number}"] for name in ("model", "data", "output")}
        assert command("prepare", "", own) == 0
        assert command("train", "--mode llm_only", own) == 0
    return places | model_variants(places["model"], root)


def model_variants(model: Path, root: Path) -> dict[str, Path]:
    """Copies of the model folder with one file replaced, or taken away (None)."""
    vocabulary = (model / TEXT_MODEL / "vocab.json").read_bytes()
    replaced = {
        "no_text_model": (TEXT_MODEL, None),
        "no_config": (f"{TEXT_MODEL}/config.json", None),
        "cut_config": (f"{TEXT_MODEL}/config.json", b'{"model_type": "qwen2"'),
        "other_sizes": (
            f"{TEXT_MODEL}/config.json",
            (model / TEXT_MODEL / "config.json").read_bytes().replace(b"64", b"32"),
        ),
        "no_merges": (f"{TEXT_MODEL}/merges.txt", None),
        "cut_vocab": (f"{TEXT_MODEL}/vocab.json", vocabulary[:2000]),
        "other_vocab": (f"{TEXT_MODEL}/vocab.json", vocabulary.replace(b'"!": 0', b'"!": 1000')),
        "both_yamls": ("cosyvoice.yaml", b"sample_rate: 22050\n"),
        "third": ("cosyvoice3.yaml", b"sample_rate: 24000\n"),
        "first_llm": ("llm.pt", (root / "model1" / "llm.pt").read_bytes()),
        "no_tokenizer": ("speech_tokenizer_v2.onnx", None),
    }
    variants = {}
    for variant, (name, content) in replaced.items():
        folder = variants[variant] = root / variant
        shutil.copytree(model, folder, copy_function=os.link)
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    (variants["third"] / "cosyvoice2.yaml").unlink()
    return variants


MISTAKES = {
    (
        "prepare",
        "--model-dir {no_text_model}",
    ): "CosyVoice-BlankEN/vocab.json does not exist, and the model needs it; copy",
    (
        "train",
        "--model-dir {no_text_model}",
    ): "CosyVoice-BlankEN/vocab.json does not exist; copy it from the CosyVoice2-0.5B",
    ("prepare", "--model-dir {cut_vocab}"): "vocab.json cannot be read: .*; copy the folder CosyVoice-BlankEN again",
    ("prepare", "--model-dir {other_vocab}"): "vocab.json: the ids are not those from 0 to .*; copy the folder",
    ("prepare", "--model-dir {no_merges}"): "merges.txt does not exist, and the model needs it; copy the folder",
    ("train", "--model-dir {no_merges}"): "merges.txt does not exist; copy it from the CosyVoice2-0.5B download",
    (
        "train",
        "--model-dir {cut_vocab}",
    ): "were prepared with another model than .*cut_vocab; run prepare_joint_data.py",
    ("train", "--model-dir {no_config}"): "config.json does not exist, and the model needs it; copy the folder",
    ("train", "--model-dir {cut_config}"): "config.json cannot be read: .*; copy the folder CosyVoice-BlankEN again",
    ("train", "--model-dir {other_sizes}"): "must be the hidden_size of its Qwen2 model, 32",
    (
        "train",
        "--model-dir {first_llm}",
    ): "llm.pt does not fit this model: .* Likely cause: it belongs to another model; use CosyVoice2",
    ("prepare", "--model-dir {no_tokenizer}"): "speech_tokenizer_v2.onnx does not exist. Copy it",
    ("train", "--set bistream_ratio=2"): "bistream_ratio must be a number at least 0 and at most 1, not 2",
    (
        "train",
        "--model-dir {model1} --data-dir {data1} --set bistream_ratio=0.5",
    ): "bistream_ratio is no setting of this",
    # data of the other generation
    (
        "train",
        "--data-dir {data1}",
    ): "data1 were prepared with another model than .*model; run prepare_joint_data.py again",
    (
        "train",
        "--model-dir {model1}",
    ): "data were prepared with another model than .*model1; run prepare_joint_data.py again",
    # checkpoints of the other generation
    (
        "merge",
        "--output-dir {output1}",
    ): "joint_llm_only_last.ckpt was trained on another base model than .*model/llm.pt; give",
    ("merge", "--model-dir {model1}"): "was trained on another base model than .*model1/llm.pt; give the folder",
    ("train", "--mode llm_only --resume {output1}/joint_llm_only_last.ckpt"): "was trained on another base model than",
    ("train", "--mode llm_only --init {output1}/joint_llm_only_last.ckpt"): "was trained on another base model than",
    ("train", "--model-dir {model1} --data-dir {data1} --mode llm_only --init {output}/joint_llm_only_last.ckpt"): (
        "was trained on another base model than .*model1/llm.pt"
    ),
}
for name in ("prepare", "train", "merge"):
    both = "both_yamls has cosyvoice.yaml and cosyvoice2.yaml. Remove the one that its weights do not belong to"
    MISTAKES[name, "--model-dir {both_yamls}"] = both
    MISTAKES[name, "--model-dir {third}"] = "third is a CosyVoice3 folder; use CosyVoice-300M or CosyVoice2-0.5B"


@pytest.mark.parametrize(("name", "options"), MISTAKES, ids=[" ".join(mistake) for mistake in MISTAKES])
def test_a_mistake_is_one_line_and_touches_nothing(
    name: str, options: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(places["root"])
    capsys.readouterr()
    assert command(name, options, places) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}.py: ") and re.search(MISTAKES[name, options], line), line
    assert contents(places["root"]) == before


def contents(root: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file."""
    stats = {str(path): path.stat() for path in root.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
