"""The steps from parquet rows to padded batches, as the `data_pipeline` of cosyvoice.yaml chains them.

Each step is a generator over what the step before yields: sample dicts up to `batch`, then lists of
samples, then the padded dict. `mode` (train or dev) belongs to the common signature of the steps; only
`tokenize` and `equalize` depend on it.
"""

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.dataset.batching import Sample, frame_count, padded, runs, runs_of_frames, token_tensors
from cosyvoice.dataset.parquet import VECTORS, is_intact, rows
from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.phones import PhoneTokenizer
from cosyvoice.tokenizer.qwen import QwenTokenizer
from cosyvoice.tokenizer.tokenizer import ByteTokenizer
from cosyvoice.utils import audio
from cosyvoice.utils.pitch import pitch_track

FRAMES_PER_SECOND = 100  # the frames of 10 ms that `filter` counts in
LOWEST_COLOUR_HZ = 100.0
PLACES_SLACK = 0.4  # of their number: a recording may go on after its last phone

logger = logging.getLogger(__name__)


def parquet_opener(data: Iterable[Sample], mode: str = "train") -> Iterator[Sample]:
    """{'src': path of a parquet file} -> one sample a row, with the row's columns added.

    Rows with a missing or damaged value are left out, with a warning. Raises InputError for a file that cannot be read.
    """
    for sample in data:
        for row in rows(sample["src"]):
            if damaged := [name for name, value in row.items() if not is_intact(name, value)]:
                reason = f"its {', '.join(damaged)} is missing or damaged"
                logger.warning("utterance %s of %s is left out: %s", row.get("utt"), sample["src"], reason)
            else:
                yield {**sample, **row}


def preferences(data: Iterable[Sample], mode: str = "train") -> Iterator[Sample]:
    """Leave out samples without `reject_speech_token`, the tokens that preference training teaches to avoid."""
    for sample in data:
        _check_columns(sample, "reject_speech_token")
        rejected = sample["reject_speech_token"]
        if rejected is not None and len(rejected):
            yield sample


def _check_columns(sample: Sample, *names: str) -> None:
    """Raise InputError if the file that a sample is from lacks one of the columns."""
    if missing := [name for name in names if name not in sample]:
        remedy = "make it anew with tools/make_parquet_list.py"
        raise InputError(f"{sample.get('src')} has no column {', '.join(missing)}; {remedy}")


def tokenize(
    data: Iterable[Sample],
    get_tokenizer: Callable[[], Any],
    allowed_special: str | set[str],
    spelled_share: float = 0.0,
    mode: str = "train",
) -> Iterator[Sample]:
    """Add `text_token`, the ids of `text`.

    Tokenizers that go word by word also give `word_token_counts`, how many ids each word of `text.split()` has.
    spelled_share: in training, this share of the words is written in letters though a PhoneTokenizer knows its phones.

    Raises InputError for a spelled_share that is not from 0 to 1, or above 0 with another tokenizer.
    """
    tokenizer = get_tokenizer()
    if not 0 <= spelled_share <= 1:
        raise InputError(f"tokenize: spelled_share is {spelled_share}. Give a number from 0 to 1")
    if spelled_share and not isinstance(tokenizer, PhoneTokenizer):
        raise InputError("tokenize: spelled_share works only with get_phone_tokenizer. Leave it out")
    spelling = (lambda: random.random() < spelled_share,) if spelled_share and mode == "train" else ()
    for sample in data:
        _check_columns(sample, "text")
        if isinstance(tokenizer, ByteTokenizer | QwenTokenizer):
            words = tokenizer.encode_words(sample["text"], *spelling)
            counts = [len(word) for word in words]
            yield {**sample, "text_token": [number for word in words for number in word], "word_token_counts": counts}
        else:
            yield {**sample, "text_token": tokenizer.encode(sample["text"], allowed_special=allowed_special)}


def read_places(data: Iterable[Sample], places_a_token: int = 1, mode: str = "train") -> Iterator[Sample]:
    """Add `text_place` (S,), which text token each speech token says, from the .places beside the recording.

    The file holds a number w + f for each speech token: it says word w of `text.split()`, and the share 0 <= f < 1 of
    that word is over. So the numbers do not depend on how a word is written. places_a_token: so many numbers a token,
    where the file was written for a higher token rate; the one in its middle counts.

    Raises InputError where the file is missing, holds something else, is for another token rate, or names a word that
    the text does not have.
    """
    for sample in data:
        path = Path(sample["wav"]).with_suffix(".places")
        if "word_token_counts" not in sample:
            raise InputError("read_places needs a tokenizer that goes word by word. Use get_phone_tokenizer, for one")
        counts = np.array(sample["word_token_counts"])
        try:
            places = np.array([float(place) for place in path.read_text(encoding="utf-8").split()])
        except (OSError, ValueError) as error:
            raise InputError(f"{path} does not tell places in the text: {error}. Make it again") from None
        if not (len(places) and np.all((places >= 0) & (places < len(counts)))):
            raise InputError(f"{path} is empty, or names a word that the text does not have. Make it again")
        expected = places_a_token * len(sample["speech_token"])
        if abs(len(places) - expected) > PLACES_SLACK * expected + 2 * places_a_token:
            problem = f"{path} has {len(places)} numbers, and places_a_token {places_a_token} asks for {expected}"
            raise InputError(f"{problem}. Correct places_a_token, or make the file again")
        word = places.astype(int)
        through = ((places - word) * counts[word]).astype(int)  # below counts[word], since the share is below 1
        text_place = torch.from_numpy((np.cumsum(counts) - counts)[word] + through)
        index = torch.arange(len(sample["speech_token"])) * places_a_token + places_a_token // 2
        index = index.clamp(max=len(places) - 1)  # rounding: a token more
        yield {**sample, "text_place": text_place[index]}


def filter(
    data: Iterable[Sample],
    max_length: int = 10240,
    min_length: int = 10,
    token_max_length: int = 200,
    token_min_length: int = 1,
    min_output_input_ratio: float = 0.0005,
    max_output_input_ratio: float = 1.0,
    mode: str = "train",
) -> Iterator[Sample]:
    """Decodes `audio_data` to `speech` (1, samples) at `sample_rate` Hz, and drops what cannot teach.

    Dropped are clips outside `min_length` to `max_length` (frames of 10 ms), texts outside
    `token_min_length` to `token_max_length`, clips with fewer or more text tokens a frame than the two
    ratios, clips without speech tokens, and audio that cannot be decoded (with a warning).
    """
    for sample in data:
        _check_columns(sample, "audio_data", "speech_token")
        try:
            speech, sample_rate = audio.read_wav(BytesIO(sample.pop("audio_data")))
        except InputError as error:
            logger.warning("utterance %s is left out: %s", sample.get("utt"), error)
            continue
        frames = speech.size(1) / sample_rate * FRAMES_PER_SECOND
        texts = len(sample["text_token"])
        if (
            min_length <= frames <= max_length
            and token_min_length <= texts <= token_max_length
            and min_output_input_ratio <= texts / frames <= max_output_input_ratio
            and len(sample["speech_token"]) > 0
        ):
            yield {**sample, "speech": speech, "sample_rate": sample_rate}


def resample(
    data: Iterable[Sample], resample_rate: int, min_sample_rate: int = 16000, mode: str = "train"
) -> Iterator[Sample]:
    """`speech` at `resample_rate` Hz, its peak at most 1; drops clips of less than `min_sample_rate` Hz."""
    for sample in data:
        if sample["sample_rate"] < min_sample_rate:
            continue
        speech = audio.resample(sample["speech"], sample["sample_rate"], resample_rate)
        speech = speech / speech.abs().max().clamp(min=1)
        yield {**sample, "speech": speech, "sample_rate": resample_rate}


def truncate(data: Iterable[Sample], truncate_length: int = 24576, mode: str = "train") -> Iterator[Sample]:
    """A random window of `truncate_length` samples of `speech`; shorter clips get zeros at the end.

    `is_window` says that `speech_token` is of the whole recording and `speech` is not.
    """
    for sample in data:
        speech = sample["speech"]  # (1, samples)
        spare = speech.size(1) - truncate_length
        if spare > 0:
            start = random.randint(0, spare)
            speech = speech[:, start : start + truncate_length]
        yield {**sample, "speech": F.pad(speech, (0, truncate_length - speech.size(1))), "is_window": True}


def equalize(
    data: Iterable[Sample], sample_rate: int, bands: int = 8, spread_db: float = 4.0, mode: str = "train"
) -> Iterator[Sample]:
    """Colours `speech` by a random smooth curve, for training only: other rooms, microphones and throats.

    The curve goes through `bands` points, evenly spaced in octaves from 100 Hz to half the rate, each drawn from a
    normal distribution of `spread_db`.
    """
    for sample in data:
        if mode == "train":
            gains = np.array([random.gauss(0, spread_db) for _ in range(bands)])
            speech = _coloured(sample["speech"], sample_rate, gains)
            sample = {**sample, "speech": speech / speech.abs().max().clamp(min=1)}
        yield sample


def _coloured(speech: Tensor, sample_rate: int, gains_db: np.ndarray) -> Tensor:
    """speech (1, samples) with a gain at each frequency, interpolated in octaves."""
    samples = speech.size(1)
    hz = np.fft.rfftfreq(samples, 1 / sample_rate)
    points = np.linspace(np.log(LOWEST_COLOUR_HZ), np.log(sample_rate / 2), len(gains_db))
    gain = 10 ** (np.interp(np.log(hz.clip(min=1)), points, gains_db) / 20)
    return torch.fft.irfft(torch.fft.rfft(speech) * torch.from_numpy(gain).float(), samples)


def compute_fbank(
    data: Iterable[Sample],
    feat_extractor: Callable[[Tensor], Tensor],
    num_frames: int | None = None,
    mode: str = "train",
) -> Iterator[Sample]:
    """Adds `speech_feat` (T, M), the log-mel of `speech`.

    num_frames: samples of a speech token, for models whose tokens and mel frames must fit together, see `_aligned`.
    """
    for sample in data:
        sample = _aligned(sample, num_frames)
        mel = feat_extractor(sample["speech"])  # (1, M, T)
        yield {**sample, "speech_feat": mel.squeeze(0).transpose(0, 1)}  # (1, M, T) -> (T, M)


def compute_whisper_fbank(
    data: Iterable[Sample], num_frames: int | None = None, mode: str = "train"
) -> Iterator[Sample]:
    """Adds `whisper_feat` (T, 128), what the speech tokenizer hears of `speech`, 100 frames a second.

    num_frames: as in `compute_fbank`.
    """
    for sample in data:
        sample = _aligned(sample, num_frames)
        wav_16k = audio.resample(sample["speech"], sample["sample_rate"], audio.PROMPT_RATE_HZ)
        features = audio.whisper_log_mel(wav_16k)  # (1, 128, T)
        yield {**sample, "whisper_feat": features.squeeze(0).transpose(0, 1)}  # (1, 128, T) -> (T, 128)


def _aligned(sample: Sample, token_samples: int | None) -> Sample:
    """Return the sample with as many speech tokens as `speech` lasts, which ends with a whole token.

    A window of a recording stays as it is, since its tokens are those of the whole: zeros at its end would be sound
    that the vocoder learns.
    """
    if token_samples is None or sample.get("is_window"):
        return sample
    speech, tokens = audio.aligned(sample["speech"], sample["speech_token"], token_samples)
    return {**sample, "speech": speech, "speech_token": tokens}


def compute_f0(data: Iterable[Sample], sample_rate: int, hop_size: int, mode: str = "train") -> Iterator[Sample]:
    """Adds `pitch_feat` (T,), the pitch of `speech` in Hz at each mel frame, 0 where there is no voice."""
    for sample in data:
        yield {**sample, "pitch_feat": pitch_track(sample["speech"], sample_rate, hop_size)}


def parse_embedding(data: Iterable[Sample], normalize: bool, mode: str = "train") -> Iterator[Sample]:
    """Turns `utt_embedding` and `spk_embedding` into float32 tensors (192,), of length 1 when `normalize`."""
    for sample in data:
        _check_columns(sample, *VECTORS)
        vectors = {name: torch.tensor(sample[name], dtype=torch.float32) for name in VECTORS}
        if normalize:
            vectors = {name: F.normalize(vector, dim=0) for name, vector in vectors.items()}
        yield {**sample, **vectors}


def shuffle(data: Iterable[Sample], shuffle_size: int = 10000, mode: str = "train") -> Iterator[Sample]:
    """Shuffles through a buffer of `shuffle_size` samples, with Python's global generator.

    A full buffer gives half of its samples and keeps the rest, so that a sample may travel further than one
    buffer.
    """
    buffer: list[Sample] = []
    for sample in data:
        buffer.append(sample)
        if len(buffer) >= shuffle_size:
            random.shuffle(buffer)
            yield from buffer[: shuffle_size // 2]
            buffer = buffer[shuffle_size // 2 :]
    random.shuffle(buffer)
    yield from buffer


def sort(data: Iterable[Sample], sort_size: int = 500, mode: str = "train") -> Iterator[Sample]:
    """Sorts runs of `sort_size` samples by frames, so that a batch holds similar lengths."""
    for buffer in runs(data, sort_size):
        yield from sorted(buffer, key=frame_count)


def batch(
    data: Iterable[Sample],
    batch_type: str = "static",
    batch_size: int = 16,
    max_frames_in_batch: int = 12000,
    mode: str = "train",
) -> Iterator[list[Sample]]:
    """Lists of samples: `batch_size` of them (static), or what `max_frames_in_batch` admits (dynamic).

    Frames are those of the mel spectrogram, or the speech tokens of samples without one.
    """
    if batch_type == "static":
        return runs(data, batch_size)
    if batch_type == "dynamic":
        return runs_of_frames(data, max_frames_in_batch)
    raise InputError(f"batch_type {batch_type!r} is not known; use 'static' or 'dynamic'")


def padding(
    data: Iterable[list[Sample]], use_spk_embedding: bool, mode: str = "train", gan: bool = False, dpo: bool = False
) -> Iterator[dict[str, Any]]:
    """Lists of samples -> dicts of zero-padded tensors, the longest waveform first.

    `utts`, `text`: lists (B). `text_token`, `speech_token` (B, L) int64, each with its lengths `<name>_len`
    (B,) int32. `utt_embedding`, `spk_embedding` (B, 192); `embedding` is the speaker's where
    `use_spk_embedding`, else the utterance's. `speech_feat` (B, T, M), `whisper_feat` (B, T, 128) and `text_place`
    (B, S), with their lengths, are there where the samples have them. `gan` adds `speech` (B, samples) and
    `pitch_feat` (B, T), `dpo` adds `reject_speech_token` (B, L) int64.
    """
    for samples in data:
        samples = sorted(samples, key=lambda sample: -sample["speech"].size(1))
        result: dict[str, Any] = {
            "utts": [sample.get("utt") for sample in samples],
            "text": [sample.get("text") for sample in samples],
        }
        for name in ("text_token", "speech_token", *(["reject_speech_token"] if dpo else [])):
            result |= padded(name, token_tensors(samples, name))
        for name in VECTORS:
            if len({sample[name].shape for sample in samples}) > 1:
                raise InputError(f"the {name} of {result['utts']} differ in size; run tools/extract_embedding.py again")
            result[name] = torch.stack([sample[name] for sample in samples])
        for name in ("speech_feat", "whisper_feat", "text_place"):
            if name in samples[0]:
                result |= padded(name, [sample[name] for sample in samples])
        if gan:
            result |= padded("speech", [sample["speech"].squeeze(0) for sample in samples])
            result |= padded("pitch_feat", [sample["pitch_feat"] for sample in samples])
        result["embedding"] = result["spk_embedding" if use_spk_embedding else "utt_embedding"]
        yield result
