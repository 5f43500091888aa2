"""Who judges speech: what is said (pocketsphinx or Whisper), and in whose voice (Resemblyzer, the model's encoder).

Nothing here was trained by this suite but the last. The judges' packages are in requirements-eval.txt and no
dependency of the suite: each is imported when it is asked for.
"""

import pickle
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor
from tqdm import tqdm

from cosyvoice.utils.audio import MAX_PROMPT_SECONDS, PROMPT_RATE_HZ
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.speech_encoders import SpeakerEncoder
from tools.bigram import Bigram
from tools.measures import Vector, Words, unit

PCM_PEAK = 32767  # largest 16-bit sample
MIN_VOICED_SECONDS = 0.3  # with less speech than this, nobody can tell whose it is


class Judge(Protocol):
    """Writes down what is said."""

    def transcribe(self, wavs_16k: Sequence[Tensor], sentences: Sequence[Words]) -> list[str]:
        """What is heard in each of (1, samples) at 16 kHz, empty where nothing is.

        A judge may expect the words of the sentences, all alike in every recording, but not which belongs to which.
        """

    def unknown_words(self, sentences: Sequence[Words]) -> list[str]:
        """Those that the judge can never hear: each counts as an error, however well it is spoken."""


class SpeakerJudge(Protocol):
    """Tells voices apart."""

    name: str

    def embed(self, wav_16k: Tensor) -> Vector | None:
        """The voice of (1, samples) at 16 kHz as a vector of norm 1, to be compared by cosine; None without a voice."""


@contextmanager
def optional() -> Iterator[None]:
    """Import what is no dependency of the suite inside. Raises InputError with the remedy where it is missing."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"a package of the judges is missing ({error}); run: make eval") from None


class PocketsphinxJudge:
    """English, offline. A bigram model of the sentences says which words to expect.

    So it hears clean speech almost without errors, and still hears another sentence as another. Noise disturbs it much.
    """

    def __init__(self) -> None:
        with optional():
            import pocketsphinx

        self.decoder = pocketsphinx.Decoder(lm=None, samprate=PROMPT_RATE_HZ, loglevel="FATAL")

    def transcribe(self, wavs_16k: Sequence[Tensor], sentences: Sequence[Words]) -> list[str]:
        if len(self.unknown_words(sentences)) == len(vocabulary(sentences)):
            raise InputError("pocketsphinx knows no word of the sentences, only English; use --judge whisper")
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".arpa") as file:
            file.write(Bigram(sentences).arpa())
            file.flush()
            self.decoder.add_lm_file("sentences", file.name)
        self.decoder.activate_search("sentences")
        return [self._transcribe(wav_16k) for wav_16k in tqdm(wavs_16k, desc="pocketsphinx", unit="clip", leave=False)]

    def _transcribe(self, wav_16k: Tensor) -> str:
        pcm = (wav_16k[0].clamp(-1, 1) * PCM_PEAK).round().numpy().astype(np.int16)
        self.decoder.reinit_feat()  # or what was heard before would have an influence
        self.decoder.start_utt()
        self.decoder.process_raw(pcm.tobytes(), full_utt=True)
        self.decoder.end_utt()
        hypothesis = self.decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""

    def unknown_words(self, sentences: Sequence[Words]) -> list[str]:
        return [word for word in vocabulary(sentences) if self.decoder.lookup_word(word) is None]


def vocabulary(sentences: Sequence[Words]) -> list[str]:
    return sorted({word for sentence in sentences for word in sentence})


class WhisperJudge:
    """Any language, with weights that the user has. It is told nothing of the sentences."""

    def __init__(self, weights: Path | None, device: str) -> None:
        if weights is None or not weights.is_file():
            given = f"; {weights} does not exist" if weights else ""
            raise InputError(f"--judge whisper needs --whisper-weights FILE, a .pt of OpenAI's Whisper{given}")
        import whisper

        try:
            self.model = whisper.load_model(str(weights.resolve()), device)  # a path is never downloaded
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{weights} is no Whisper model or damaged ({type(error).__name__})") from None

    def transcribe(self, wavs_16k: Sequence[Tensor], sentences: Sequence[Words]) -> list[str]:
        options = {"temperature": 0.0, "condition_on_previous_text": False, "fp16": self.model.device.type != "cpu"}
        clips = tqdm(wavs_16k, desc="whisper", unit="clip", leave=False)
        return [self.model.transcribe(wav_16k[0].numpy(), **options)["text"].strip() for wav_16k in clips]

    def unknown_words(self, sentences: Sequence[Words]) -> list[str]:
        return []


def open_judge(name: str, whisper_weights: Path | None, device: str) -> Judge:
    """`pocketsphinx` or `whisper`. Raises InputError where it is missing."""
    return PocketsphinxJudge() if name == "pocketsphinx" else WhisperJudge(whisper_weights, device)


class ResemblyzerJudge:
    """The encoder in Resemblyzer's package (Wan et al. 2018, "Generalized End-to-End Loss for Speaker Verification").

    Clips of one voice of flite or espeak-ng lie at .93 to .96 from its centroid, and at about .57 from another's.
    """

    name = "Resemblyzer"

    def __init__(self) -> None:
        with optional():
            import resemblyzer

        self.encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
        self.preprocess = resemblyzer.preprocess_wav

    def embed(self, wav_16k: Tensor) -> Vector | None:
        if not wav_16k.any():
            return None  # silence cannot be made louder
        voiced = self.preprocess(wav_16k[0].numpy())  # louder, and without pauses
        if len(voiced) < MIN_VOICED_SECONDS * PROMPT_RATE_HZ:
            return None
        return unit(self.encoder.embed_utterance(voiced))


class ModelSpeakerJudge:
    """The speaker encoder of the model itself: what its training aimed at, and so no independent witness."""

    name = "campplus.onnx"

    def __init__(self, model_dir: Path) -> None:
        self.encoder = SpeakerEncoder(model_dir / "campplus.onnx", device="cpu")
        self.encoder.open()

    def embed(self, wav_16k: Tensor) -> Vector | None:
        if not wav_16k.any() or wav_16k.shape[1] < MIN_VOICED_SECONDS * PROMPT_RATE_HZ:
            return None
        wav_16k = wav_16k[:, : MAX_PROMPT_SECONDS * PROMPT_RATE_HZ]  # a sentence that talks on is judged all the same
        return unit(self.encoder(wav_16k)[0].numpy())


def open_speaker_judges(model_dir: Path) -> list[SpeakerJudge]:
    """The independent one first. Raises InputError where one is missing."""
    return [ResemblyzerJudge(), ModelSpeakerJudge(model_dir)]
