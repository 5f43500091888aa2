"""A corpus of a few seconds and small sizes, for tests of the training recipe."""

import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
from parity import PARITY_DIR

ROOT = Path(__file__).resolve().parents[1]
RAW_AUDIO = ROOT / "examples" / "raw_audio"
SHARED_SHELL = ("recipe.sh", "stages.sh")
SECONDS = 0.6
FILES, CLIPS_A_FILE = 4, 2

# What makes tiny.yaml train in seconds: small batches, steps that matter, narrow discriminators.
SMALLER = {
    r"max_frames_in_batch: 2000": "max_frames_in_batch: 60",
    r"truncate_length: 24\d*": "truncate_length: 3072",
    r"warmup_steps: 2500": "warmup_steps: 2",
    r"lr: (0.001|1e-5)": "lr: 0.002",
    r"log_interval: 100": "log_interval: 1",
    r"mpd: .*": """\\g<0>
            periods: [2, 5]
            channels: [4, 8, 8]""",
    r"mrd: .*": """\\g<0>
            fft_sizes: [512]
            hop_sizes: [50]
            win_lengths: [240]
            channels: 4""",
}


def write_config(
    folder: Path, name: str = "config.yaml", base: Path = PARITY_DIR / "tiny.yaml", **settings: object
) -> Path:
    """A configuration made smaller; `settings` replaces the values of keys, wherever they stand."""
    text = base.read_text(encoding="utf-8")
    given = {rf"(?m)^( *{key}): .*$": rf"\g<1>: {value}" for key, value in settings.items()}
    for old, new in (SMALLER | given).items():
        text, count = re.subn(old, new, text)
        assert count, old
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def write_corpus(
    folder: Path, seed: int = 7, seconds: float = SECONDS, token_rate: int = 50, letters: int = 20, dpo: bool = False
) -> Path:
    """Parquet files as make_parquet_list.py writes them, with made-up tokens and vectors; returns their list."""
    random = np.random.default_rng(seed)
    recordings = sorted(RAW_AUDIO.glob("*.wav"))[: FILES * CLIPS_A_FILE]
    paths = [folder / f"parquet_{number:09d}.tar" for number in range(FILES)]
    for number, path in enumerate(paths):
        rows = [row(wav, random, seconds, token_rate, letters) for wav in recordings[number::FILES]]
        for each in rows if dpo else []:
            each["reject_speech_token"] = random.integers(0, 8, round(0.8 * seconds * token_rate)).tolist()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    listed = folder / "data.list"
    listed.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    return listed


def row(wav: Path, random: np.random.Generator, seconds: float, token_rate: int, letters: int) -> dict[str, object]:
    samples, rate = soundfile.read(wav)
    audio = io.BytesIO()
    soundfile.write(audio, samples[rate : rate + round(seconds * rate)], rate, format="WAV")
    return {
        "utt": wav.stem,
        "spk": "reader",
        "text": wav.with_suffix(".txt").read_text(encoding="utf-8")[:letters],
        "audio_data": audio.getvalue(),
        "speech_token": random.integers(0, 8, round(seconds * token_rate)).tolist(),
        "utt_embedding": random.normal(size=192).tolist(),
        "spk_embedding": random.normal(size=192).tolist(),
    }


def copy_of_the_project(project: Path) -> Path:
    """A project folder of links with copies of the recipes, whose results do not land in the repository.

    Returns the folder of the recipes.
    """
    project.mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("tools", "cosyvoice", "matcha", "voices"))]:
        (project / path.name).symlink_to(path)
    recipes, ignored = project / "examples" / "libritts", shutil.ignore_patterns("data", "exp", "tensorboard")
    shutil.copytree(ROOT / "examples" / "libritts", recipes, symlinks=True, ignore=ignored)
    for shared in SHARED_SHELL:
        shutil.copy(ROOT / "examples" / shared, project / "examples")
    return recipes


class TrainingRuns:
    """Runs of train.py on one corpus, each in a folder of its own."""

    folder: Path
    config: Path
    data: Path  # the list of parquet files

    def options(self, part: str, run: str, *options: str, config: Path | None = None) -> list[str]:
        paths = {"config": config or self.config, "train_data": self.data, "cv_data": self.data}
        paths |= {"model_dir": self.folder / run, "tensorboard_dir": self.folder / "tensorboard" / run}
        given = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
        return ["--model", part, *given, "--ddp.dist_backend", "gloo", "--max_epoch", "2", *options]

    def train(self, part: str, run: str, *options: str, config: Path | None = None, judge: Any = None) -> Path:
        """Returns the run's folder."""
        from cosyvoice.bin import train

        assert train.main(self.options(part, run, *options, config=config), judge) == 0
        return self.folder / run


def train_as(rank: int, processes: int, port: int, argv: list[str]) -> None:
    """Run train.py as process `rank` of several, as torchrun would start it."""
    import torch

    from cosyvoice.bin import train

    torch.set_num_threads(1)
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    train.main(argv)
