"""Measures of a clip, the reasons to leave one out, and the warnings about doubtful ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import pyarrow as pa
import torch
from torch import Tensor

from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import is_silent
from cosyvoice.utils.frontend_utils import contains_chinese, has_words

MIN_SECONDS, MAX_SECONDS = 0.5, 30.0
MIN_RATE_HZ, DULL_RATE_HZ = 4000, 16000  # below the first, speech cannot be understood
QUIET_DBFS = -30.0
FRAME_SECONDS = 0.02
PAUSE_DB = -40.0  # relative to the loudest frame; below this, a frame is a pause
ABOVE_NOISE_DB = 10.0  # a frame that rises less than this above the noise is a pause too,
LOUDEST_PAUSE_DB = -20.0  # unless it is above this
LONG_CUT_SECONDS = 1.0
CLIPPED_PAIRS = 10  # neighbouring samples that are both the largest
CONSTANT_SHARE = 0.1  # of a waveform's RMS, for its mean
PACES = {"chinese": (0.5, 15.0), "other": (1.5, 40.0)}  # possible characters a second
ODD_PACE = 1.7  # factor above or below the median
SAME_VOICE = 0.4  # cosine similarity of speaker vectors; clips of one voice lie above it
FEWEST_TO_COMPARE = 5  # clips


@dataclass
class Outcome:
    """The result for a recording. Unknown values are None; a recording that was kept has a row."""

    utt: str
    seconds: float | None = None  # after long pauses were cut off
    cut_seconds: float | None = None  # cut off both ends
    speech_tokens: int | None = None
    text_tokens: int | None = None
    characters_per_second: float | None = None  # of the text as written, not counting spaces
    peak_dbfs: float | None = None
    silence_share: float | None = None
    warnings: list[str] = field(default_factory=list)  # what makes a kept clip doubtful
    reason: str = ""  # why it was left out
    row: pa.Table | None = None  # one row of SCHEMA
    reused: bool = False  # the row comes from an earlier run


def check_waveform(wav: Tensor, rate: int, outcome: Outcome) -> None:
    """Measure a waveform (1, samples). Raises InputError if it cannot be trained on."""
    if not wav.isfinite().all():
        raise InputError("the audio has samples that are not numbers. Convert it again")
    outcome.seconds = wav.shape[1] / rate
    outcome.peak_dbfs = decibels(wav.abs().max())
    if rate < MIN_RATE_HZ:
        raise InputError(f"the audio has {rate} samples a second. It needs at least {MIN_RATE_HZ}")
    if outcome.seconds < MIN_SECONDS:
        raise InputError(f"the audio lasts {outcome.seconds:.3f} s. It must last at least {MIN_SECONDS} s")
    if outcome.seconds > MAX_SECONDS:
        raise InputError(f"the audio lasts {outcome.seconds:.3f} s. It may last at most {MAX_SECONDS:.0f} s")
    outcome.silence_share = silence_share(wav, rate)
    if is_silent(wav):
        raise InputError("the audio is silent. Record it again, or leave it out")


def check_pace(text: str, outcome: Outcome) -> None:
    """Raise InputError for a text without words, or one that nobody can speak in the clip's time."""
    outcome.characters_per_second = len("".join(text.split())) / outcome.seconds
    if not has_words(text):
        problem = "the text has nothing to speak" if text else "the text is empty"
        raise InputError(f"{problem}. Write down what the recording says")
    slowest, fastest = PACES["chinese" if contains_chinese(text) else "other"]
    if not slowest <= outcome.characters_per_second <= fastest:
        problem = f"the text has {outcome.characters_per_second:.1f} characters a second of audio"
        raise InputError(f"{problem}; {slowest:g} to {fastest:g} are possible. Check that it belongs to this clip")


def find_warnings(wav: Tensor, rate: int) -> list[str]:
    """Return the faults of a waveform (1, samples) that can still be trained on."""
    peak, largest = decibels(wav.abs().max()), wav == wav.abs().max()
    found = {
        f"it is quiet ({peak:.0f} dB below full scale)": peak < QUIET_DBFS,
        "it is clipped": int((largest[:, 1:] & largest[:, :-1]).sum()) >= CLIPPED_PAIRS,
        "it has a DC offset": bool(wav.mean().abs() > CONSTANT_SHARE * wav.square().mean().sqrt()),
        f"it has only {rate} samples a second, so the voice will sound dull": rate < DULL_RATE_HZ,
    }
    return [warning for warning, holds in found.items() if holds]


def compare(outcomes: Sequence[Outcome]) -> None:
    """Add warnings to kept clips that lost long pauses, or whose pace or voice differs from the others'."""
    kept = [outcome for outcome in outcomes if outcome.row is not None]
    for outcome in kept:
        if (outcome.cut_seconds or 0) > LONG_CUT_SECONDS:
            outcome.warnings.append(f"{outcome.cut_seconds:.1f} s of pause were cut off its ends")
    if len(kept) < FEWEST_TO_COMPARE:
        return
    usual = median(outcome.characters_per_second for outcome in kept)
    vectors = torch.tensor([outcome.row["utt_embedding"][0].as_py() for outcome in kept])  # (clips, 192)
    similarities = (vectors @ vectors.T).fill_diagonal_(0).sum(dim=1) / (len(kept) - 1)
    one_voice = similarities.median() > SAME_VOICE
    for outcome, similarity in zip(kept, similarities.tolist(), strict=True):
        pace = outcome.characters_per_second
        if not usual / ODD_PACE <= pace <= usual * ODD_PACE:
            warning = f"{pace:.0f} characters a second, where the others have about {usual:.0f}: check its text"
            outcome.warnings.append(warning)
        if one_voice and similarity < SAME_VOICE / 2:
            outcome.warnings.append("it sounds like another voice")


def trim_pauses(wav: Tensor, rate: int, seconds: float) -> Tensor:
    """Return the waveform (1, samples) with at most `seconds` of pause at each end.

    A frame of 20 ms is a pause if it is 40 dB below the loudest one, or less than 10 dB above the noise.
    """
    size, margin = round(FRAME_SECONDS * rate), round(seconds * rate)
    level = frame_decibels(wav, rate)
    pause = (level.quantile(0.1) + ABOVE_NOISE_DB).clamp(PAUSE_DB, LOUDEST_PAUSE_DB)
    loud = (level > pause).nonzero()
    first, last = int(loud[0]) * size, (int(loud[-1]) + 1) * size
    if last + size > wav.shape[1]:  # the rest is shorter than a frame
        last = wav.shape[1]
    return wav[:, max(0, first - margin) : last + margin]


def silence_share(wav: Tensor, rate: int) -> float:
    """Return the share of the 20 ms frames of (1, samples) that are at least 40 dB below the loudest one."""
    return (frame_decibels(wav, rate) <= PAUSE_DB).float().mean().item()


def frame_decibels(wav: Tensor, rate: int) -> Tensor:
    """Return the level (frames,) of each 20 ms frame of (1, samples), relative to the loudest one."""
    size = round(FRAME_SECONDS * rate)
    power = wav[0].unfold(0, size, size).square().mean(dim=1)
    return 10 * (power / power.max().clamp(min=1e-12)).clamp(min=1e-12).log10()


def decibels(amplitude: Tensor) -> float:
    """Return an amplitude's level relative to full scale, at least -120."""
    return 20 * amplitude.clamp(min=1e-6).log10().item()
