"""Few-shot training that is heard: who speaks in its samples, and what they are compared with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import nn
from torch.utils.data import DataLoader

from cosyvoice.bin.sample_parts import LentPart, StoredPart, TrainedPart, Version
from cosyvoice.bin.sampling import MOST_RECORDINGS, Judge, OpenJudge, Recording, SamplePlan, Sampler, attempt
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import read_wav
from dataset import parquet_files
from llm_flow_model import JointModel
from lora import adapters
from training.precision import half_type


class AdaptedPart(TrainedPart):
    """A part with its adapters, as they are at the moment."""

    def __init__(self, part: nn.Module, dtype: torch.dtype | None) -> None:
        """dtype: what the base is kept in, None for float32."""
        super().__init__(part)
        self.dtype = dtype

    @contextmanager
    def lend(self, device: torch.device) -> Iterator[nn.Module]:
        computes = torch.autocast(device.type, self.dtype) if self.dtype else nullcontext()
        with super().lend(device) as part, computes:
            yield part


class BasePart(AdaptedPart):
    """The same part without its adapters: the base, which is not loaded a second time."""

    changes = False

    @contextmanager
    def lend(self, device: torch.device) -> Iterator[nn.Module]:
        scales = {layer: layer.scale for layer in adapters(self.part)}
        for layer in scales:
            layer.scale = 0.0
        try:
            with super().lend(device) as part:
                yield part
        finally:
            for layer, scale in scales.items():
                layer.scale = scale


def joint_sampler(
    model: JointModel,
    loaders: tuple[DataLoader, DataLoader | None],
    texts: dict[int, str],
    data_dir: Path,
    folder: ModelFolder,
    device: str,
    open_judge: OpenJudge,
) -> Sampler:
    """Return what speaks texts, by number, after every epoch."""
    train, held_out = loaders[0].dataset, (loaders[1] or loaders[0]).dataset
    (reference,) = attempt("the reference", read_recordings, data_dir, [held_out[0].utt]) or [None]

    def judge() -> Judge | None:
        own = read_recordings(data_dir, [clip.utt for clip in train[:MOST_RECORDINGS]])
        return open_judge(own, list(texts.values()))

    plan = SamplePlan(
        folder=folder,
        texts=texts,
        embedding=model.speaker_embedding.cpu().view(1, -1),
        reference=reference,
        seed=model.seed,
        first_epoch=1,
    )
    if "llm" in model.parts:
        model.parts["llm"].pace = model.origin.pace  # by which speech that talks on is cut
    return Sampler(plan, versions(model, folder, half_type(model.config, device)), judge)


def versions(model: JointModel, folder: ModelFolder, dtype: torch.dtype | None) -> list[Version]:
    """Return what is heard: each trained part with the other one of the base, and both trained parts together."""
    new: dict[str, LentPart] = {name: AdaptedPart(part, dtype) for name, part in model.parts.items()}
    old: dict[str, LentPart] = {name: BasePart(part, dtype) for name, part in model.parts.items()}
    for name in {"llm", "flow"} - new.keys():
        old[name] = StoredPart(folder, name)
    found = [Version(name, **(old | {name: part})) for name, part in new.items()]
    return [*found, Version("llm_flow", **new)] if len(new) > 1 else found


def read_recordings(data_dir: Path, utts: Sequence[str]) -> list[Recording]:
    """Return the recordings of some clips, in this order. Raises InputError where one is missing or cannot be read."""
    found = {}
    for file in parquet_files(data_dir):
        for row in pq.read_table(file, columns=["utt", "text", "audio_data"]).to_pylist():
            if row["utt"] in utts:
                found[row["utt"]] = Recording(row["text"], *read_wav(BytesIO(row["audio_data"])))
    if missing := [utt for utt in utts if utt not in found]:
        raise InputError(f"{data_dir} has no recording {missing[0]}; run prepare_joint_data.py again")
    return [found[utt] for utt in utts]
