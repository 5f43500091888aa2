"""Access to the recorded numbers of the public implementation.

The folder named by PARITY_DIR (default: tests/data/parity) holds .npz cases, .json tables, tiny models and `index.json`
with each case's `meta`. Tests collect their cases from the files found there and take every size and seed from them.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARITY_DIR = Path(os.environ.get("PARITY_DIR") or Path(__file__).parent / "data" / "parity").resolve()


def cases(pattern: str) -> list[str]:
    """Names without suffix of the .npz cases whose name matches the glob pattern, e.g. `llm_infer_*`."""
    return sorted(path.stem for path in PARITY_DIR.glob(f"{pattern}.npz"))


@cache
def index() -> dict[str, Any]:
    return json.loads((PARITY_DIR / "index.json").read_text(encoding="utf-8"))


def meta(name: str) -> dict[str, Any]:
    return index()["files"][f"{name}.npz"]["meta"]


def arrays(name: str) -> dict[str, Tensor]:
    """All arrays of one case as tensors."""
    with np.load(PARITY_DIR / f"{name}.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def table(name: str) -> Any:
    """The content of one .json file."""
    return json.loads((PARITY_DIR / f"{name}.json").read_text(encoding="utf-8"))


def assert_close(actual: Tensor, expected: Tensor, atol: float = 0.0, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=rtol, check_dtype=False)
