import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The recordings were made with one thread; two move them by a few units of the last place."""
    torch.set_num_threads(1)
