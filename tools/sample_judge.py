"""The judge of samples that training speaks: can they be understood, and whose voice is it?"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cosyvoice.bin.sampling import Recording
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import PROMPT_RATE_HZ, resample
from cosyvoice.utils.frontend_utils import contains_chinese
from tools.judges import ResemblyzerJudge, SpeakerJudge
from tools.measures import Vector, centroid, compare
from tools.recognisers import Recogniser, WhisperRecogniser


@dataclass
class SampleJudge:
    """Counts wrong words, and compares voices with the mean of the speaker's recordings."""

    words: Recogniser
    voices: SpeakerJudge
    speaker: Vector | None  # None where the recordings hold no voice

    def __call__(self, speech: Tensor, rate_hz: int, text: str) -> dict[str, float]:
        """Return `word_error` and, where there is a voice, `similarity` of speech (1, samples) that says a text."""
        wav_16k = resample(speech, rate_hz, PROMPT_RATE_HZ)
        figures = {"word_error": compare(self.words.hear(wav_16k), self.words.expect(text)).error_rate}
        voice = self.voices.embed(wav_16k)
        if voice is not None and self.speaker is not None:
            figures["similarity"] = float(voice @ self.speaker)
        return figures


def open_sample_judge(recordings: Sequence[Recording], texts: Sequence[str]) -> SampleJudge | None:
    """Return the judge, or None after a line that says why the samples will not be judged.

    recordings: of the speaker. texts: to be judged, whose language follows from their letters.
    """
    try:
        words = WhisperRecogniser("zh" if any(map(contains_chinese, texts)) else "en")
        voices = ResemblyzerJudge()
    except InputError as error:
        print(f"samples are not judged: {error}", file=sys.stderr)
        return None
    found = (voices.embed(resample(own.speech, own.rate_hz, PROMPT_RATE_HZ)) for own in recordings)
    vectors = [vector for vector in found if vector is not None]
    return SampleJudge(words, voices, centroid(vectors) if vectors else None)
