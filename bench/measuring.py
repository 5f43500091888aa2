"""Functions that the scripts of this folder share: models, the machine's limits, timing, and result rows."""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from cosyvoice.llm.speech_token_lm import SpeechTokenLM
    from cosyvoice.model_folder.folder import ModelFolder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CONFIGS = {
    "300m": ROOT / "examples" / "libritts" / "cosyvoice" / "conf" / "cosyvoice.yaml",
    "mini": ROOT / "pretrained_models" / "CosyVoice-mini" / "cosyvoice.yaml",
    "cosyvoice2": ROOT / "examples" / "libritts" / "cosyvoice2" / "conf" / "cosyvoice2.yaml",
}
BYTES_PER_FLOAT32 = 4
READ_BYTES = 2**27  # more than fits into any cache
MATRIX_ROWS = 2048  # of the square matrices whose product measures the peak
LIMIT_RUNS = 5
ENOUGH_SECONDS = 10.0  # stop repeating after this time


@dataclass(frozen=True)
class Machine:
    """The device and its limits, measured before everything else."""

    device: str  # cpu or cuda
    threads: int
    bytes_per_second: float  # read
    flops_per_second: float  # of a float32 matrix product


# Options


def add_models(parser: argparse.ArgumentParser, sizes: Sequence[str] = tuple(CONFIGS)) -> None:
    """Add the options that `sources` reads. sizes: the choices."""
    group = parser.add_argument_group("model")
    group.add_argument("--model-dir", type=Path, help="model folder (default: random weights)")
    group.add_argument("--sizes", nargs="+", default=list(sizes), choices=sizes, metavar="NAME",
                       help=f"of random weights: {', '.join(sizes)} (default: all)")  # fmt: skip


def add_precisions(parser: argparse.ArgumentParser, usual: Sequence[str] = ("float32", "int8")) -> None:
    """Add the options that `precisions` reads."""
    parser.add_argument("--precisions", nargs="+", metavar="NAME", help="as in inference_joint.py (default: those of "
                        f"{' '.join(usual)} that are faster on the device)")  # fmt: skip
    parser.set_defaults(usual=usual)


def precisions(args: argparse.Namespace) -> list[str]:
    """Return the chosen precisions, else the device's usual ones. Raises InputError for one that does not help it."""
    import torch

    from cosyvoice.runtime.errors import InputError
    from cosyvoice.transformer.precision import check_precision

    device, found = torch.device(args.device), []
    for name in args.precisions or args.usual:
        try:
            check_precision(name, device)
        except InputError:
            if args.precisions:
                raise
        else:
            found.append(name)
    return found


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")


def add_measuring(parser: argparse.ArgumentParser, repeats: int, repeated_what: str = "runs timed at most") -> None:
    from utils import add_seed

    parser.add_argument("--repeats", type=positive, default=repeats, help=f"{repeated_what} (default: {repeats})")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (default: 2)")
    add_seed(parser)


def positive(text: str) -> int:
    """Parse an option's count, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is needed")
    return number


# Models


def sources(args: argparse.Namespace) -> dict[str, Path]:
    """Return the arguments of `build` by the names used in rows. Raises InputError for a folder without a model."""
    from config import find_model_dir

    if args.model_dir:
        return {args.model_dir.name: find_model_dir(args.model_dir).path}
    return {f"random {size}": CONFIGS[size] for size in args.sizes}


def build(source: Path, part: str) -> "nn.Module":
    """Return `llm`, `flow` or `hift` in eval mode, from a model folder or with random weights for a .yaml file."""
    from cosyvoice.model_folder.weights import load_part

    if source.is_dir():
        return load_part(model_folder(source), part)
    with TemporaryDirectory() as folder:
        return with_config(Path(folder), source).parts([part])[part].eval()


def model_folder(source: Path) -> "ModelFolder":
    """Return the model folder of a source, which is a folder or the YAML in it."""
    from cosyvoice.model_folder.folder import ModelFolder

    return ModelFolder(source if source.is_dir() else source.parent)


def with_config(folder: Path, config: Path) -> "ModelFolder":
    """Make a model folder from a .yaml file, its lexicon and its text model, without weights and encoders."""
    from tools.blank_en import write_blank_en
    from tools.random_model import SIZES

    for path in (config, *config.parent.glob("lexicon.txt.gz")):
        shutil.copy(path, folder)
    model = model_folder(folder)
    if model.text_model:
        write_blank_en(model.text_model, dict(SIZES["cosyvoice2-0.5b"].text_model))
    return model


def step_weights(llm: "SpeechTokenLM") -> int:
    """Return how many weights of blocks and head a step reads: all linear ones except the projections of positions."""
    from cosyvoice.llm.qwen2_encoder import Qwen2Encoder

    blocks = llm.llm.layers if isinstance(llm.llm, Qwen2Encoder) else llm.llm.encoders
    named = [*blocks.named_parameters(), *llm.llm_decoder.named_parameters()]
    return sum(weight.numel() for name, weight in named if weight.dim() == 2 and "pos" not in name)


# Limits


def measure_machine(args: argparse.Namespace) -> Machine:
    """Measure and print the limits of the device and threads in `args`, and set torch's threads and seed.

    Raises InputError if CUDA is asked for and missing.
    """
    import torch

    from utils import pick_device

    device = pick_device(args.device).type
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    memory = torch.ones(READ_BYTES // BYTES_PER_FLOAT32, device=device)
    left, right = torch.randn(2, MATRIX_ROWS, MATRIX_ROWS, device=device)
    seconds = []
    for work in (memory.sum, lambda: left @ right):
        work()  # not counted: wakes threads and loads kernels
        seconds.append(min(timed(work, device) for _ in range(LIMIT_RUNS)))  # the minimum excludes other load
    machine = Machine(device, args.threads, READ_BYTES / seconds[0], 2 * MATRIX_ROWS**3 / seconds[1])
    read, product = machine.bytes_per_second / 1e9, machine.flops_per_second / 1e9
    print(f"{device}, {args.threads} threads: reading {read:.1f} GB/s, float32 matrix products {product:.0f} GFLOP/s")
    row = {"gb_per_second": read, "gflop_per_second": product}
    print(json.dumps({"bench": "machine", "device": device, "threads": args.threads, **row}), flush=True)
    return machine


def count_flops(work: Callable[[], Any]) -> int:
    """Return the floating-point operations of the matrix products and convolutions in `work`, which runs once."""
    import torch
    from torch.ops import aten
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # torch does not count fused attention on CPUs, nor attention whose heads share keys. The arguments after the
    # shapes do not affect the count.
    names = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    fused: dict[Any, Callable[..., int]] = {}
    for name in names:
        operation = f"_scaled_dot_product_{name}"
        fused[getattr(aten, operation)] = lambda *x, **_: sdpa_flop_count(*keys_of_each_head(*x[:3]))
        fused[getattr(aten, f"{operation}_backward")] = lambda grad, *x, **_: sdpa_backward_flop_count(
            grad, *keys_of_each_head(*x[:3])
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the flow's work in other threads would not be counted
    try:
        with FlopCounterMode(display=False, custom_mapping=fused) as counter:
            work()
    finally:
        torch.set_num_threads(threads)
    return counter.get_total_flops()


def keys_of_each_head(query: Sequence[int], *shared: Sequence[int]) -> list[Sequence[int]]:
    """Return the shapes (B, H, T, D) of attention whose keys and values (B, H or fewer, T, D) heads may share."""
    return [query, *((shape[0], query[1], *shape[2:]) for shape in shared)]


# Times


def timed(work: Callable[[], Any], device: str = "cpu") -> float:
    """Return the seconds until the device has finished the work."""
    start = clock(device)
    work()
    return clock(device) - start


def clock(device: str) -> float:
    """Return the time in seconds, after a GPU has finished all its work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def repeated(work: Callable[[], Any], repeats: int, device: str = "cpu") -> list[float]:
    """Return the seconds of each of at most `repeats` runs, fewer if they take long."""
    seconds = [timed(work, device)]
    while len(seconds) < repeats and sum(seconds) < ENOUGH_SECONDS:
        seconds.append(timed(work, device))
    return seconds


# Rows


def show(
    machine: Machine, labels: dict[str, Any], seconds: list[float], limit_seconds: float | None, **figures: float
) -> None:
    """Print one measurement as a row of a table and as a line of JSON.

    labels: `bench`, the script, then `what` was measured, and with what. limit_seconds: the least time that the
    machine needs for it, if known. figures: further results.
    """
    median, least, most = statistics.median(seconds), min(seconds), max(seconds)
    times: dict[str, Any] = {"runs": len(seconds), "seconds": [median, least, most]}
    columns = [f"{median:8.3f} s ({least:.3f} to {most:.3f}, runs {len(seconds)})"]
    if limit_seconds is not None:
        times |= {"limit_seconds": limit_seconds, "of_limit": limit_seconds / median}
        columns.append(f"of limit {limit_seconds / median:.1%}")
    columns += [f"{words(name)} {value:.3g}" for name, value in figures.items()]
    names = [value if isinstance(value, str) else f"{value} {words(name)}" for name, value in labels.items()]
    print(f"{'  '.join(names[1:]):50}", *columns, sep="  ")
    place = {"device": machine.device, "threads": machine.threads}
    print(json.dumps({**labels, **place, **times, **figures}), flush=True)


def words(name: str) -> str:
    return name.replace("_", " ")
