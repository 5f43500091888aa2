"""What is left of an epoch's samples: sound, pictures and figures, in files and in TensorBoard."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cosyvoice.utils.file_utils import atomic_write
from cosyvoice.utils.wav_files import write_wav

PIXELS_A_BIN = 2
SILENCE = math.log(1e-5)  # the lowest value of a log-mel
LOUDEST = 2.0
# From silence to the loudest: black, purple, red, orange, light yellow.
COLOURS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])
FIGURES_FILE = "samples.json"


@dataclass
class Sample:
    """What was said by a version of the model, or by the speaker."""

    version: str
    number: int  # of the text, from 1; 0 for the speaker
    text: str
    speech: Tensor  # (1, samples)
    mel: Tensor  # (80, T)
    figures: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.version}_{self.number:02d}" if self.number else self.version

    @property
    def tag(self) -> str:
        """Where it is in TensorBoard, which makes one group of all samples of a text."""
        return f"{self.number:02d}/{self.version}" if self.number else self.version


def write_files(folder: Path, samples: Sequence[Sample], rate_hz: int, comment: str) -> None:
    """Write sound and picture of each, and the figures of all. Raises InputError where there is no room."""
    for sample in samples:
        write_wav(folder / f"{sample.name}.wav", sample.speech, rate_hz, comment)
        with atomic_write(folder / f"{sample.name}.png") as temporary:
            Image.fromarray(picture(sample.mel)).save(temporary)
    rows = [{"file": f"{sample.name}.wav", "text": sample.text, **sample.figures} for sample in samples]
    with atomic_write(folder / FIGURES_FILE) as temporary:
        temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def log(writer: SummaryWriter, samples: Sequence[Sample], epoch: int, rate_hz: int) -> None:
    """Log sound and picture of each, and the mean of each figure by version."""
    for sample in samples:
        writer.add_audio(sample.tag, sample.speech, epoch, rate_hz)
        # under a tag of its own: TensorBoard shows only one kind of thing under each
        writer.add_image(f"{sample.tag}/mel", picture(sample.mel), epoch, dataformats="HWC")
    for version in dict.fromkeys(sample.version for sample in samples):
        own = [sample.figures for sample in samples if sample.version == version]
        for name in dict.fromkeys(name for figures in own for name in figures):
            mean = fmean(figures[name] for figures in own if name in figures)
            writer.add_scalar(f"SAMPLES/{name}/{version}", mean, epoch)
    writer.flush()


def picture(mel: Tensor) -> np.ndarray:
    """Return a log-mel (80, T) as a picture (160, T, 3) in 8 bits, low frequencies at the bottom."""
    levels = (mel.flip(0).numpy() - SILENCE) / (LOUDEST - SILENCE)
    levels = levels.clip(0, 1).repeat(PIXELS_A_BIN, axis=0)
    places = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(levels, places, COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
