"""What every command needs: the one way errors end, threads that wait politely, and random draws made again."""

import _thread
import atexit
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cosyvoice.runtime.errors import DISK_TROUBLE, GONE, NO_PERMISSION, InputError, is_memory_trouble

PLACE_TROUBLE = (*DISK_TROUBLE, *NO_PERMISSION, *GONE)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
REPEAT_SECONDS = 0.05
VALIDATION = 1_000_003  # in place of the epoch in `seed_all`: keeps validation apart from every training epoch


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a script's `main` and leave: a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130."""
    # Threads of one operation wait for each other in a loop, each time for milliseconds. Where another program has one
    # of the cores, that loop is all they do: on two cores one busy neighbour made a small model 100 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is loaded, which main does
    if isinstance(sys.stdout, io.TextIOWrapper):  # which, redirected on Windows, may lack the letters of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    threading.excepthook = _tell_of_thread
    code, reason = EXIT_USER_ERROR, ""
    try:
        with _interrupts():
            code = main(None) or 0
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        reason = what_to_do(error)
        if not reason:
            raise
    except KeyboardInterrupt:
        code, reason = EXIT_INTERRUPTED, "interrupted; what was finished is kept"
    if reason:
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # the first to be called: nothing is left to stop
    sys.exit(code)


def what_to_do(error: Exception) -> str:
    """Return the line for an error that the user can mend, or nothing where it is the program's own."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in PLACE_TROUBLE:
        where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        remedy = "make room, or choose files and folders that can be read and written"
        if error.errno in GONE:
            remedy = "was it moved or deleted during the run? Put it back, and run the same command again"
        return f"{error.strerror}{where}; {remedy}"
    if isinstance(error, RuntimeError | MemoryError) and is_memory_trouble(error):
        told = str(error).splitlines()[0] if str(error) else "the memory is full."
        return f"{told} See 'Out of memory' in docs/settings.md."
    return ""


@contextmanager
def _interrupts() -> Iterator[None]:
    """Make every Ctrl-C a KeyboardInterrupt here, also where it comes while a library is loaded.

    There, one may be swallowed by a callback, and then it is repeated; or it becomes another exception.
    """
    interrupted = threading.Event()

    def notice(signum: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def swallowed(failure: "sys.UnraisableHookArgs") -> None:
        if not isinstance(failure.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(failure)
            return
        again = threading.Timer(REPEAT_SECONDS, _thread.interrupt_main)
        again.daemon = True
        again.start()

    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if before in (signal.default_int_handler, signal.SIG_DFL):  # and not ignored
        signal.signal(signal.SIGINT, notice)
        sys.unraisablehook = swallowed
    try:
        yield
    except Exception:
        if not interrupted.is_set():
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook


def _tell_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Print how a thread ended, unless it was where it writes: the logs' writer passes that on to the main thread."""
    if not (isinstance(failure.exc_value, OSError) and failure.exc_value.errno in PLACE_TROUBLE):
        threading.__excepthook__(failure)


def check_least(option: str, number: int, least: int = 1) -> None:
    """Raise InputError for a number given with `option` that is too small."""
    if number < least:
        raise InputError(f"{option} {number}: at least {least} is needed")


def one_seed(*numbers: int) -> int:
    """A seed that follows from all the numbers."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_all(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators from a tuple, so that any step's draws can be made again."""
    import random

    import numpy as np
    import torch

    seed = one_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
