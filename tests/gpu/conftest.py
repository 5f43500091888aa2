"""These tests need a GPU: `make test-gpu`. Elsewhere each says why it was left out."""

import pytest
import torch

from cosyvoice.runtime.device import cuda_problem


@pytest.fixture(autouse=True, scope="session")
def needs_a_gpu() -> None:
    if problem := cuda_problem():
        pytest.skip(f"needs a GPU: {problem}")


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32 are computed with fewer bits on newer cards, unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def gpu(needs_a_gpu: None) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
