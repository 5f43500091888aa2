"""The processes of a training run, one for each device. The first one starts the others, and they end with it."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch.distributed as dist

from cosyvoice.runtime.command import what_to_do
from cosyvoice.runtime.errors import InputError

HOST = "127.0.0.1"
REPORT_SECONDS = 2  # in which a worker that fails says so
STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Place:
    """Which of the processes of a run this one is, and so which device it has."""

    rank: int = 0
    devices: int = 1
    meet: Callable[[], dist.Store] | None = None  # waits for the other processes, where there are any


Work = Callable[[Place], object]


class WorkerFailed(Exception):
    """What a worker ended with, where it is not a user's mistake: its traceback."""


@dataclass(frozen=True)
class Failure:
    """How a worker has failed."""

    when: float  # seconds
    line: str  # for the user, where it was a mistake that the user can mend
    details: str  # the traceback

    @property
    def error(self) -> Exception:
        return InputError(self.line) if self.line else WorkerFailed(self.details)


@contextmanager
def with_workers(devices: int, work: Work) -> Iterator[Place]:
    """Yield the first process's place, and do `work` in one more process for each further device.

    work: a picklable function that does what the block does; what it prints is not shown. However the block ends, no
    worker is left. Raises what a worker failed with: InputError, or WorkerFailed where it is not a user's mistake.
    """
    if devices == 1:
        yield Place()
        return
    workers = Workers(devices, work)
    try:
        yield Place(0, devices, workers.meet)
    except RuntimeError:  # the connection to a worker is lost
        workers.raise_failure()
        raise
    finally:
        workers.kill()


class Workers:
    """The processes beside the first one, which holds this."""

    def __init__(self, devices: int, work: Work) -> None:
        self.store = dist.TCPStore(HOST, 0, devices, is_master=True, wait_for_workers=False)  # on a free port
        self.processes: dict[Connection, BaseProcess] = {}
        with ignored(STOPS):  # which the workers inherit: the first process ends them
            for rank in range(1, devices):
                self.start(rank, devices, work)

    def start(self, rank: int, devices: int, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        reports, end = context.Pipe(duplex=False)
        process = context.Process(target=be_worker, args=(rank, devices, self.store.port, end, work), daemon=True)
        process.start()
        end.close()  # the worker has the only one, so that its death is noticed
        self.processes[reports] = process

    def meet(self) -> dist.Store:
        """Wait until all workers have come this far, and return where they are found. Raises what one failed with."""
        for reports in self.processes:
            if failure := self.next_report(reports):
                raise failure.error
        return self.store

    def raise_failure(self) -> None:
        """Raise what the first worker that failed ended with, if one did."""
        found = [self.next_report(reports) for reports in wait(list(self.processes), REPORT_SECONDS)]
        failures = [failure for failure in found if failure]
        if failures:
            raise min(failures, key=lambda failure: failure.when).error from None

    def next_report(self, reports: Connection) -> Failure | None:
        """Wait for a worker. Return None where it has come to `meet`, or to its end."""
        try:
            return reports.recv()
        except EOFError:
            process = self.processes[reports]
            process.join(REPORT_SECONDS)
        if not process.exitcode:
            return None
        line = f"a process of --devices was ended from outside (exit code {process.exitcode}); is the memory full?"
        return Failure(0.0, line, "")

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()


def be_worker(rank: int, devices: int, port: int, reports: Connection, work: Work) -> None:
    """Do a worker's work, in silence."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.stdout = sys.stderr = open(os.devnull, "w", errors="replace")  # noqa: SIM115  until the process ends
    try:
        work(Place(rank, devices, partial(arrive, reports, port)))
    except Exception as error:
        reports.send(Failure(time.time(), what_to_do(error), traceback.format_exc()))
        raise


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, in whatever way."""
    multiprocessing.parent_process().join()
    os._exit(1)


def arrive(reports: Connection, port: int) -> dist.Store:
    """Return where the other processes are found."""
    reports.send(None)
    return dist.TCPStore(HOST, port, is_master=False)


@contextmanager
def ignored(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
