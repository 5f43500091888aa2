"""Every bench runs on tiny models and prints the figures it promises; how fast anything is, no test asks."""

import importlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model_dir

ROOT = Path(__file__).parents[1]
ONCE = ("--repeats", "1", "--threads", "1")
MEASURED = {"bench", "what", "device", "threads", "runs", "seconds"}
LIMITED = MEASURED | {"model", "limit_seconds", "of_limit"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a script of bench/ with one thread and returns its rows; what other processes print counts, too."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(sys, "path", list(sys.path))
    import measuring

    monkeypatch.setattr(measuring, "MATRIX_ROWS", 256)

    def run(script: str, *options: object, once: Sequence[str] = ONCE) -> list[dict[str, Any]]:
        words = [*map(str, options), *once]
        assert importlib.import_module(script).main(words) == 0
        return [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]

    return run


def check_limits(machine: dict[str, Any]) -> None:
    assert machine["bench"] == "machine" and machine["gb_per_second"] > 0 and machine["gflop_per_second"] > 0


def test_decoding_is_measured_in_each_precision(tmp_path: Path, bench: Any) -> None:
    options = ["--tokens", 5, 9, "--compared", 8]
    rows = bench("decode", "--model-dir", tiny_model_dir(tmp_path), *options)
    assert [row["precision"] for row in rows] == ["float32", "float16", "int8"]
    exact, half, bits8 = (row["mean_log_p_error"] for row in rows)
    assert exact < 1e-5 < half < bits8 < 0.5
    assert all(row["ms"].keys() == {"5", "9"} and row["of_limit"] > 0 for row in rows)


def test_half_precision_of_a_gpu_is_measured_beside_float32(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried on the CPU: the copies share nothing that halving one would change in the other."""
    monkeypatch.setattr("cosyvoice.transformer.precision.is_on_gpu", lambda module: True)
    options = ["--precisions", "float16", "float32", "--tokens", 5, "--compared", 8]
    half, exact = bench("decode", "--model-dir", tiny_model_dir(tmp_path), *options)
    assert exact["mean_log_p_error"] < 1e-5 < half["mean_log_p_error"] < 0.1


def test_a_processor_without_kernels_for_fewer_bits_is_measured_in_float32(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoEngines:
        supported_engines = ("none",)

    monkeypatch.setattr("torch.backends.quantized", NoEngines)
    rows = bench("decode", "--model-dir", tiny_model_dir(tmp_path), "--tokens", 5, "--compared", 3)
    assert [row["precision"] for row in rows] == ["float32"] and rows[0]["last_over_first"] == 1


def test_the_mini_is_trained_with_its_own_settings(bench: Any) -> None:
    import measuring
    import train_steps

    for size, rank in (("mini", 32), ("300m", 16)):
        settings = train_steps.settings_of(measuring.CONFIGS[size])
        assert settings["flow_lora"]["lora_r"] == rank


def test_synthesis_is_measured_by_part_and_as_a_whole(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import synthesis

    monkeypatch.setattr(synthesis, "STREAMED_TEXT", 25)
    machine, *rows = bench("synthesis", "--model-dir", tiny_model_dir(tmp_path), "--text-tokens", 4, 8)
    check_limits(machine)
    parts = ("flow", "vocoder", "sentence")
    lengths = [(row["what"], row["speech_tokens"]) for row in rows]
    assert lengths == 2 * ([(part, tokens) for tokens in (20, 40) for part in parts] + [("first sound", 120)])
    sentence = LIMITED | {"speech_tokens", "precision", "real_time_factor"}
    assert all(row.keys() == sentence | ({"mel_error"} if row["what"] == "flow" else set()) for row in rows[:6])
    exact, bits8 = (row["mel_error"] for row in rows if row["what"] == "flow" and row["speech_tokens"] == 20)
    assert exact < 1e-5 < bits8 < 0.5
    assert all(row["limit_seconds"] > 0 for row in rows)
    short, long = (rows[i]["limit_seconds"] for i in (1, 4))
    assert long == pytest.approx(2 * short, rel=0.1), "the vocoder's work grows with the frames"


def test_a_training_step_is_measured_in_its_own_process(tmp_path: Path, bench: Any) -> None:
    machine, row = bench(
        "train_steps", "--model-dir", tiny_model_dir(tmp_path), "--modes", "joint", "--batch-sizes", 2, "--lengths", 1
    )
    check_limits(machine)
    assert row.keys() == LIMITED | {"clips", "speech_tokens", "clips_per_second", "peak_gb"}
    assert row["clips"] == 2 and row["limit_seconds"] > 0
    assert row["clips_per_second"] == pytest.approx(2 / row["seconds"][0])
    assert 0.05 < row["peak_gb"] < 50


def test_training_cases_vary_one_thing_at_a_time(bench: Any) -> None:
    import train_steps

    options = train_steps.parse(["--modes", "joint", "llm_only", "--batch-sizes", "1", "4", "--lengths", "2", "3"])
    assert train_steps.cases(options) == [("joint", 1, 2), ("llm_only", 1, 2), ("joint", 4, 2), ("joint", 1, 3)]


def test_preparation_is_measured_with_random_encoders(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import preparation

    for name in ("001.wav", "001.txt", "002.wav", "002.txt"):
        shutil.copy(preparation.RECORDINGS / name, tmp_path)
    monkeypatch.setattr(preparation, "RECORDINGS", tmp_path)
    machine, row = bench("preparation")
    check_limits(machine)
    assert row.keys() == MEASURED | {"model", "clips", "clips_per_second", "real_time_factor"}
    assert (row["model"], row["clips"]) == ("random encoders", 2)


def test_start_up_is_measured_to_the_first_wav(tmp_path: Path, bench: Any) -> None:
    machine, help_row, wav_row = bench("start_up", "--model-dir", tiny_model_dir(tmp_path))
    check_limits(machine)
    assert help_row.keys() == MEASURED
    assert wav_row.keys() == LIMITED | {"speech_seconds"} and wav_row["speech_seconds"] > 0


def test_operations_are_shown_by_their_share(tmp_path: Path, bench: Any) -> None:
    machine, *rows = bench("operations", "--model-dir", tiny_model_dir(tmp_path), "--precisions", "int8", once=())
    check_limits(machine)
    assert [row["what"] for row in rows] == ["decoding", "flow", "vocoder", "training llm_only", "training flow_only"]
    assert all(0 < sum(row["shares"].values()) < 1.01 for row in rows)
    assert "quantized::linear_dynamic" in rows[0]["shares"] and "aten::mkldnn_convolution" in rows[2]["shares"]


def test_operations_are_counted_where_attention_is_fused(bench: Any) -> None:
    import torch
    from measuring import count_flops

    size, frames = 8, 16
    x = torch.randn(1, 2, frames, size, requires_grad=True)  # (B, H, T, D)
    product = 2 * 2 * frames * frames * size  # queries by keys, or weights by values
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(x, x, x)) == 2 * product
    assert count_flops(lambda: attend(x, x, x).sum().backward()) == 7 * product, "backward makes the scores again"
    linear = torch.nn.Linear(size, 3)
    with torch.inference_mode():
        assert count_flops(lambda: linear(x.detach())) == 2 * (2 * frames) * size * 3
