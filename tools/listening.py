"""Passes recordings and their texts to the judges."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from clips.checks import MIN_RATE_HZ
from clips.recordings import AUDIO_SUFFIXES, find_recordings
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import PROMPT_RATE_HZ, load_wav
from cosyvoice.utils.frontend_utils import has_words
from tools.judges import Judges, SpeakerJudge
from tools.measures import (
    Clip,
    ClipVoice,
    Heard,
    Units,
    Vector,
    centroid,
    characters,
    clip_voices,
    compare,
    pace,
    similarities,
    similarities_to_others,
    words_of,
)
from tools.recognisers import Recogniser
from utils import decode_text

MIN_VOICED_CLIPS = 2  # of each voice, since the target's are compared with each other


@dataclass
class Saying:
    """A recording and its text."""

    audio: Path
    text: str
    wav_16k: Tensor  # (1, samples)
    seed: int | None = None  # of speech made here

    @property
    def seconds(self) -> float:
        return self.wav_16k.shape[1] / PROMPT_RATE_HZ

    @property
    def words(self) -> Units:
        return words_of(self.text)


def read_sayings(folder: Path, all_needed: bool = True) -> list[Saying]:
    """Return the recordings of a folder with their texts.

    Raises InputError if a recording is unreadable or has no text with words, or if a text has no recording. Unless
    `all_needed`, it is reported and left out instead.
    """
    if not folder.is_dir():
        raise InputError(f"the folder of recordings {folder} does not exist")
    sayings = []
    for recording in find_recordings(folder):
        try:
            if recording.audio is None or recording.text is None:
                lacks = "no recording" if recording.audio is None else "no text"
                raise InputError(f"{folder / recording.utt} has {lacks}; every NNN.wav needs its NNN.txt")
            text = decode_text(recording.text_bytes(), f"{folder / recording.utt}.txt: the text")
            sayings.append(read_saying(recording.audio, text))
        except InputError as error:
            if all_needed:
                raise
            print(f"left out: {error}", file=sys.stderr)
    if len(sayings) < MIN_VOICED_CLIPS and not all_needed:
        raise InputError(f"{folder} has {len(sayings)} recordings with texts; at least {MIN_VOICED_CLIPS} are needed")
    return sayings


def read_saying(audio: Path, text: str, seed: int | None = None) -> Saying:
    if not has_words(text):
        raise InputError(f"the text of {audio} has no words to compare with")
    return Saying(audio, text, load_wav(audio, PROMPT_RATE_HZ, MIN_RATE_HZ), seed)


def read_voices(folder: Path, target: Path) -> dict[str, list[Tensor]]:
    """Return recordings (1, samples) at 16 kHz by voice: a voice for each folder in `folder` except the target's."""
    if not folder.is_dir():
        raise InputError(f"the folder of base voices {folder} does not exist")
    voices: dict[str, list[Tensor]] = {}
    for path in sorted(folder.glob("*/*")):
        if path.suffix.lower() in AUDIO_SUFFIXES and path.parent.resolve() != target.resolve():
            voices.setdefault(path.parent.name, []).append(load_wav(path, PROMPT_RATE_HZ, MIN_RATE_HZ))
    if not voices:
        raise InputError(f"{folder} has no recordings of base voices; put those of each into a folder of its name")
    return voices


def recognise(sayings: Sequence[Saying], judge: Recogniser) -> list[Heard]:
    clips = tqdm(sayings, desc=judge.name, unit="clip", leave=False)
    return [compare(judge.hear(saying.wav_16k), judge.expect(saying.text)) for saying in clips]


def judge_speech(sayings: Sequence[Saying], judges: Judges, seconds_per_character: float) -> list[Clip]:
    """Judge content, quality and duration; `judge_voices` judges the voices."""
    heard = {judge.unit: recognise(sayings, judge) for judge in judges.recognisers}
    return [
        Clip(
            name=saying.audio.stem,
            text=saying.text,
            seed=saying.seed,
            seconds=saying.seconds,
            duration_ratio=saying.seconds / (seconds_per_character * characters(saying.words)),
            contents={unit: clips[i] for unit, clips in heard.items()},
            quality=judges.quality.rate(saying.wav_16k),
        )
        for i, saying in enumerate(tqdm(sayings, desc="quality", unit="clip", leave=False))
    ]


def embed(wavs_16k: Sequence[Tensor], judge: SpeakerJudge) -> list[Vector | None]:
    return [judge.embed(wav_16k) for wav_16k in tqdm(wavs_16k, desc=judge.name, unit="clip", leave=False)]


def center(vectors: Sequence[Vector | None], voice: str) -> Vector:
    """Return the centroid of a voice. Raises InputError if too few clips have one."""
    present = [vector for vector in vectors if vector is not None]
    if len(present) < MIN_VOICED_CLIPS:
        raise InputError(f"{voice}: {len(present)} recordings have audible speech; give at least {MIN_VOICED_CLIPS}")
    return centroid(present)


def judge_voices(
    spoken: Sequence[Saying], originals: Sequence[Saying], bases: dict[str, list[Tensor]], judge: SpeakerJudge
) -> tuple[list[ClipVoice | None], list[ClipVoice | None]]:
    """Return the similarities of both sets to the target, who speaks the originals, and to the base voices.

    An original is compared with the other originals only.
    """
    target_vectors = embed([saying.wav_16k for saying in originals], judge)
    target = center(target_vectors, "the target speaker")
    centers = {voice: center(embed(wavs, judge), voice) for voice, wavs in bases.items()}
    vectors = embed([saying.wav_16k for saying in spoken], judge)
    return (
        clip_voices(vectors, similarities(vectors, target), centers),
        clip_voices(target_vectors, similarities_to_others(target_vectors), centers),
    )


def judge_all(
    spoken: Sequence[Saying],
    originals: Sequence[Saying],
    bases: dict[str, list[Tensor]],
    judges: Judges,
) -> tuple[list[Clip], list[Clip]]:
    """Judge the spoken clips and the target speaker's originals in the same way."""
    rate = original_pace(originals)
    sets = judge_speech(spoken, judges, rate), judge_speech(originals, judges, rate)
    for speaker_judge in judges.speakers:
        found = judge_voices(spoken, originals, bases, speaker_judge)
        for clips, voices in zip(sets, found, strict=True):
            for clip, voice in zip(clips, voices, strict=True):
                clip.voices[speaker_judge.name] = voice
    return sets


def original_pace(originals: Sequence[Saying]) -> float:
    """Return the target speaker's seconds per character."""
    return pace([saying.seconds for saying in originals], [saying.words for saying in originals])
