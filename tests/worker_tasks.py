"""What workers do in tests."""

import os
import signal
import time

from cosyvoice.runtime.errors import InputError
from training.workers import Place


def make_a_mistake(place: Place) -> None:
    print("nobody reads this")
    raise InputError("there is no parquet file; prepare one")


def divide_by_zero(place: Place) -> None:
    print(1 / 0)


def be_killed(place: Place) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(place: Place) -> None:
    place.meet()
    time.sleep(600)


def fail_after_meeting(place: Place) -> None:
    place.meet()
    raise InputError("the disk is full; make room")
