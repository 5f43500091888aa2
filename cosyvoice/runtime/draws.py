"""Random draws of an utterance's own, whatever is drawn beside it."""

from contextvars import ContextVar, Token

import torch

from cosyvoice.runtime.command import one_seed

_current: ContextVar[torch.Generator | None] = ContextVar("generator", default=None)


def generator() -> torch.Generator | None:
    """What this thread draws from now: the generator of the innermost `with draws:`, else torch's own, as None."""
    return _current.get()


class Draws:
    """A sequence of draws of its own: what is drawn inside `with draws:`, however often it is entered.

    So sentences that are spoken side by side, or by several threads, draw what each would have drawn alone. Equal seeds
    give the draws that torch's own generator gives after `seed_all`. Speaking draws on the CPU only.
    """

    def __init__(self, *seed: int) -> None:
        self.generator = torch.Generator().manual_seed(one_seed(*seed))
        self.outer: list[Token] = []

    def __enter__(self) -> None:
        self.outer.append(_current.set(self.generator))

    def __exit__(self, *_error: object) -> None:
        _current.reset(self.outer.pop())
