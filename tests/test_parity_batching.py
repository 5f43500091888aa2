"""The data pipeline: order and make-up of batches, padding, filtering, warm-up."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from parity import arrays, assert_close, cases, meta

from cosyvoice.dataset import processor
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.scheduler import WarmupLR

NAMES = cases("batching")


def of_lengths(lengths: list[int]) -> list[dict[str, Any]]:
    return [{"index": i, "speech_feat": torch.zeros(length, 1)} for i, length in enumerate(lengths)]


def indices(samples: Any) -> list[int]:
    return [sample["index"] for sample in samples]


def wav_bytes(seconds: float, rate: int = 16000, channels: int = 1, level: float = 0.1) -> bytes:
    buffer = io.BytesIO()
    samples = np.full((round(seconds * rate), channels), level)
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def recorded(name: str, prefix: str) -> list[int | str]:
    """Settings that a key of `meta` carries at its end, e.g. the 16 of `sort_16`."""
    return [key.removeprefix(prefix) for key in meta(name) if key.startswith(prefix)]


@pytest.mark.parametrize("name", NAMES)
def test_sort(name: str) -> None:
    for size in recorded(name, "sort_"):
        samples = of_lengths(meta(name)["lengths"])
        assert indices(processor.sort(samples, sort_size=int(size))) == meta(name)[f"sort_{size}"]


@pytest.mark.parametrize("name", NAMES)
def test_shuffle(name: str) -> None:
    for size in [key for key in recorded(name, "shuffle_") if key.isdigit()]:
        random.seed(meta(name)[f"shuffle_{size}_seed"])
        samples = of_lengths(meta(name)["lengths"])
        assert indices(processor.shuffle(samples, shuffle_size=int(size))) == meta(name)[f"shuffle_{size}"]


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_batches(name: str) -> None:
    for limit in recorded(name, "dynamic_batch_"):
        samples = of_lengths(meta(name)["lengths"])
        batches = processor.batch(samples, batch_type="dynamic", max_frames_in_batch=int(limit))
        # The reference yields an empty batch first when the very first item is too long by itself; there is
        # none here.
        expected = [batch for batch in meta(name)[f"dynamic_batch_{limit}"] if batch]
        assert [indices(batch) for batch in batches] == expected


@pytest.mark.parametrize("name", NAMES)
def test_filter(name: str) -> None:
    samples = [
        {
            "utt": index,
            "audio_data": wav_bytes(seconds),
            "text_token": [1] * texts,
            "speech_token": [1] * tokens,
        }
        for index, (seconds, texts, tokens) in enumerate(meta(name)["filter_inputs(seconds,text_tokens,speech_tokens)"])
    ]
    kept = processor.filter(samples, max_length=40960, min_length=0, token_max_length=200, token_min_length=1)
    assert [sample["utt"] for sample in kept] == meta(name)["filter_kept"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_spk_embedding", [False, True])
def test_padding(name: str, use_spk_embedding: bool) -> None:
    case = arrays(name)
    rows: dict[str, dict[str, Any]] = {}
    for key in (key for key in case if key.startswith("row")):
        row, column = key.split("/")
        rows.setdefault(row, {"utt": f"u{row[3:]}"})[column] = case[key]
    (batch,) = processor.padding([list(rows.values())], use_spk_embedding=use_spk_embedding, gan=True)
    prefix = f"padded_spk{use_spk_embedding}/"
    assert batch["utts"] == meta(name)[f"padding_order_spk{use_spk_embedding}"]
    for key in (key for key in case if key.startswith(prefix)):
        found = batch[key.removeprefix(prefix)]
        assert found.dtype == case[key].dtype
        assert_close(found, case[key])


@pytest.mark.parametrize("name", NAMES)
def test_warmup_learning_rates(name: str) -> None:
    for steps in recorded(name, "warmuplr_"):
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
        scheduler = WarmupLR(optimizer, warmup_steps=int(steps))
        rates = []
        for _ in meta(name)[f"warmuplr_{steps}"]:
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx(meta(name)[f"warmuplr_{steps}"], rel=1e-12)


def test_warmup_peaks_at_the_learning_rate_and_continues_where_told() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = WarmupLR(optimizer, warmup_steps=4)
    scheduler.set_step(2)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.5)]


def test_an_oversized_first_sample_is_a_batch_of_its_own() -> None:
    batches = processor.batch(of_lengths([50, 3, 4, 30, 5]), batch_type="dynamic", max_frames_in_batch=10)
    assert [indices(batch) for batch in batches] == [[0], [1, 2], [3], [4]]


def test_static_batches() -> None:
    batches = processor.batch(of_lengths([1] * 5), batch_type="static", batch_size=2)
    assert [indices(batch) for batch in batches] == [[0, 1], [2, 3], [4]]
    with pytest.raises(InputError, match="batch_type 'greedy'"):
        processor.batch([], batch_type="greedy")


def test_without_a_mel_lengths_are_those_of_the_speech_tokens() -> None:
    samples = [
        {
            "utt": str(tokens),
            "text_token": [1],
            "speech_token": list(range(tokens)),
            "speech": torch.zeros(1, tokens),
            "utt_embedding": torch.zeros(192),
            "spk_embedding": torch.zeros(192),
        }
        for tokens in (30, 10, 20, 40)
    ]
    runs = list(processor.batch(processor.sort(samples), "dynamic", max_frames_in_batch=60))
    assert [[sample["utt"] for sample in run] for run in runs] == [["10", "20"], ["30"], ["40"]]
    first, *_ = processor.padding(runs, use_spk_embedding=False)
    assert first["speech_token"].shape == (2, 20) and "speech_feat" not in first


def test_filter_averages_channels_and_leaves_out_what_is_no_audio(caplog: pytest.LogCaptureFixture) -> None:
    tokens = {"text_token": [1] * 5, "speech_token": [1]}
    samples = [
        {"utt": "stereo", "audio_data": wav_bytes(1.0, channels=2), **tokens},
        {"utt": "broken", "audio_data": b"not audio", **tokens},
    ]
    kept = list(processor.filter(samples))
    assert [sample["utt"] for sample in kept] == ["stereo"]
    assert kept[0]["speech"].shape == (1, 16000) and "audio_data" not in kept[0]
    assert "broken" in caplog.text


def test_resample_keeps_peaks_at_one_and_drops_low_rates() -> None:
    loud = torch.zeros(1, 16000)
    loud[0, ::50] = 4.0
    samples = [{"speech": loud, "sample_rate": 16000}, {"speech": loud, "sample_rate": 8000}]
    kept = list(processor.resample(samples, resample_rate=22050))
    assert len(kept) == 1 and kept[0]["sample_rate"] == 22050
    assert kept[0]["speech"].shape == (1, 22050)
    assert kept[0]["speech"].abs().max() == pytest.approx(1.0)


def test_truncate_cuts_or_fills() -> None:
    long, short = torch.arange(1.0, 101.0)[None], torch.ones(1, 3)
    cut, filled = processor.truncate([{"speech": long}, {"speech": short}], truncate_length=10)
    assert torch.equal(cut["speech"].diff(), torch.ones(1, 9))
    assert torch.equal(filled["speech"], torch.tensor([[1.0] * 3 + [0.0] * 7]))


def test_parquet_rows_become_samples(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    columns = {
        "utt": ["a", "b"],
        "audio_data": [b"1", b"2"],
        "speech_token": [[1, 2], []],
        "utt_embedding": [[3.0, 4.0]] * 2,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    samples = list(processor.parquet_opener([{"src": str(path)}]))
    assert [sample["utt"] for sample in samples] == ["a", "b"]
    assert samples[0]["audio_data"] == b"1"
    assert [list(sample["speech_token"]) for sample in samples] == [[1, 2], []]
    parsed = next(processor.parse_embedding([{**samples[0], "spk_embedding": [0.0, 2.0]}], normalize=True))
    assert_close(parsed["utt_embedding"], torch.tensor([0.6, 0.8]), atol=1e-7)
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="x.parquet is not a readable parquet file"):
        list(processor.parquet_opener([{"src": str(path)}]))


def test_text_and_mel_are_added() -> None:
    class Letters:
        def encode(self, text: str, allowed_special: str) -> list[int]:
            return [ord(letter) for letter in text]

    (sample,) = processor.tokenize([{"text": "ab"}], get_tokenizer=Letters, allowed_special="all")
    assert sample["text_token"] == [97, 98]
    mel = torch.rand(1, 80, 7)
    (sample,) = processor.compute_fbank([{"speech": torch.zeros(1, 9)}], feat_extractor=lambda speech: mel)
    assert torch.equal(sample["speech_feat"], mel[0].T)
