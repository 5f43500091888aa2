"""The fundamental frequency of recordings, the target of the vocoder's pitch predictor."""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cosyvoice.utils.audio import resample

if TYPE_CHECKING:
    from swift_f0 import SwiftF0

# SwiftF0 is a network of 0.1 MB that runs on onnxruntime and takes 10 ms for a second of audio. WORLD has no wheel,
# librosa compiles for seconds in every worker, and Praat's licence would bind the whole suite.
ESTIMATOR_RATE_HZ = 16_000
LOWEST_HZ, HIGHEST_HZ = 50.0, 550.0  # of speech
VOICED_CONFIDENCE = 0.5  # the estimator is calibrated for it


@cache
def _estimator() -> "SwiftF0":
    from swift_f0 import SwiftF0

    return SwiftF0(threads=1, spin=False)  # several workers share the cores


def pitch_track(speech: Tensor, sample_rate: int, hop_size: int) -> Tensor:
    """Return the pitch in Hz of speech (1, samples), 0 in unvoiced frames: float32 (samples // hop_size,).

    Entry i is the pitch in the middle of the frame that starts at sample i * hop_size. A frame is voiced if the
    estimator's nearest frame is; the pitch is interpolated between voiced frames.
    """
    frames = speech.size(1) // hop_size
    speech_16k = resample(speech, sample_rate, ESTIMATOR_RATE_HZ)
    found = _estimator().detect(speech_16k[0].numpy(), ESTIMATOR_RATE_HZ, LOWEST_HZ, HIGHEST_HZ)
    voiced = found.confidence >= VOICED_CONFIDENCE
    if not voiced.any():
        return torch.zeros(frames)
    seconds = (np.arange(frames) + 0.5) * hop_size / sample_rate
    pitch = np.interp(seconds, found.timestamps[voiced], found.pitch_hz[voiced])
    nearest = np.abs(seconds[:, None] - found.timestamps).argmin(axis=1)
    return torch.from_numpy(np.where(voiced[nearest], pitch, 0.0)).float()
