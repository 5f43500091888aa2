"""CosyVoice2's data pipelines against recorded batches, and where they do better than the recording.

What is recorded of `gan` is upstream's fault: it adds 480 zeros to crops of 51 frames. So the recorded numbers are
compared without the mark that keeps the zeros away here, and another test says what a crop must be.
"""

import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from parity import V2, assert_close
from tiny2 import tiny_hift, write_config
from torch import Tensor
from transformers import AutoTokenizer

from cosyvoice.dataset import processor
from cosyvoice.dataset.dataset import Dataset
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.runtime.errors import InputError

NAMES = V2.cases("data")
EXACT = {"atol": 0.0}
TOLERANCE = {"speech_feat": {"atol": 2e-3}, "whisper_feat": {"atol": 2e-3}, "speech": {"atol": 1e-5}}
# The recording's pitch is WORLD's, this suite's is SwiftF0's. The clips glide between two pitches 3 % apart.
PITCH_SHARE = 0.05
ADDED = "<|endofprompt|> [breath] <strong> </strong> [noise] [laughter] [cough] [clucking] [accent] [quick_breath]"
TOKEN, FRAME = 960, 480  # samples


class Tokenizer:
    """Reads the recorded small vocabulary."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(V2.folder / "tiny2_blanken")
        self.tokenizer.add_special_tokens({"additional_special_tokens": ADDED.split()})

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return self.tokenizer([text])["input_ids"][0]


def pipeline(folder: Path, name: str) -> list[Any]:
    """Return the steps of tiny2.yaml, with its tokenizer."""
    steps = load_model_yaml(write_config(folder), parts=(name,))[name]
    return [partial(step, get_tokenizer=Tokenizer) if step.func is processor.tokenize else step for step in steps]


def corpus(folder: Path, *paths: Path) -> Path:
    (folder / "data.list").write_text("".join(f"{path}\n" for path in paths or [V2.folder / "clips.parquet"]))
    return folder / "data.list"


def batches(folder: Path, name: str = "data_pipeline", **options: Any) -> list[dict[str, Any]]:
    return list(Dataset(corpus(folder), pipeline(folder, name), **options))


def assert_recorded(case: str, batch: dict[str, Any], prefix: str) -> None:
    """Compare all that is recorded of a batch: whole, or its first rows."""
    expected = {key.removeprefix(prefix): value for key, value in V2.arrays(case).items() if key.startswith(prefix)}
    assert expected
    for name, value in expected.items():
        if name != "pitch_feat":
            found = batch[name]
            assert found.dtype == value.dtype and (len(found) == len(value) or name == "whisper_feat"), name
            assert_close(found[: len(value)], value, **TOLERANCE.get(name, EXACT))


@pytest.mark.parametrize("name", NAMES)
def test_training_batch(name: str, tmp_path: Path) -> None:
    (batch,) = batches(tmp_path)
    assert batch["utts"] == V2.meta(name)["llm/0/utts"] and batch["text"] == V2.meta(name)["llm/0/text"]
    assert_recorded(name, batch, "llm/0/")
    assert "reject_speech_token" not in batch and "speech" not in batch
    assert torch.equal(batch["speech_feat_len"], 2 * batch["speech_token_len"])
    assert torch.equal(batch["whisper_feat_len"], 4 * batch["speech_token_len"])


@pytest.mark.parametrize("name", NAMES)
def test_preference_batch(name: str, tmp_path: Path) -> None:
    (batch,) = batches(tmp_path, dpo=True)
    assert batch["utts"] == V2.meta(name)["dpo/0/utts"] and batch["text"] == V2.meta(name)["dpo/0/text"]
    assert_recorded(name, batch, "dpo/0/")


@pytest.mark.parametrize("name", NAMES)
def test_the_speakers_vector(name: str, tmp_path: Path) -> None:
    steps = pipeline(tmp_path, "data_pipeline")
    steps[-1] = partial(steps[-1], use_spk_embedding=True)
    (batch,) = Dataset(corpus(tmp_path), steps)
    assert_recorded(name, batch, "use_spk_embedding/")


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_250_frames(name: str, tmp_path: Path) -> None:
    steps = pipeline(tmp_path, "data_pipeline")
    steps[-2] = partial(steps[-2], max_frames_in_batch=250)
    found = [batch["utts"] for batch in Dataset(corpus(tmp_path), steps)]
    assert found == V2.meta(name)["batches_at_250_frames"]


def without_mark(samples: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return ({key: value for key, value in sample.items() if key != "is_window"} for sample in samples)


@pytest.mark.parametrize("name", NAMES)
def test_vocoder_batch_as_recorded(name: str, tmp_path: Path) -> None:
    """Upstream's quirk: compute_fbank pads the crop of 51 frames to 52."""
    data: Any = [{"src": str(V2.folder / "clips.parquet")}]
    for step in pipeline(tmp_path, "data_pipeline_gan"):
        data = step(data, gan=True) if step.func is processor.padding else step(data)
        data = without_mark(data) if step.func is processor.truncate else data
    random.seed(V2.meta(name)["seed"])
    (batch,) = data
    assert batch["utts"] == V2.meta(name)["gan/0/utts"]
    assert_recorded(name, batch, "gan/0/")
    assert_like_recorded(batch["pitch_feat"], V2.arrays(name)["gan/0/pitch_feat"])


def assert_like_recorded(found: Tensor, recorded: Tensor) -> None:
    """Most frames have a voice, and where both estimators hear one they agree; the ends are interpolated with zero."""
    assert found.shape == recorded.shape and found.dtype == torch.float32
    found, recorded = found[:, 1:-2], recorded[:, 1:-2]
    voiced = found > 0
    assert voiced.float().mean() > 0.5
    assert ((found - recorded).abs() / recorded)[voiced].max() < PITCH_SHARE


def test_a_crop_is_as_long_as_its_mel_and_has_no_zeros_at_its_end(tmp_path: Path) -> None:
    """Unlike the recording, and through `Dataset`, where upstream raises TypeError."""
    (batch,) = batches(tmp_path, "data_pipeline_gan", gan=True)
    crop = 24480
    assert batch["speech"].shape == (4, crop) and crop % TOKEN
    assert batch["speech_feat"].shape[1] == batch["pitch_feat"].shape[1] == crop // FRAME == 51
    assert (batch["speech"][:, -10:] != 0).any(dim=1).all()
    assert batch["speech_token_len"].tolist() == [len(tokens) for tokens in tokens_of(batch["utts"])]
    speech, pitch = tiny_hift()(batch, "cpu")
    assert speech.shape == batch["speech"].shape and pitch.shape == batch["pitch_feat"].shape


def tokens_of(utterances: list[str]) -> list[list[int]]:
    rows = pyarrow.parquet.read_table(V2.folder / "clips.parquet").to_pylist()
    return [row["speech_token"] for utterance in utterances for row in rows if row["utt"] == utterance]


@pytest.mark.parametrize("change", [-3, -1, 0, 1, 5])
def test_tokens_and_mel_end_together(change: int, tmp_path: Path) -> None:
    """Upstream raises, or shifts the tokens, where their number is not that of the recording's samples."""
    mel = load_model_yaml(write_config(tmp_path), parts=("feat_extractor",))["feat_extractor"]
    samples, covered = 24500, 26
    given = {
        "speech": torch.randn(1, samples),
        "sample_rate": 24000,
        "speech_token": np.arange(covered + change, dtype=np.int64),
    }
    (sample,) = processor.compute_whisper_fbank(
        processor.compute_fbank([given], mel, num_frames=TOKEN), num_frames=TOKEN
    )
    count = min(covered, covered + change)
    assert list(sample["speech_token"]) == list(range(count))
    assert sample["speech_feat"].shape == (2 * count, 80) and sample["whisper_feat"].shape == (4 * count, 128)
    assert sample["speech"].shape == (1, TOKEN * count)
    assert torch.equal(sample["speech"][:, :samples], given["speech"][:, : TOKEN * count])
    assert not sample["speech"][:, samples:].any()


def test_without_num_frames_nothing_is_aligned() -> None:
    given = {"speech": torch.randn(1, 1000), "sample_rate": 16000, "speech_token": np.arange(1)}
    (sample,) = processor.compute_fbank([given], lambda speech: torch.zeros(1, 80, speech.shape[1]))
    assert sample["speech"] is given["speech"] and len(sample["speech_feat"]) == 1000
    (sample,) = processor.compute_whisper_fbank([given])
    assert sample["speech"] is given["speech"] and sample["whisper_feat"].shape == (6, 128)


def test_rows_without_rejected_tokens_teach_no_preference(tmp_path: Path) -> None:
    """Upstream raises for None, also where nobody asked for preferences."""
    table = pyarrow.parquet.read_table(V2.folder / "clips.parquet")
    rejected = table["reject_speech_token"].to_pylist()
    rejected[0], rejected[1] = None, []
    place = table.schema.get_field_index("reject_speech_token")
    column = pyarrow.array(rejected, table.schema.field(place).type)
    pyarrow.parquet.write_table(table.set_column(place, "reject_speech_token", column), tmp_path / "some.parquet")
    listed, steps = corpus(tmp_path, tmp_path / "some.parquet"), pipeline(tmp_path, "data_pipeline")
    (batch,) = Dataset(listed, steps, dpo=True)
    assert batch["utts"] == ["u4", "u2"] and batch["reject_speech_token"].shape == (2, 36)
    (batch,) = Dataset(listed, steps)
    assert batch["utts"] == ["u1", "u4", "u0", "u2"]


def test_a_corpus_without_rejected_tokens_says_so(tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(V2.folder / "clips.parquet").drop_columns(["reject_speech_token"])
    pyarrow.parquet.write_table(table, tmp_path / "none.parquet")
    listed = corpus(tmp_path, tmp_path / "none.parquet")
    with pytest.raises(InputError, match="no column reject_speech_token"):
        list(Dataset(listed, pipeline(tmp_path, "data_pipeline"), dpo=True))
