"""The bench measures every precision and says how exact each is; how fast it is, no test asks."""

import json
import sys
from pathlib import Path

import pytest
from models import tiny_model_dir

ROOT = Path(__file__).parents[1]


def test_decoding_is_measured_in_each_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(sys, "path", list(sys.path))
    import decode

    options = ["--tokens", "5", "9", "--repeats", "1", "--compared", "8", "--threads", "1"]
    assert decode.main(["--model-dir", str(tiny_model_dir(tmp_path)), *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["precision"] for row in rows] == ["float32", "float16", "int8"]
    exact, half, bits8 = (row["mean_log_p_error"] for row in rows)
    assert exact < 1e-5 < half < bits8 < 0.5
    assert all(row["ms"].keys() == {"5", "9"} and row["of_limit"] > 0 for row in rows)
