"""The steps from parquet rows to padded batches, which the `data_pipeline` of cosyvoice.yaml chains.

Each step is a generator over the results of the step before: sample dicts up to `batch`, then lists of samples, then
the padded dict. All steps take `mode` (train or dev), but only `tokenize` and `equalize` depend on it.
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
from cosyvoice.tokenizer.tokenizer import ByteTokenizer
from cosyvoice.utils import audio
from cosyvoice.utils.pitch import pitch_track

FRAMES_PER_SECOND = 100  # the frames of 10 ms that `filter` counts in
LOWEST_COLOUR_HZ = 100.0
PLACES_SLACK = 0.4  # of their number: a recording may go on after its last phone

logger = logging.getLogger(__name__)


def parquet_opener(data: Iterable[Sample], mode: str = "train") -> Iterator[Sample]:
    """Yield a sample for each row of the parquet files {'src': path}: the file's sample and the row's columns.

    Rows with a missing or damaged value are left out with a warning. Raises InputError if a file cannot be read.
    """
    for sample in data:
        for row in rows(sample["src"]):
            if damaged := [name for name, value in row.items() if not is_intact(name, value)]:
                reason = f"its {', '.join(damaged)} is missing or damaged"
                logger.warning("utterance %s of %s is left out: %s", row.get("utt"), sample["src"], reason)
            else:
                yield {**sample, **row}


def preferences(data: Iterable[Sample], mode: str = "train") -> Iterator[Sample]:
    """Yield the samples with `reject_speech_token`, the tokens that preference training teaches to avoid."""
    for sample in data:
        _check_columns(sample, "reject_speech_token")
        rejected = sample["reject_speech_token"]
        if rejected is not None and len(rejected):
            yield sample


def _check_columns(sample: Sample, *names: str) -> None:
    """Raise InputError if the file of a sample lacks one of the columns."""
    if missing := [name for name in names if name not in sample]:
        remedy = "Make it again with tools/make_parquet_list.py"
        raise InputError(f"{sample.get('src')} has no column {', '.join(missing)}. {remedy}")


def tokenize(
    data: Iterable[Sample],
    get_tokenizer: Callable[[], Any],
    allowed_special: str | set[str],
    spelled_share: float = 0.0,
    mode: str = "train",
) -> Iterator[Sample]:
    """Add `text_token`, the ids of `text`.

    Tokenizers that work word by word also give `word_token_counts`, the number of ids of each word of `text.split()`.
    spelled_share: in training, a PhoneTokenizer writes this share of the words it knows in letters, not in phones.

    Raises InputError if spelled_share is not between 0 and 1, or if it is above 0 with another tokenizer.
    """
    tokenizer = get_tokenizer()
    if not 0 <= spelled_share <= 1:
        raise InputError(f"tokenize: spelled_share is {spelled_share}. Give a number from 0 to 1")
    if spelled_share and not isinstance(tokenizer, PhoneTokenizer):
        raise InputError("tokenize: spelled_share works only with get_phone_tokenizer. Leave it out")
    spelling = (lambda: random.random() < spelled_share,) if spelled_share and mode == "train" else ()
    for sample in data:
        _check_columns(sample, "text")
        if isinstance(tokenizer, ByteTokenizer):
            words = tokenizer.encode_words(sample["text"], *spelling)
            counts = [len(word) for word in words]
            yield {**sample, "text_token": [number for word in words for number in word], "word_token_counts": counts}
        else:
            yield {**sample, "text_token": tokenizer.encode(sample["text"], allowed_special=allowed_special)}


def read_places(data: Iterable[Sample], mode: str = "train") -> Iterator[Sample]:
    """Add `text_place` (S,), the index of the text token that each speech token says.

    It comes from the .places file beside the recording, which has a number w + f for each speech token: at that token,
    the share 0 <= f < 1 of word w of `text.split()` has been spoken. These numbers do not depend on how a word is
    written.

    Raises InputError if the file is missing or malformed, belongs to another token rate, or names a word that the text
    does not have.
    """
    for sample in data:
        path = Path(sample["wav"]).with_suffix(".places")
        if "word_token_counts" not in sample:
            raise InputError("read_places needs a tokenizer that works word by word. Use get_phone_tokenizer")
        counts = np.array(sample["word_token_counts"])
        try:
            places = np.array([float(place) for place in path.read_text(encoding="utf-8").split()])
        except (OSError, ValueError) as error:
            raise InputError(f"{path} has no places in the text: {error}. Make it again") from None
        if not (len(places) and np.all((places >= 0) & (places < len(counts)))):
            raise InputError(f"{path} is empty, or names a word that the text does not have. Make it again")
        tokens = len(sample["speech_token"])
        if abs(len(places) - tokens) > PLACES_SLACK * tokens + 2:
            raise InputError(f"{path} has {len(places)} numbers for {tokens} speech tokens. Make it for their rate")
        word = places.astype(int)
        through = ((places - word) * counts[word]).astype(int)  # less than counts[word], since the share is less than 1
        text_place = torch.from_numpy((np.cumsum(counts) - counts)[word] + through)
        index = torch.arange(tokens).clamp(max=len(places) - 1)  # rounding may add a token
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
    """Decode `audio_data` to `speech` (1, samples) at `sample_rate` Hz, and drop samples that are of no use.

    A sample is dropped if its length is not between `min_length` and `max_length` frames of 10 ms, its number of text
    tokens not between `token_min_length` and `token_max_length`, or its text tokens per frame not between the two
    ratios; if it has no speech token; and, with a warning, if its audio cannot be decoded.
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
    """Resample `speech` to `resample_rate` Hz with a peak of at most 1, and drop clips below `min_sample_rate` Hz."""
    for sample in data:
        if sample["sample_rate"] < min_sample_rate:
            continue
        speech = audio.resample(sample["speech"], sample["sample_rate"], resample_rate)
        speech = speech / speech.abs().max().clamp(min=1)
        yield {**sample, "speech": speech, "sample_rate": resample_rate}


def truncate(data: Iterable[Sample], truncate_length: int = 24576, mode: str = "train") -> Iterator[Sample]:
    """Cut a random window of `truncate_length` samples out of `speech`; shorter clips get zeros at the end.

    Add `is_window`: `speech_token` still belongs to the whole recording.
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
    """In training, filter `speech` with a random smooth curve, which stands for other rooms, microphones and throats.

    The curve goes through `bands` points, evenly spaced in octaves from 100 Hz to half the rate. Their gains are drawn
    from a normal distribution with the standard deviation `spread_db`.
    """
    for sample in data:
        if mode == "train":
            gains = np.array([random.gauss(0, spread_db) for _ in range(bands)])
            speech = _coloured(sample["speech"], sample_rate, gains)
            sample = {**sample, "speech": speech / speech.abs().max().clamp(min=1)}
        yield sample


def _coloured(speech: Tensor, sample_rate: int, gains_db: np.ndarray) -> Tensor:
    """Return speech (1, samples) filtered with gains that are interpolated in octaves."""
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
    """Add `speech_feat` (T, M), the log-mel of `speech`.

    num_frames: samples per speech token, for models whose tokens last a whole number of mel frames. See `_aligned`.
    """
    for sample in data:
        sample = _aligned(sample, num_frames)
        mel = feat_extractor(sample["speech"])  # (1, M, T)
        yield {**sample, "speech_feat": mel.squeeze(0).transpose(0, 1)}  # (1, M, T) -> (T, M)


def compute_whisper_fbank(
    data: Iterable[Sample], num_frames: int | None = None, mode: str = "train"
) -> Iterator[Sample]:
    """Add `whisper_feat` (T, 128), the speech tokenizer's input for `speech`, 100 frames per second.

    num_frames: as in `compute_fbank`.
    """
    for sample in data:
        sample = _aligned(sample, num_frames)
        wav_16k = audio.resample(sample["speech"], sample["sample_rate"], audio.PROMPT_RATE_HZ)
        features = audio.whisper_log_mel(wav_16k)  # (1, 128, T)
        yield {**sample, "whisper_feat": features.squeeze(0).transpose(0, 1)}  # (1, 128, T) -> (T, 128)


def _aligned(sample: Sample, token_samples: int | None) -> Sample:
    """Return the sample with `speech` and its speech tokens cut to the same number of whole tokens.

    A window is returned unchanged: its tokens belong to the whole recording, and the vocoder would learn the zeros that
    fill the last token.
    """
    if token_samples is None or sample.get("is_window"):
        return sample
    speech, tokens = audio.aligned(sample["speech"], sample["speech_token"], token_samples)
    return {**sample, "speech": speech, "speech_token": tokens}


def compute_f0(data: Iterable[Sample], sample_rate: int, hop_size: int, mode: str = "train") -> Iterator[Sample]:
    """Add `pitch_feat` (T,), the pitch of `speech` in Hz at each mel frame, 0 where there is no voice."""
    for sample in data:
        yield {**sample, "pitch_feat": pitch_track(sample["speech"], sample_rate, hop_size)}


def parse_embedding(data: Iterable[Sample], normalize: bool, mode: str = "train") -> Iterator[Sample]:
    """Make `utt_embedding` and `spk_embedding` float32 tensors (192,), with length 1 if `normalize`."""
    for sample in data:
        _check_columns(sample, *VECTORS)
        vectors = {name: torch.tensor(sample[name], dtype=torch.float32) for name in VECTORS}
        if normalize:
            vectors = {name: F.normalize(vector, dim=0) for name, vector in vectors.items()}
        yield {**sample, **vectors}


def shuffle(data: Iterable[Sample], shuffle_size: int = 10000, mode: str = "train") -> Iterator[Sample]:
    """Shuffle with a buffer of `shuffle_size` samples and Python's global generator.

    A full buffer yields half of its samples and keeps the rest, so that a sample may move further than one buffer.
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
    """Sort each run of `sort_size` samples by frames, so that the samples of a batch are of similar length."""
    for buffer in runs(data, sort_size):
        yield from sorted(buffer, key=frame_count)


def batch(
    data: Iterable[Sample],
    batch_type: str = "static",
    batch_size: int = 16,
    max_frames_in_batch: int = 12000,
    mode: str = "train",
) -> Iterator[list[Sample]]:
    """Yield lists of `batch_size` samples (static), or of as many as fit into `max_frames_in_batch` (dynamic).

    Frames are those of the mel, or the speech tokens of samples without a mel. Raises InputError for another type.
    """
    if batch_type == "static":
        return runs(data, batch_size)
    if batch_type == "dynamic":
        return runs_of_frames(data, max_frames_in_batch)
    raise InputError(f"batch_type {batch_type!r} is not known. Use 'static' or 'dynamic'")


def padding(
    data: Iterable[list[Sample]], use_spk_embedding: bool, mode: str = "train", gan: bool = False, dpo: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a dict of zero-padded tensors for each list of samples, ordered from the longest waveform to the shortest.

    `utts`, `text`: lists (B). `text_token`, `speech_token` (B, L) int64, each with its lengths `<name>_len`
    (B,) int32. `utt_embedding`, `spk_embedding` (B, 192); `embedding` is the speaker's if `use_spk_embedding`, else the
    utterance's. If the samples have them: `speech_feat` (B, T, M), `whisper_feat` (B, T, 128) and `text_place` (B, S),
    with their lengths. `gan` adds `speech` (B, samples) and `pitch_feat` (B, T), `dpo` adds `reject_speech_token`
    (B, L) int64. Raises InputError if the speaker vectors of a list differ in size.
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
                raise InputError(f"the {name} of {result['utts']} differ in size. Run tools/extract_embedding.py again")
            result[name] = torch.stack([sample[name] for sample in samples])
        for name in ("speech_feat", "whisper_feat", "text_place"):
            if name in samples[0]:
                result |= padded(name, [sample[name] for sample in samples])
        if gan:
            result |= padded("speech", [sample["speech"].squeeze(0) for sample in samples])
            result |= padded("pitch_feat", [sample["pitch_feat"] for sample in samples])
        result["embedding"] = result["spk_embedding" if use_spk_embedding else "utt_embedding"]
        yield result
