"""The options of training that is heard, and the sampler that they ask for."""

import argparse
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cosyvoice.runtime.command import check_least
from cosyvoice.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from cosyvoice.bin.sample_parts import Version
    from cosyvoice.bin.sampling import Judge, OpenJudge, Recording, Sampler
    from cosyvoice.model_folder.folder import ModelFolder

NEEDED = ("model_dir", "texts", "speakers")


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("samples, of llm and flow")
    group.add_argument("--sample_every", type=int, default=0, help="speak after so many epochs (default: never)")
    group.add_argument("--sample_model_dir", type=Path, help="model folder whose other parts speak")
    group.add_argument("--sample_texts", type=Path, help="a sentence a line; the text of a held-out clip is added")
    group.add_argument("--sample_speakers", type=Path, help="spk2info.pt with the speaker of the held-out clips")
    group.add_argument("--sample_llm", type=Path, help="trained weights of llm, heard with the flow in training")


def check_sample_options(args: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together, before anything heavy starts."""
    check_least("--sample_every", args.sample_every, 0)
    if not args.sample_every:
        return
    if args.model == "hifigan":
        raise InputError("--sample_every is for llm and flow; leave it out for hifigan")
    if missing := [f"--sample_{name}" for name in NEEDED if getattr(args, f"sample_{name}") is None]:
        raise InputError(f"--sample_every needs {' and '.join(missing)}")


def recipe_sampler(args: argparse.Namespace, part: "nn.Module", open_judge: "OpenJudge | None") -> "Sampler":
    """Return what speaks with the part in training. Raises InputError for files that do not fit."""
    from cosyvoice.bin.sampling import MOST_RECORDINGS, SamplePlan, Sampler
    from cosyvoice.cli.frontend import read_spk2info
    from cosyvoice.model_folder.folder import ModelFolder

    reference, speaker = next(recordings(args.cv_data), (None, None))
    if reference is None:
        raise InputError(f"{args.cv_data} has no recording to compare the samples with; give held-out recordings")
    embedding = read_spk2info(args.sample_speakers).get(speaker, {}).get("embedding")
    if embedding is None:
        raise InputError(
            f"{args.sample_speakers} has no speaker {speaker!r}, who speaks the recordings of {args.cv_data}"
        )
    texts = [*sentences(args.sample_texts), reference.text]

    def judge() -> "Judge | None":
        own = [recording for recording, _ in islice(recordings(args.train_data), MOST_RECORDINGS)]
        return open_judge(own, texts)

    folder = ModelFolder(args.sample_model_dir)
    plan = SamplePlan(
        folder=folder,
        texts=dict(enumerate(texts, start=1)),
        embedding=embedding,
        reference=reference,
        seed=args.seed,
        every=args.sample_every,
        output=args.model_dir / "samples",
    )
    return Sampler(plan, versions(args, folder, part), judge if open_judge else None)


def versions(args: argparse.Namespace, folder: "ModelFolder", part: "nn.Module") -> "list[Version]":
    """Return what is heard: the new llm with the old flow, or the new flow with the old and with the trained llm."""
    from cosyvoice.bin.sample_parts import StoredPart, TrainedPart, Version

    trained = TrainedPart(part)
    if args.model == "llm":
        return [Version("llm", trained, StoredPart(folder, "flow"))]
    found = [Version("flow", StoredPart(folder, "llm"), trained)]
    if args.sample_llm:
        found.append(Version("llm_flow", StoredPart(folder, "llm", args.sample_llm), trained))
    return found


def sentences(path: Path) -> list[str]:
    """Return the lines of a file that have words. Raises InputError where there are none."""
    from cosyvoice.utils.file_utils import read_lists
    from cosyvoice.utils.frontend_utils import has_words

    found = [line for line in read_lists(path) if has_words(line)]
    if not found:
        raise InputError(f"{path} has nothing to speak; write one sentence a line")
    return found


def recordings(data_list: Path) -> "Iterator[tuple[Recording, str]]":
    """Yield the recordings of a list of parquet files, each with its speaker's name."""
    from cosyvoice.bin.sampling import Recording
    from cosyvoice.dataset.dataset import read_list
    from cosyvoice.dataset.processor import parquet_opener
    from cosyvoice.utils.audio import read_wav

    for row in parquet_opener({"src": file} for file in read_list(data_list)):
        yield Recording(row["text"], *read_wav(BytesIO(row["audio_data"]))), row["spk"]
