"""Code that is planted in a file of data."""

import os
from pathlib import Path


class Bomb:
    """Makes a folder when a pickle of it is loaded by something that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)
