"""Writing speech into wav files."""

from io import BytesIO
from pathlib import Path

import soundfile
from torch import Tensor

from cosyvoice.utils.file_utils import atomic_write


def write_wav(path: Path, speech: Tensor, rate_hz: int, comment: str) -> None:
    """Write 16-bit mono, with the comment in the header. speech: (1, samples)."""
    content = BytesIO()  # a full disk is no error that soundfile tells
    with soundfile.SoundFile(content, "w", rate_hz, channels=1, format="WAV") as file:
        file.comment = comment
        file.write(speech[0].numpy())
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())
