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

from tools.random_model import make_random_model

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


@pytest.fixture(scope="module")
def cosyvoice2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("cosyvoice2"), seed=1, size="small2")


@pytest.fixture(params=["cosyvoice-300m", "cosyvoice2"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small model folder of each generation."""
    return request.getfixturevalue("cosyvoice2") if request.param == "cosyvoice2" else tiny_model_dir(tmp_path)


def check_limits(machine: dict[str, Any]) -> None:
    assert machine["bench"] == "machine" and machine["gb_per_second"] > 0 and machine["gflop_per_second"] > 0


def test_decoding_is_measured_in_each_precision(model_dir: Path, bench: Any) -> None:
    rows = bench("decode", "--model-dir", model_dir, "--tokens", 5, 9, "--compared", 8)
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


def test_the_weights_that_a_step_reads_are_counted(bench: Any, cosyvoice2: Path) -> None:
    import measuring

    width, inner, keys, layers, scores = 64, 128, 2 * 16, 2, 6561 + 3
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner  # query and output, key and value, gate, up, down
    assert measuring.step_weights(measuring.build(cosyvoice2, "llm")) == layers * layer + width * scores


def test_public_sizes_have_folders_without_weights(tmp_path: Path, bench: Any) -> None:
    import measuring

    from cosyvoice.llm.qwen2_config import read_qwen2_config

    folder = measuring.with_config(tmp_path, measuring.CONFIGS["cosyvoice2"])
    assert folder.rates.token_rate == 25 and read_qwen2_config(folder.text_model).hidden_size == 896


# By generation: speech tokens of both sentences, of the first chunk, and of those in which seconds 1 and 3 are heard.
LENGTHS = {"cosyvoice.yaml": (20, 40, 120, 120, 120), "cosyvoice2.yaml": (10, 20, 28, 50, 100)}


def test_synthesis_is_measured_by_part_and_as_a_whole(
    model_dir: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import synthesis

    monkeypatch.setattr(synthesis, "STREAMED_TEXT", 25)
    options = ["--text-tokens", 4, 8, "--stream-seconds", 1, 3]
    machine, *rows = bench("synthesis", "--model-dir", model_dir, *options)
    check_limits(machine)
    parts = ("flow", "vocoder", "sentence")
    short_text, long_text, *chunks = next(LENGTHS[path.name] for path in model_dir.glob("*.yaml"))
    lengths = [(row["what"], row["speech_tokens"]) for row in rows]
    streamed = list(zip(("first sound", "chunk at 1 s", "chunk at 3 s"), chunks, strict=True))
    assert lengths == 2 * ([(part, tokens) for tokens in (short_text, long_text) for part in parts] + streamed)
    assert all(row["growth"] > 0 for row in rows if row["what"].startswith("chunk"))
    sentence = LIMITED | {"speech_tokens", "precision", "real_time_factor"}
    assert all(row.keys() == sentence | ({"mel_error"} if row["what"] == "flow" else set()) for row in rows[:6])
    exact, bits8 = (row["mel_error"] for row in rows if row["what"] == "flow" and row["speech_tokens"] == short_text)
    assert exact < 1e-5 < bits8 < 0.5
    assert all(row["limit_seconds"] > 0 for row in rows[:7])
    short, long = (rows[i]["limit_seconds"] for i in (1, 4))
    assert long == pytest.approx(2 * short, rel=0.1), "the vocoder's work grows with the frames"


def test_a_training_step_is_measured_in_its_own_process(model_dir: Path, bench: Any) -> None:
    options = ["--modes", "joint", "--batch-sizes", 2, "--lengths", 1]
    machine, row = bench("train_steps", "--model-dir", model_dir, *options)
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


def test_start_up_is_measured_to_the_first_wav(model_dir: Path, bench: Any) -> None:
    machine, help_row, wav_row = bench("start_up", "--model-dir", model_dir)
    check_limits(machine)
    assert help_row.keys() == MEASURED
    assert wav_row.keys() == LIMITED | {"speech_seconds"} and wav_row["speech_seconds"] > 0


def test_start_up_is_measured_with_random_weights(bench: Any) -> None:
    *_, row = bench("start_up", "--sizes", "mini")
    assert (row["model"], row["what"]) == ("random mini", "first wav")


def test_operations_are_shown_by_their_share(model_dir: Path, bench: Any) -> None:
    machine, *rows = bench("operations", "--model-dir", model_dir, "--precisions", "int8", once=())
    check_limits(machine)
    assert [row["what"] for row in rows] == ["decoding", "flow", "vocoder", "training llm_only", "training flow_only"]
    assert all(0 < sum(row["shares"].values()) < 1.01 for row in rows)
    assert any(name.startswith("quantized::linear") for name in rows[0]["shares"])
    assert "aten::mkldnn_convolution" in rows[2]["shares"]


def test_operations_are_counted_where_attention_is_fused(bench: Any) -> None:
    import torch
    from measuring import count_flops

    size, frames = 8, 16
    x = torch.randn(1, 2, frames, size, requires_grad=True)  # (B, H, T, D)
    product = 2 * 2 * frames * frames * size  # queries by keys, or weights by values
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(x, x, x)) == 2 * product
    assert count_flops(lambda: attend(x, x, x).sum().backward()) == 7 * product, "backward makes the scores again"
    shared = x[:, :1]  # keys and values of both heads
    assert count_flops(lambda: attend(x, shared, shared, enable_gqa=True).sum().backward()) == 7 * product
    linear = torch.nn.Linear(size, 3)
    with torch.inference_mode():
        assert count_flops(lambda: linear(x.detach())) == 2 * (2 * frames) * size * 3
