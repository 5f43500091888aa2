"""Functions that several scripts share: options, checks, device, threads, parallel work, and reading texts."""

import argparse
import os
import shlex
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DATA_DIR, OUTPUT_DIR, SEED
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.text_files import decode_lines

if TYPE_CHECKING:
    import torch

AHEAD = 4  # jobs for each worker that are started before the first of them is waited for


def add_folders(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add those of `--model-dir`, `--data-dir` and `--output-dir` that `names` (model, data, output) asks for."""
    group = parser.add_argument_group("folders")
    if "model" in names:
        group.add_argument("--model-dir", type=Path, help="base model (default: CosyVoice-300M, else -mini)")
    if "data" in names:
        group.add_argument("--data-dir", type=Path, default=DATA_DIR, help="parquet files (default: %(default)s)")
    if "output" in names:
        group.add_argument("--output-dir", type=Path, default=OUTPUT_DIR, help="results (default: %(default)s)")


def repeated(args: argparse.Namespace, *names: str) -> str:
    """Return the folder options and `--device` that differ from the defaults, to print the next command."""
    defaults = {"model": None, "data": DATA_DIR, "output": OUTPUT_DIR}
    folders = {name: getattr(args, f"{name}_dir") for name in names}
    given = {name: folder for name, folder in folders.items() if folder != defaults[name]}
    device = "" if args.device == "auto" else f" --device {args.device}"
    return "".join(f" --{name}-dir {quoted(folder)}" for name, folder in given.items()) + device


def quoted(text: str | Path) -> str:
    """Return `text` as an argument to paste into a shell of this system."""
    return subprocess.list2cmdline([str(text)]) if os.name == "nt" else shlex.quote(str(text))


def add_device(parser: argparse.ArgumentParser) -> None:
    choices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=choices, default="auto", help="where to compute (default: %(default)s)")


def add_seed(parser: argparse.ArgumentParser) -> None:
    help_text = "seed of all random draws (default: %(default)s)"
    parser.add_argument("--seed", action=_Seeds, default=SEED, help=help_text)


def add_seeds(parser: argparse.ArgumentParser) -> None:
    help_text = f"of all random draws; everything is spoken once with each (default: {SEED})"
    parser.add_argument("--seeds", action=_Seeds, nargs="+", default=[SEED], metavar="SEED", help=help_text)


class _Seeds(argparse.Action):
    """An action for whole numbers from 0 up. With `type` argparse would replace the message of a ValueError."""

    def __call__(self, parser: Any, namespace: Any, values: str | list[str], option_string: str | None = None) -> None:
        texts = values if isinstance(values, list) else [values]
        if wrong := [text for text in texts if not text.isdecimal()]:
            raise InputError(f"{option_string} {wrong[0]} is not possible; give a whole number from 0 up")
        seeds = [int(text) for text in texts]
        setattr(namespace, self.dest, seeds if isinstance(values, list) else seeds[0])


def pick_device(name: str) -> "torch.device":
    """Return `auto`, `cpu` or `cuda` as a torch device. Raises InputError if CUDA is asked for and cannot compute."""
    import torch

    from cosyvoice.runtime.device import cuda_problem, fastest_device

    if name == "auto":
        return fastest_device()
    if name == "cuda" and (problem := cuda_problem()):
        raise InputError(f"--device cuda: {problem}; use --device cpu")
    return torch.device(name)


def limit_threads(folder: ModelFolder, processes: int = 1) -> None:
    """Set the number of torch threads that suits the base model, unless OMP_NUM_THREADS sets it.

    processes: that share the cores.
    """
    import torch

    threads = folder.threads
    if processes > 1 and not threads:
        threads = max(1, torch.get_num_threads() // processes)
    if threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)


def check_writable(folder: Path, model_dir: Path | None = None) -> None:
    """Raise InputError, before any work, if results could not be written or would lie in the model folder."""
    if model_dir is not None and folder.resolve().is_relative_to(model_dir.resolve()):
        raise InputError(f"{folder} is in the model folder, whose files must stay as they are; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None


def in_parallel(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield `work(item)` of all items in order, from several threads. Ctrl-C waits only for items already started."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield from in_order(lambda item: pool.submit(work, item), Future.result, items, workers)
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    start: Callable[[Any], Any], wait: Callable[[Any], Any], items: Iterable[Any], workers: int
) -> Iterator[Any]:
    """Yield `wait(start(item))` of all items in order. Only a few items are started ahead of the one waited for."""
    started: deque[Any] = deque()
    for item in items:
        started.append(start(item))
        if len(started) == AHEAD * workers:
            yield wait(started.popleft())
    while started:
        yield wait(started.popleft())


def is_unicode(text: str) -> bool:
    """Return whether it is valid text, not bytes of another encoding that the system passed on."""
    return text.encode(errors="replace").decode() == text


def decode_text(data: bytes, name: str = "the text") -> str:
    """Return `decode_lines` joined to one line, with single blanks between words."""
    return " ".join(" ".join(decode_lines(data, name)).split())
