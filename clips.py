"""From a recording and its text to one row of training data, or to the reason why there is none."""

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from clip_checks import MAX_SECONDS, Outcome, check_pace, check_waveform, warnings_of, without_edges
from clip_files import SCHEMA, encoders_of, with_column
from cosyvoice.cli.frontend import FRONTEND_PARTS, CosyVoiceFrontEnd
from cosyvoice.utils.audio import PROMPT_RATE_HZ, read_wav, resample
from cosyvoice.utils.checkpoint import fingerprint_file
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.frames import TOKEN_RATE_HZ
from cosyvoice.utils.model_yaml import load_model_yaml
from utils import decode_text, is_unicode

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")  # the first of a name counts
AUDIO_KINDS = " ".join(AUDIO_SUFFIXES)
TEXT_SUFFIXES = (".txt", ".normalized.txt")  # where both are there, the second counts
ROW_VERSION = "2"  # raise it when rows are made differently, so that old ones are made anew


@dataclass
class Recording:
    """An audio file and its text; one of them may be missing."""

    utt: str
    audio: Path | None
    text: Path | None


def find_recordings(folder: Path) -> list[Recording]:
    """Recordings and texts of a folder, paired by name, in the order of the names.

    Names are compared in Unicode's composed form, since some programs write "é" as two characters. Raises InputError
    where there is no recording, none has a text, or a file's name is in another encoding.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    for path in files:
        if not is_unicode(str(path)):
            raise InputError(f"the file name {path.name!r} in {folder} is not UTF-8; rename the file, 001.wav for one")
    audio: dict[str, Path] = {}
    for path in (path for suffix in AUDIO_SUFFIXES for path in files if path.suffix.lower() == suffix):
        utt = _composed(path.stem)
        audio[_composed(path.name) if utt in audio else utt] = path  # the second of a name gets no text
    texts: dict[str, Path] = {}
    for suffix in TEXT_SUFFIXES:
        texts |= {_composed(path.name[: -len(suffix)]): path for path in files if path.name.lower().endswith(suffix)}
    texts = {utt: path for utt, path in texts.items() if not utt.lower().endswith(".normalized")}
    if not audio:
        raise InputError(f"{folder} holds no recording ({AUDIO_KINDS}); put 001.wav and 001.txt there")
    if not audio.keys() & texts.keys():
        raise InputError(f"no recording in {folder} has a text; put 001.txt beside 001.wav")
    return [Recording(utt, audio.get(utt), texts.get(utt)) for utt in sorted(audio.keys() | texts.keys())]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


class ClipMaker:
    """Makes rows with the front end of a model folder, from several threads at once.

    `known` holds rows of earlier runs by content hash. `edge_seconds` of pause stay before and after speech; None
    leaves recordings as they are. Raises InputError for a folder that does not serve.
    """

    def __init__(
        self, model_dir: Path, device: str, known: dict[str, pa.Table], edge_seconds: float | None = None
    ) -> None:
        parts = load_model_yaml(model_dir / "cosyvoice.yaml", parts=FRONTEND_PARTS)
        self.sample_rate = parts["sample_rate"]
        self.frontend = CosyVoiceFrontEnd(
            parts["get_tokenizer"],
            parts["feat_extractor"],
            model_dir / "campplus.onnx",
            model_dir / "speech_tokenizer_v1.onnx",
            allowed_special=parts["allowed_special"],
            sample_rate=self.sample_rate,
            device=device,
        )
        self.frontend.encode("")  # what is wrong with the folder shows here, not clip by clip
        self.frontend.speech_tokenizer.open()
        self.frontend.speaker_encoder.open()
        self.known, self.edge_seconds = known, edge_seconds
        self._encoders = encoders_of(model_dir)
        yaml = fingerprint_file(model_dir / "cosyvoice.yaml")
        how = [ROW_VERSION, edge_seconds, self.frontend.normalizer.wetext, yaml, self._encoders]
        self._made_with = " ".join(map(str, how)).encode()

    def make(self, recording: Recording) -> Outcome:
        """The recording's row, from an earlier run where nothing changed, or the reason why it has none."""
        outcome = Outcome(recording.utt)
        try:
            if recording.audio is None or recording.text is None:
                no_recording = f"it has no recording ({AUDIO_KINDS}; convert others)"
                raise InputError(no_recording if recording.audio is None else "it has no text")
            audio_data, text_data = recording.audio.read_bytes(), recording.text.read_bytes()
            wav, rate = read_wav(recording.audio, MAX_SECONDS)
            wav = self._judge(outcome, wav, rate)
            text = decode_text(text_data)
            check_pace(text, outcome)
            content_hash = self._hash(audio_data, text_data)
            names = {"utt": recording.utt, "wav": str(recording.audio)}
            row = self.known.get(content_hash)
            if row is None:
                origin = {"audio_data": audio_data, "content_hash": content_hash, "encoders": self._encoders}
                row = pa.Table.from_pylist([names | origin | self._columns(outcome, wav, rate, text)], SCHEMA)
            else:  # the files may have had other names
                for name, value in names.items():
                    row = with_column(row, name, [value])
                counts = [len(row[name][0]) for name in ("speech_token", "text_token")]
                (outcome.speech_tokens, outcome.text_tokens), outcome.reused = counts, True
            outcome.row = row
        except (InputError, OSError) as error:
            outcome.reason = str(error)
        return outcome

    def _hash(self, audio_data: bytes, text_data: bytes) -> str:
        digests = [hashlib.sha256(part).digest() for part in (self._made_with, audio_data, text_data)]
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def _judge(self, outcome: Outcome, wav: Tensor, rate: int) -> Tensor:
        """Measure a waveform (1, samples), and return it without long pauses at its ends.

        Raises InputError where it is no use for training.
        """
        check_waveform(wav, rate, outcome)
        outcome.warnings += warnings_of(wav, rate)
        if self.edge_seconds is not None:
            whole, wav = wav, without_edges(wav, rate, self.edge_seconds)
            outcome.cut_seconds = (whole.shape[1] - wav.shape[1]) / rate
            check_waveform(wav, rate, outcome)
        return wav

    def _columns(self, outcome: Outcome, wav: Tensor, rate: int, text: str) -> dict[str, Any]:
        """What the model makes of a clip; as much of it as is known goes into the outcome, too."""
        text_token = self._text_tokens(text)
        outcome.text_tokens = len(text_token)
        features = self._features(wav, rate)
        outcome.speech_tokens = len(features["speech_token"])
        _check_token_rate(outcome)
        measures = {name: getattr(outcome, name) for name in ("seconds", "peak_dbfs", "silence_share")}
        return {"text": text, "text_token": text_token, **features, **measures}

    def _text_tokens(self, text: str) -> list[int]:
        return self.frontend.encode(self.frontend.text_normalize(text, split=False))

    def _features(self, wav: Tensor, rate: int) -> dict[str, Any]:
        """wav: (1, samples)."""
        wav = wav / wav.abs().max().clamp(min=1)  # decoders of lossy formats overshoot full scale
        wav_16k = resample(wav, rate, PROMPT_RATE_HZ)
        tokens = self.frontend.speech_tokenizer(wav_16k)[0]  # (N,)
        vector = self.frontend.speaker_encoder(wav_16k)[0]  # (192,)
        mel = self.frontend.feat_extractor(resample(wav, rate, self.sample_rate))[0].T  # (80, T) -> (T, 80)
        return {
            "utt_embedding": torch.nn.functional.normalize(vector, dim=0).numpy(),
            "speech_token": tokens.numpy(),
            "speech_feat": mel.flatten().numpy(),
            "speech_feat_shape": list(mel.shape),
        }


def _check_token_rate(outcome: Outcome) -> None:
    expected = outcome.seconds * TOKEN_RATE_HZ
    if abs(outcome.speech_tokens - expected) > 0.1 * expected + 5:
        raise InputError(
            f"the speech tokenizer gave {outcome.speech_tokens} tokens for {outcome.seconds:.1f} s, not "
            f"{TOKEN_RATE_HZ} a second; use speech_tokenizer_v1.onnx of CosyVoice-300M"
        )
