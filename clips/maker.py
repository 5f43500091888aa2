"""Makes a row of training data from a recording and its text, or gives the reason why there is none."""

import hashlib
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from clips.checks import MAX_SECONDS, Outcome, check_pace, check_waveform, find_warnings, trim_pauses
from clips.recordings import AUDIO_KINDS, Recording
from clips.store import with_column
from cosyvoice.cli.frontend import FRONTEND_PARTS, open_front_end
from cosyvoice.model_folder.fingerprints import fingerprint_file
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import PROMPT_RATE_HZ, aligned, read_wav, resample
from dataset import SCHEMA
from utils import decode_text

ROW_VERSION = "2"  # raise it when rows are made differently, so that old ones are replaced


class ClipMaker:
    """Makes rows with the front end of a model folder, from several threads at once.

    `known` holds rows of earlier runs by content hash. `edge_seconds` of pause stay before and after speech; with None
    recordings stay as they are. Raises InputError if the folder is incomplete or damaged.
    """

    def __init__(
        self, folder: ModelFolder, device: str, known: dict[str, pa.Table], edge_seconds: float | None = None
    ) -> None:
        self.frontend = open_front_end(folder, folder.parts(FRONTEND_PARTS), device)
        self.generation, self.rates = folder.generation, folder.rates
        self.frontend.encode("")  # a fault of the folder shows here, not clip by clip
        self.frontend.speech_tokenizer.open()
        self.frontend.speaker_encoder.open()
        self.known, self.edge_seconds = known, edge_seconds
        self.encoders = folder.encoders()
        yaml = fingerprint_file(folder.yaml)
        origin = [ROW_VERSION, edge_seconds, self.frontend.normalizer.wetext, yaml, self.encoders]
        self._made_with = " ".join(map(str, origin)).encode()

    def make(self, recording: Recording) -> Outcome:
        """Return the recording's row, taken from an earlier run if nothing changed, or the reason why it has none."""
        outcome = Outcome(recording.utt)
        try:
            _check_complete(recording)
            audio_data, text_data = recording.audio.read_bytes(), recording.text_bytes()
            wav, rate = read_wav(recording.audio, MAX_SECONDS)
            wav = self._check_and_trim(outcome, wav, rate)
            text = decode_text(text_data)
            check_pace(text, outcome)
            if self.frontend.unknown_letters(text):
                outcome.warnings.append("its text has letters that this model was not trained on")
            content_hash = self._hash(audio_data, text_data)
            names = {"utt": recording.utt, "wav": str(recording.audio)}
            row = self.known.get(content_hash)
            if row is None:
                origin = {"audio_data": audio_data, "content_hash": content_hash, "encoders": self.encoders}
                row = pa.Table.from_pylist([names | origin | self._columns(outcome, wav, rate, text)], SCHEMA)
            else:  # the files may have had other names
                for name, value in names.items():
                    row = with_column(row, name, [value])
                counts = [len(row[name][0]) for name in ("speech_token", "text_token")]
                (outcome.speech_tokens, outcome.text_tokens), outcome.reused = counts, True
            outcome.row = row
        except InputError as error:
            outcome.reason = str(error)
        except OSError as error:
            outcome.reason = f"{error.filename} cannot be read: {error.strerror}"
        return outcome

    def _hash(self, audio_data: bytes, text_data: bytes) -> str:
        digests = [hashlib.sha256(part).digest() for part in (self._made_with, audio_data, text_data)]
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def _check_and_trim(self, outcome: Outcome, wav: Tensor, rate: int) -> Tensor:
        """Measure a waveform (1, samples), and return it without long pauses at its ends.

        Raises InputError if it cannot be trained on.
        """
        check_waveform(wav, rate, outcome)
        outcome.warnings += find_warnings(wav, rate)
        if self.edge_seconds is not None:
            whole, wav = wav, trim_pauses(wav, rate, self.edge_seconds)
            outcome.cut_seconds = (whole.shape[1] - wav.shape[1]) / rate
            check_waveform(wav, rate, outcome)
        return wav

    def _columns(self, outcome: Outcome, wav: Tensor, rate: int, text: str) -> dict[str, Any]:
        """Return the columns that the model computes from a clip, and note in `outcome` what is known so far."""
        text_token = self._text_tokens(text)
        outcome.text_tokens = len(text_token)
        features = self._features(outcome, wav, rate)
        measures = {name: getattr(outcome, name) for name in ("seconds", "peak_dbfs", "silence_share")}
        return {"text": text, "text_token": text_token, **features, **measures}

    def _text_tokens(self, text: str) -> list[int]:
        return self.frontend.encode(self.frontend.text_normalize(text, split=False))

    def _features(self, outcome: Outcome, wav: Tensor, rate: int) -> dict[str, Any]:
        """Return the speaker vector, the speech tokens and the mel of (1, samples).

        If a token lasts a whole number of frames, tokens and mel end together: zeros fill the last token, and the
        longer of the two is cut.
        """
        wav = wav / wav.abs().max().clamp(min=1)  # decoders of lossy formats overshoot full scale
        wav_16k = resample(wav, rate, PROMPT_RATE_HZ)
        tokens = self.frontend.speech_tokenizer(wav_16k)[0]  # (N,)
        outcome.speech_tokens = len(tokens)
        self._check_token_rate(outcome)
        vector = self.frontend.speaker_encoder(wav_16k)[0]  # (192,)
        speech = resample(wav, rate, self.rates.sample_rate)
        if self.rates.token_mel_ratio:
            speech, tokens = aligned(speech, tokens, self.rates.samples_per_token)
            outcome.speech_tokens = len(tokens)
        mel = self.frontend.feat_extractor(speech)[0].T  # (80, T) -> (T, 80)
        return {
            "utt_embedding": torch.nn.functional.normalize(vector, dim=0).numpy(),
            "speech_token": tokens.numpy(),
            "speech_feat": mel.flatten().numpy(),
            "speech_feat_shape": list(mel.shape),
        }

    def _check_token_rate(self, outcome: Outcome) -> None:
        """Raise InputError if the number of tokens shows that another model's tokenizer made them."""
        expected = outcome.seconds * self.rates.token_rate
        if abs(outcome.speech_tokens - expected) > 0.1 * expected + 5:
            raise InputError(
                f"the speech tokenizer gave {outcome.speech_tokens} tokens for {outcome.seconds:.1f} s, not "
                f"{self.rates.token_rate} a second. Use {self.generation.speech_tokenizer} of {self.generation.name}"
            )


def _check_complete(recording: Recording) -> None:
    if recording.audio is None:
        raise InputError(f"it has no recording. Convert its audio to {AUDIO_KINDS}")
    if recording.text is None and recording.similar:
        raise InputError(f"it has no text. Did you mean {recording.similar.name}? Rename that to {recording.utt}.txt")
    if recording.text is None:
        raise InputError("it has no text. Add its text, or remove the recording")
