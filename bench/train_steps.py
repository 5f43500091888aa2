"""Clips per second and peak memory of an optimiser step in each training mode.

    python bench/train_steps.py

It uses random weights in the sizes of CosyVoice-300M, CosyVoice-mini and CosyVoice2; `--model-dir` measures your own
model. A step is one batch through the trainer with the adapters and the precision of config.py: losses, gradients,
gradient clipping, and the optimiser. A clip has 30 text tokens and the speech tokens of the flow's window of
`max_feat_len` frames (145, or 125 for CosyVoice2), or a multiple of both, of which the flow sees one window. The share
of the limit is the time that the floating-point operations of losses and gradients take at the speed of a large float32
matrix product, divided by the time taken; a GPU, which trains in half precision, may exceed it. Each measurement runs
in its own process to get its own peak memory: on a CPU that of the process, on CUDA that of the tensors. Each row is
also printed as a line of JSON.
"""

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import (
    Machine,
    add_device,
    add_measuring,
    add_models,
    build,
    clock,
    count_flops,
    measure_machine,
    model_folder,
    positive,
    show,
    sources,
)

from config import MODES, settings_for
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.frames import SPEAKER_DIMENSIONS

if TYPE_CHECKING:
    from dataset import Clip
    from llm_flow_model import JointModel

TEXT_TOKENS = 30
IDS = 256  # of text and speech tokens: every model has that many


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh_process:
        machine = fresh_process.submit(measure_machine, args).result()
        for name, source in sources(args).items():
            for case in cases(args):
                fresh_process.submit(measure, machine, name, source, case, args.repeats, args.seed).result()
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="NAME",
                        help=f"of {', '.join(MODES)} (default: all)")  # fmt: skip
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 2], metavar="N",
                        help="clips a step; all but the first only in the first mode (default: 1 2)")  # fmt: skip
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1, 2], metavar="N",
                        help="of clips, in windows of the flow; all but the first only in the first mode "
                        "(default: 1 2)")  # fmt: skip
    add_device(parser)
    add_measuring(parser, 3, "steps timed")
    return parser.parse_args(argv)


def cases(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Return mode, batch size and length of each measurement. Only one at a time differs from the first choice."""
    (mode, *modes), (size, *sizes), (length, *lengths) = args.modes, args.batch_sizes, args.lengths
    return [
        (mode, size, length),
        *((other, size, length) for other in modes),
        *((mode, other, length) for other in sizes),
        *((mode, size, other) for other in lengths),
    ]


def measure(machine: Machine, name: str, source: Path, case: tuple[str, int, int], repeats: int, seed: int) -> None:
    """Train for a few steps in this process, and print the time of one."""
    import torch

    mode, batch_size, length = case
    torch.set_num_threads(machine.threads)
    torch.manual_seed(seed)
    model = joint_model(source, mode, seed, batch_size)
    clips = [random_clip(source, length)] * batch_size
    limit = count_flops(partial(gradients, model, clips)) / machine.flops_per_second
    seconds = time_steps(model, clips, machine.device, repeats)
    figures = {"clips_per_second": batch_size / statistics.median(seconds), "peak_gb": peak_bytes(machine.device) / 1e9}
    labels = {"bench": "train_steps", "model": name, "what": mode, "clips": batch_size}
    show(machine, labels | {"speech_tokens": len(clips[0].speech_token)}, seconds, limit, **figures)


def joint_model(source: Path, mode: str, seed: int, batch_size: int = 1) -> "JointModel":
    """Return the model as train_joint.py trains it, but with one optimiser step per batch."""
    import torch

    from llm_flow_model import JointModel
    from voices.run_state import Origin

    steps = {"training_mode": mode, "batch_size": batch_size, "accumulate_grad_batches": 1}
    parts = {part: build(source, part) for part in MODES[mode]}
    origin = Origin(mode, run="", base={}, data="", speaker="")
    return JointModel(parts, settings_of(source) | steps, seed, torch.randn(SPEAKER_DIMENSIONS), origin).train()


def settings_of(source: Path) -> dict[str, Any]:
    return settings_for(model_folder(source))


def random_clip(source: Path, length: int) -> "Clip":
    """Return a clip of `length` windows of the flow."""
    import torch

    from cosyvoice.utils.frames import MEL_BINS
    from dataset import Clip

    rates = model_folder(source).rates
    speech_tokens = rates.whole_tokens(settings_of(source)["max_feat_len"])
    text, speech = (torch.randint(0, IDS, (length * count,)) for count in (TEXT_TOKENS, speech_tokens))
    mel, embedding = torch.randn(rates.mel_frames(len(speech)), MEL_BINS), torch.randn(SPEAKER_DIMENSIONS)
    return Clip("clip", "speaker", text, speech, mel, embedding)


def gradients(model: "JointModel", clips: "list[Clip]") -> None:
    """Compute one batch's losses and gradients, and discard them."""
    from dataset import collate

    losses = model.losses(collate(clips), model.active())
    sum(losses[f"{part}_loss"] for part in model.active()).backward()
    model.zero_grad()


def time_steps(model: "JointModel", clips: "list[Clip]", device: str, repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` steps, after one that is not counted."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import LambdaCallback
    from torch.utils.data import DataLoader

    from dataset import collate
    from training.precision import half_type, precision_options

    if dtype := half_type(model.config, device):
        model.keep_base_in(dtype)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    ends: list[float] = []
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        **precision_options(model.config, device),
        max_epochs=1,
        gradient_clip_val=model.config["gradient_clip_val"],
        callbacks=[LambdaCallback(on_train_batch_end=lambda *_: ends.append(clock(device)))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(action="ignore"):  # about the missing log and other settings
        trainer.fit(model, DataLoader(clips * (1 + repeats), len(clips), collate_fn=collate))
    return [end - start for start, end in pairwise(ends)]


def peak_bytes(device: str) -> int:
    """Return the peak memory so far. Raises InputError if the system does not count it."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        raise InputError("this system does not count the memory of a process; use Linux or macOS") from None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    from cosyvoice.runtime.command import run

    run(main)
