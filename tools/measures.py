"""The arithmetic of an evaluation: errors, durations and similarities of judged clips."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from cosyvoice.cli.text_normalizer import TextNormalizer
from cosyvoice.utils.frontend_utils import CHINESE

if TYPE_CHECKING:
    from torch import Tensor
    from whisper.normalizers import EnglishTextNormalizer

# Unseen sentences of 6 to 14 words last 0.85 to 1.36 times as long as their speaker's pace predicts (40 by each of
# flite's rms, slt, awb and kal16 and espeak-ng's en-us+f2, pace from 20 clips). With another sentence appended, all of
# rms's are above TALKS_ON_RATIO; with their last third cut off, 34 of 40 are below STOPS_EARLY_RATIO.
TALKS_ON_RATIO = 1.5
STOPS_EARLY_RATIO = 0.75
WRONG_TEXT_FLOOR = 0.8  # a judge that finds fewer errors in a wrong text hears what it expects, not what is said

WORD = re.compile(rf"{CHINESE.pattern}|[^\W\d_\u4e00-\u9fff]+(?:'[^\W\d_\u4e00-\u9fff]+)*|\d")

Units = list[str]  # words or phonemes
Vector = np.ndarray  # of norm 1


def words_of(text: str) -> Units:
    """Return the words as they are spoken, in lower case and without punctuation, ideographs one by one."""
    return WORD.findall(_spoken(text).lower().replace("’", "'"))


def english_words_of(text: str) -> Units:
    """Return the words as they are spoken, with one spelling for each English word.

    Contractions and titles are written in full, in American spelling, without accents and "um" (Radford et al. 2022,
    appendix C). A text that consists only of "um" keeps it.
    """
    words = words_of(text)
    return _english_normalizer()(" ".join(words)).split() or words


@cache
def _spoken(text: str) -> str:
    return _normalizer().normalize(text)


@cache
def _normalizer() -> TextNormalizer:
    return TextNormalizer(str.split)


@cache
def _english_normalizer() -> "EnglishTextNormalizer":
    from whisper.normalizers import EnglishTextNormalizer

    normalizer = EnglishTextNormalizer()
    normalizer.standardize_numbers = str  # keep numbers as words, since neighbouring digits would run together
    return normalizer


def count_errors(hypothesis: Units, reference: Units) -> int:
    """Return the least number of insertions, deletions and replacements between the two (Levenshtein 1966)."""
    row = list(range(len(reference) + 1))  # row[j]: errors between what was heard so far and reference[:j]
    for heard, unit_heard in enumerate(hypothesis, start=1):
        diagonal, row[0] = row[0], heard
        for j, expected in enumerate(reference, start=1):
            replaced = diagonal + (unit_heard != expected)
            diagonal, row[j] = row[j], min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]


@dataclass
class Heard:
    """The text that a judge heard in a clip and the text that is said there, in units joined by spaces."""

    heard: str
    said: str
    errors: int

    @property
    def error_rate(self) -> float:
        return self.errors / max(1, len(self.said.split()))


def compare(heard: Units, said: Units) -> Heard:
    return Heard(" ".join(heard), " ".join(said), count_errors(heard, said))


def error_rate(clips: Sequence[Heard]) -> float:
    """Return the errors of all clips divided by their units. It exceeds 1 if much is heard that nobody said."""
    return sum(clip.errors for clip in clips) / max(1, sum(len(clip.said.split()) for clip in clips))


def wrong_text_error_rate(clips: Sequence[Heard]) -> float | None:
    """Return the error rate of every clip against all sentences except its own, a control. None for one sentence."""
    sentences = {clip.said for clip in clips}
    if len(sentences) < 2:
        return None
    return error_rate([compare(clip.heard.split(), said.split()) for clip in clips for said in sentences - {clip.said}])


def characters(words: Units) -> int:
    return sum(map(len, words))


def pace(seconds: Sequence[float], sentences: Sequence[Units]) -> float:
    """Return the seconds per character of a speaker's clips."""
    return sum(seconds) / sum(map(characters, sentences))


def unit(vector: np.ndarray) -> Vector:
    return vector / np.linalg.norm(vector)


def centroid(vectors: Sequence[Vector]) -> Vector:
    """Return the normalised mean."""
    return unit(np.mean(vectors, axis=0))


def similarities(vectors: Sequence[Vector | None], center: Vector) -> list[float | None]:
    """Return cosine similarities to a centroid; None for clips without a voice."""
    return [None if vector is None else float(vector @ center) for vector in vectors]


def similarities_to_others(vectors: Sequence[Vector | None]) -> list[float | None]:
    """Return each clip's cosine similarity to the centroid of the others, which shows what the same voice reaches."""
    results: list[float | None] = []
    for own, vector in enumerate(vectors):
        others = [other for i, other in enumerate(vectors) if i != own and other is not None]
        results += similarities([vector], centroid(others))
    return results


@dataclass
class ClipVoice:
    """Cosine similarities of one clip to centroids."""

    target: float
    bases: dict[str, float]  # by base voice


@dataclass
class Quality:
    """Scores from 1 to 5 of the speech signal, the background and the overall quality."""

    sig: float
    bak: float
    ovr: float


@dataclass
class Clip:
    """A sentence and its judgements."""

    name: str
    text: str
    seed: int | None  # of speech made here
    seconds: float
    duration_ratio: float  # to the duration at the target speaker's pace
    contents: dict[str, Heard]  # by unit
    quality: Quality
    voices: dict[str, ClipVoice | None] = field(default_factory=dict)  # by speaker judge; None: no voice is heard


@dataclass
class ContentFigures:
    """Errors by units, which are words or phonemes."""

    error: float
    wrong_text_error: float | None  # None where all clips say the same


@dataclass
class VoiceFigures:
    """Means over the clips with a voice; None if there is nothing to compare."""

    similarity: float | None  # to the target's centroid
    nearest_base: str | None
    nearest_base_similarity: float | None
    margin: float | None  # of the target over the nearest base voice
    nearer_to_a_base: int | None  # clips
    without_voice: int  # clips


@dataclass
class Delivery:
    """How quickly speech was made, and how smoothly its pieces join; None where that was not measured."""

    real_time_factor: float | None = None  # seconds of work per second of speech
    first_sound_seconds: float | None = None  # of streams, the mean over the sentences
    seam_jump: float | None = None  # of streams, the largest of `seam_jump`


@dataclass
class Figures:
    """The results for a set of sentences."""

    sentences: int
    contents: dict[str, ContentFigures]  # by unit
    duration_ratio: float  # all seconds by all expected seconds
    duration_ratio_range: tuple[float, float]
    talk_on: int  # sentences above TALKS_ON_RATIO
    stop_early: int  # sentences below STOPS_EARLY_RATIO
    quality: Quality  # means
    voices: dict[str, VoiceFigures]  # by speaker judge
    delivery: Delivery


def clip_voices(
    vectors: Sequence[Vector | None], to_target: Sequence[float | None], bases: dict[str, Vector]
) -> list[ClipVoice | None]:
    """Return the clips' similarities to the target and to the base voices, given by their centroids."""
    return [
        None if vector is None else ClipVoice(target, {base: float(vector @ center) for base, center in bases.items()})
        for vector, target in zip(vectors, to_target, strict=True)
    ]


def figures(clips: Sequence[Clip], delivery: Delivery | None = None) -> Figures:
    ratios = [clip.duration_ratio for clip in clips]
    expected_seconds = sum(clip.seconds / clip.duration_ratio for clip in clips)
    return Figures(
        sentences=len(clips),
        contents={unit: content_figures([clip.contents[unit] for clip in clips]) for unit in clips[0].contents},
        duration_ratio=sum(clip.seconds for clip in clips) / expected_seconds,
        duration_ratio_range=(min(ratios), max(ratios)),
        talk_on=sum(ratio > TALKS_ON_RATIO for ratio in ratios),
        stop_early=sum(ratio < STOPS_EARLY_RATIO for ratio in ratios),
        quality=mean_quality([clip.quality for clip in clips]),
        voices={judge: voice_figures([clip.voices[judge] for clip in clips]) for judge in clips[0].voices},
        delivery=delivery or Delivery(),
    )


def content_figures(clips: Sequence[Heard]) -> ContentFigures:
    return ContentFigures(error_rate(clips), wrong_text_error_rate(clips))


def mean_quality(clips: Sequence[Quality]) -> Quality:
    return Quality(*np.mean([(clip.sig, clip.bak, clip.ovr) for clip in clips], axis=0).tolist())


def voice_figures(voices: Sequence[ClipVoice | None]) -> VoiceFigures:
    heard = [voice for voice in voices if voice is not None]
    similarity = nearest = nearest_similarity = margin = nearer = None
    if heard:
        similarity = float(np.mean([voice.target for voice in heard]))
    if heard and heard[0].bases:
        to_bases = {base: float(np.mean([voice.bases[base] for voice in heard])) for base in heard[0].bases}
        nearest = max(to_bases, key=to_bases.__getitem__)
        nearest_similarity = to_bases[nearest]
        margin = similarity - nearest_similarity
        nearer = sum(max(voice.bases.values()) > voice.target for voice in heard)
    return VoiceFigures(similarity, nearest, nearest_similarity, margin, nearer, len(voices) - len(heard))


def seam_jump(pieces: Sequence["Tensor"]) -> float:
    """Return the largest step between the samples on both sides of a seam, as a share of the largest within a piece.

    pieces: those of a stream, each (1, samples). 1 or less: no seam stands out from the speech itself.
    """
    seams = [abs(float(after[0, 0] - before[0, -1])) for before, after in pairwise(pieces)]
    within = max(float(piece.diff().abs().max()) for piece in pieces if piece.shape[1] > 1)
    return max(seams, default=0.0) / within
