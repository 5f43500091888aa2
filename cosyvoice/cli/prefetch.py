"""Runs a generator ahead of its consumer."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def prefetch(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield the same items, made by a thread while the consumer works on earlier ones.

    An exception in `items` is raised here, after the items before it. Closing this generator stops the thread
    at its next item and waits for it, so that no work continues for a consumer who left.
    """
    queue: SimpleQueue = SimpleQueue()
    closed = Event()

    def produce() -> None:
        try:
            with closing(items):  # closed by the thread that ran it: contexts held inside are per thread
                for item in items:
                    queue.put(item)
                    if closed.is_set():
                        return
        finally:
            queue.put(_END)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        producer = pool.submit(produce)
        try:
            while (item := queue.get()) is not _END:
                yield item
            producer.result()
        finally:
            closed.set()
