"""Access to the recorded numbers of the public implementation.

A folder of recorded numbers holds .npz cases, .json tables, tiny models and `index.json` with each case's `meta`: V1 is
CosyVoice-300M's, named by PARITY_DIR (default: tests/data/parity), V2 CosyVoice2's, named by PARITY2_DIR (default:
tests/data/parity2). Tests collect their cases from the files found there and take every size and seed from them.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Recorded:
    """A folder of recorded numbers."""

    folder: Path

    def cases(self, pattern: str) -> list[str]:
        """Return the names without suffix of the .npz cases that match the glob pattern, e.g. `llm_infer_*`."""
        return sorted(path.stem for path in self.folder.glob(f"{pattern}.npz"))

    def meta(self, name: str) -> dict[str, Any]:
        return _index(self.folder)["files"][f"{name}.npz"]["meta"]

    def arrays(self, name: str) -> dict[str, Tensor]:
        """Return all arrays of one case as tensors."""
        with np.load(self.folder / f"{name}.npz") as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files}

    def table(self, name: str) -> Any:
        """Return the content of one .json file."""
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))


@cache
def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))


V1 = Recorded(Path(os.environ.get("PARITY_DIR") or DATA / "parity").resolve())
V2 = Recorded(Path(os.environ.get("PARITY2_DIR") or DATA / "parity2").resolve())

PARITY_DIR, cases, meta, arrays, table = V1.folder, V1.cases, V1.meta, V1.arrays, V1.table


def assert_close(actual: Tensor, expected: Tensor, atol: float = 0.0, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=rtol, check_dtype=False)
