"""The columns of `prepare_joint_data.py`'s parquet files, and the training batches made from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Sampler

from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.common import pad_list
from cosyvoice.utils.frames import MEL_BINS, Durations

SCHEMA = pa.schema(
    {
        "utt": pa.string(),  # the recording's file name without suffix
        "wav": pa.string(),  # path of the recording
        "audio_data": pa.binary(),  # its bytes
        "text": pa.string(),  # as written
        "spk": pa.string(),  # name of the speaker
        "utt_embedding": pa.list_(pa.float32(), 192),  # the clip's speaker vector, L2 norm 1
        "spk_embedding": pa.list_(pa.float32(), 192),  # mean of all utt_embedding, L2 norm 1
        "speech_token": pa.list_(pa.int32()),  # (N,), at the model's rate
        "text_token": pa.list_(pa.int32()),  # (L,), of the normalised text
        "speech_feat": pa.list_(pa.float32()),  # (T, 80) natural log-mel at the model's rates, row after row
        "speech_feat_shape": pa.list_(pa.int32(), 2),  # [T, 80]
        "seconds": pa.float32(),
        "peak_dbfs": pa.float32(),  # 0 is full scale
        "silence_share": pa.float32(),  # of the frames of 20 ms: 40 dB or more below the loudest
        "content_hash": pa.string(),  # SHA-256 of what the row was made from
        "encoders": pa.string(),  # `ModelFolder.encoders` of the model that made the row
    }
)

COLUMNS = ["utt", "spk", "utt_embedding", "text_token", "speech_token", "speech_feat", "speech_feat_shape", "encoders"]
FEWEST_CLIPS_TO_SPLIT = 8  # with fewer, every clip is trained on
FEWEST_HELD_OUT = 2


@dataclass
class Clip:
    """One prepared recording."""

    utt: str
    speaker: str
    text_token: Tensor  # (L,) int64
    speech_token: Tensor  # (N,) int64
    mel: Tensor  # (T, 80) float32 natural log-mel, T = rates.mel_frames(N) at most
    embedding: Tensor  # (192,) float32, L2-normalised
    text_place: Tensor | None = None  # (N,) int64, the text token of each speech token, if needed


def load_clips(data_dir: Path, folder: ModelFolder) -> list[Clip]:
    """Return all clips of a folder, sorted by name.

    Raises InputError if there is no parquet file, or if one is unreadable, was not written by prepare_joint_data.py,
    or was prepared with another model's encoders.
    """
    clips, made_with = [], set()
    for file in parquet_files(data_dir):
        rows = read_rows(file)
        for row in rows:
            check_row(file, row)
        clips += (to_clip(row, folder.rates) for row in rows)
        made_with.update(row["encoders"] for row in rows)
    if not clips:
        raise InputError(f"the parquet files in {data_dir} have no clip; run prepare_joint_data.py again")
    if made_with != {folder.encoders()}:
        other = f"the clips in {data_dir} were prepared with another model than {folder.path}"
        raise InputError(f"{other}; run prepare_joint_data.py again, or give that model with --model-dir")
    return sorted(clips, key=lambda clip: clip.utt)


def parquet_files(data_dir: Path) -> list[Path]:
    """Return the files that `prepare_joint_data.py` left. Raises InputError where there is none."""
    # a killed run leaves hidden files
    files = sorted(path for path in data_dir.glob("*.parquet") if not path.name.startswith("."))
    if not files:
        raise InputError(f"{data_dir} has no parquet file; run prepare_joint_data.py first")
    return files


def read_rows(file: Path) -> list[dict[str, Any]]:
    try:
        with pq.ParquetFile(file) as parquet:
            unknown = [name for name in COLUMNS if SCHEMA.field(name) not in parquet.schema_arrow]
            table = None if unknown else parquet.read(COLUMNS)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file} cannot be read ({reason}); delete it and run prepare_joint_data.py again") from None
    if unknown:
        problem = f"its columns {', '.join(unknown)} are missing or of another type"
        raise InputError(f"{file} is not from prepare_joint_data.py: {problem}; move it away and run that again")
    rows = table.drop_columns("speech_feat").to_pylist()
    mels = (_numbers(mel) for mel in table["speech_feat"])  # as arrays, which is faster than Python lists
    return [row | {"speech_feat": mel} for row, mel in zip(rows, mels, strict=True)]


def _numbers(cell: pa.Scalar) -> np.ndarray:
    """Return the numbers of a list cell: none if the cell is missing, NaN for a missing number."""
    return cell.values.to_numpy(zero_copy_only=False) if cell.is_valid else np.empty(0, dtype=np.float32)


def check_row(file: Path, row: dict[str, Any]) -> None:
    """Raise InputError unless each column has values that `prepare_joint_data.py` could have written."""
    shape, tokens, text = row["speech_feat_shape"], row["speech_token"], row["text_token"]
    vector, mel = row["utt_embedding"], row["speech_feat"]
    has_shape = shape is not None and None not in shape and shape[1] == MEL_BINS and shape[0] > 0
    valid = {
        "utt": isinstance(row["utt"], str) and row["utt"],
        "spk": isinstance(row["spk"], str) and row["spk"].strip(),
        "utt_embedding": vector is not None and None not in vector and np.isfinite(vector).all() and np.any(vector),
        "text_token": text and None not in text and min(text) >= 0,
        "speech_token": tokens and None not in tokens and min(tokens) >= 0,
        "speech_feat_shape": has_shape,
        "speech_feat": not has_shape or (len(mel) == shape[0] * MEL_BINS and np.isfinite(mel).all()),
    }
    if wrong := [name for name, is_valid in valid.items() if not is_valid]:
        clip = f"the clip {row['utt']!r} has a damaged {', '.join(wrong)}"
        raise InputError(f"{file}: {clip}; delete the file and run prepare_joint_data.py again")


def check_vocabularies(clips: Sequence[Clip], part: nn.Module) -> None:
    """Raise InputError if a clip has tokens for which the LLM or flow `part` has no embedding."""
    sizes = {}
    if (text_embedding := getattr(part, "text_embedding", None)) is not None:
        sizes["text"], sizes["speech"] = text_embedding.num_embeddings, part.speech_token_size
    elif (token_embedding := getattr(part, "input_embedding", None)) is not None:
        sizes["speech"] = token_embedding.num_embeddings
    for kind, size in sizes.items():
        for clip in clips:
            if (largest := int(getattr(clip, f"{kind}_token").max())) >= size:
                problem = f"the clip {clip.utt!r} has the {kind} token {largest}, but the model's end at {size - 1}"
                raise InputError(f"{problem}; run prepare_joint_data.py again")


def find_places(clips: Sequence[Clip], llm: nn.Module) -> None:
    """Store each speech token's text token in the clips, for an LLM that would otherwise align them at every step."""
    if (aligner := getattr(llm, "aligner", None)) is None:
        return
    for clip in clips:
        batch = collate([clip])
        names = ("speech_token", "speech_token_len", "text_token", "text_token_len")
        (clip.text_place,) = aligner.places(*(batch[name] for name in names))


def to_clip(row: dict[str, Any], rates: Durations) -> Clip:
    """Return the clip of a row, with tokens and mel cut to the shorter of the two."""
    mel = torch.tensor(row["speech_feat"]).view(*row["speech_feat_shape"])
    tokens = torch.tensor(row["speech_token"])
    count = min(len(tokens), rates.whole_tokens(len(mel)))
    return Clip(
        utt=row["utt"],
        speaker=row["spk"],
        text_token=torch.tensor(row["text_token"]),
        speech_token=tokens[:count],
        mel=mel[: rates.mel_frames(count)],
        embedding=torch.tensor(row["utt_embedding"], dtype=torch.float32),
    )


def speaker_name(clips: Sequence[Clip]) -> str:
    """Return the speaker of the clips. Raises InputError if there are several."""
    names = sorted({clip.speaker for clip in clips})
    if len(names) > 1:
        raise InputError(f"the data has several speakers ({', '.join(names[:5])}); prepare one at a time")
    return names[0]


def speaker_embedding(clips: Sequence[Clip]) -> Tensor:
    """Return the mean (192,) of the clips' normalised vectors, normalised again."""
    mean = torch.stack([clip.embedding for clip in clips]).mean(dim=0)
    return torch.nn.functional.normalize(mean, dim=0)


def slowest_pace(clips: Sequence[Clip]) -> float:
    """Return the largest number of speech tokens per text token of any clip."""
    return max(len(clip.speech_token) / len(clip.text_token) for clip in clips)


def split_clips(clips: Sequence[Clip], ratio: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Split clips at random into training and held-out ones. Fewer than 8 clips, or a ratio of 0, hold out none."""
    if ratio == 0 or len(clips) < FEWEST_CLIPS_TO_SPLIT:
        return list(clips), []
    count = max(FEWEST_HELD_OUT, round(ratio * len(clips)))
    held_out = set(np.random.default_rng(seed).permutation(len(clips))[:count].tolist())
    train = [clip for i, clip in enumerate(clips) if i not in held_out]
    return train, [clips[i] for i in sorted(held_out)]


class EpochOrder(Sampler[int]):
    """A shuffle that depends only on seed and epoch, so that a resumed run sees the clips in the same order.

    The trainer calls `set_epoch`. `skip` leaves out the first clips of the next pass, which an interrupted run has
    already seen.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size).tolist()
        skip, self.skip = self.skip, 0
        yield from order[skip:]


class DealtBatches(BatchSampler):
    """The batches of one of several devices, which take the batches of a pass in turn.

    All devices get the same number of them: where a pass ends in the middle of a turn, the others get an empty one.
    """

    def __init__(self, clips: Sampler[int], batch_size: int, rank: int, devices: int) -> None:
        super().__init__(clips, batch_size, drop_last=False)
        self.rank, self.devices = rank, devices

    def __len__(self) -> int:
        return -(-super().__len__() // self.devices)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        batches += [[]] * (-len(batches) % self.devices)
        yield from batches[self.rank :: self.devices]


def collate(clips: list[Clip]) -> dict[str, Tensor]:
    """Return a padded batch with the names that the models' `forward` expects, or an empty one without clips.

    embedding: (B, 192), one per clip.
    """
    if not clips:
        return {}

    def padded(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
        return pad_list(sequences, 0), torch.tensor([len(sequence) for sequence in sequences])

    text, text_lengths = padded([clip.text_token for clip in clips])
    speech, speech_lengths = padded([clip.speech_token for clip in clips])
    mel, mel_lengths = padded([clip.mel for clip in clips])
    places = [clip.text_place for clip in clips if clip.text_place is not None]
    return ({"text_place": pad_list(places, 0)} if places else {}) | {
        "text_token": text,  # (B, L)
        "text_token_len": text_lengths,
        "speech_token": speech,  # (B, N)
        "speech_token_len": speech_lengths,
        "speech_feat": mel,  # (B, T, 80)
        "speech_feat_len": mel_lengths,
        "embedding": torch.stack([clip.embedding for clip in clips]),
    }


def crop_windows(
    batch: dict[str, Tensor], max_frames: int, rates: Durations
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Cut tokens and mel of every clip to a window of at most `max_frames`, at the same random place.

    Yields a batch for each window length, with the indices of its clips. Clips that are long enough share a batch, and
    nothing is padded, since padding would change the flow's group norms. Draws from torch's generator.
    """
    most = max(1, rates.whole_tokens(max_frames))
    lengths = batch["speech_token_len"].tolist()
    counts = [min(most, length) for length in lengths]
    device = batch["speech_token"].device
    for count in sorted(set(counts)):
        frames, tokens, mels = rates.mel_frames(count), [], []
        clips = [i for i, own in enumerate(counts) if own == count]
        for i in clips:
            start = int(torch.randint(0, lengths[i] - count + 1, ()))
            first = rates.mel_frames(start)
            tokens.append(batch["speech_token"][i, start : start + count])
            mels.append(batch["speech_feat"][i, first : first + frames])
        yield clips, {
            "speech_token": torch.stack(tokens),
            "speech_token_len": torch.full((len(clips),), count, device=device),
            "speech_feat": torch.stack(mels),
            "speech_feat_len": torch.full((len(clips),), frames, device=device),
        }
