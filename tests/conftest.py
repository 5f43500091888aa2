import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The recordings were made with one thread; two move them by a few units of the last place."""
    torch.set_num_threads(1)


@pytest.fixture
def as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CosyVoice2's language model forbid the end token alone, as the public one does.

    Its other special tokens end the speech, too, and forbidding all three shifts the probabilities of all others.
    """
    from cosyvoice.llm.qwen2_lm import Qwen2LM

    sample = Qwen2LM.sample

    def laxer(llm: Qwen2LM, log_p: torch.Tensor, tokens: list[int], forbidden: range, sampling: int) -> int:
        end = llm.speech_token_size
        return sample(llm, log_p, tokens, [end] if end in forbidden else [], sampling)

    monkeypatch.setattr(Qwen2LM, "sample", laxer)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where PARITY_DIR holds no file of a kind there is no case of it, and nothing to skip either."""
    items[:] = [item for item in items if not item.name.endswith("[NOTSET]")]
