#!/usr/bin/env python3
"""Stage 5: train as cosyvoice/bin/train.py does, with its options, and judge the samples where judges are installed."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # as a file, it finds the suite only so
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from cosyvoice.runtime.startup import stop_silently

    stop_silently()

from cosyvoice.bin import train
from cosyvoice.runtime.command import run

if TYPE_CHECKING:
    from cosyvoice.bin.sampling import Judge, Recording


def main(argv: Sequence[str] | None = None) -> int:
    return train.main(argv, open_judge)


def open_judge(recordings: "Sequence[Recording]", texts: Sequence[str]) -> "Judge | None":
    from tools.sample_judge import open_sample_judge

    return open_sample_judge(recordings, texts)


if __name__ == "__main__":
    run(main)
