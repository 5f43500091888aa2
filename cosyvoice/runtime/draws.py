"""Random draws that belong to one utterance, independent of what is drawn beside it."""

from contextvars import ContextVar, Token

import torch

from cosyvoice.runtime.command import one_seed

_current: ContextVar[torch.Generator | None] = ContextVar("generator", default=None)


def generator() -> torch.Generator | None:
    """Return the generator that this thread draws from: the innermost `with draws:`, or None for torch's own."""
    return _current.get()


class Draws:
    """A random sequence of its own, from which everything inside `with draws:` is drawn. It may be entered repeatedly.

    Sentences spoken side by side or by several threads thus draw the same numbers as each alone. Equal seeds give the
    draws that torch's own generator gives after `seed_all`. Speaking draws on the CPU only.
    """

    def __init__(self, *seed: int) -> None:
        self.generator = torch.Generator().manual_seed(one_seed(*seed))
        self.outer: list[Token] = []

    def copy(self) -> "Draws":
        """Return draws that go on as these do."""
        other = Draws()
        other.generator.set_state(self.generator.get_state())
        return other

    def __enter__(self) -> None:
        self.outer.append(_current.set(self.generator))

    def __exit__(self, *_error: object) -> None:
        _current.reset(self.outer.pop())
