"""The engines that do the work of a stage: threads of this machine, or a Ray cluster."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from utils import in_parallel

# spread(work, items) yields work(item) of all items, in their order. The work may run in another process.
Spread = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def add_engine(parser: argparse.ArgumentParser) -> None:
    help_text = "work on this machine, or on the Ray cluster at RAY_ADDRESS (default: %(default)s)"
    parser.add_argument("--engine", choices=("pool", "ray"), default="pool", help=help_text)


@contextmanager
def opened(engine: str, workers: int) -> Iterator[Spread]:
    """Yield the `spread` of an engine, which ends with the block.

    workers: items at a time on this machine; a cluster has as many as it has cores. Raises InputError where the engine
    cannot be used.
    """
    if engine == "pool":
        yield partial(in_parallel, workers=workers)
        return
    from tools.ray_engine import on_ray

    with on_ray(workers) as spread:
        yield spread
