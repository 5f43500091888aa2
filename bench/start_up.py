"""Time from the start of a command to its first result: `inference_joint.py --help`, and the first wav.

    python bench/start_up.py

Each run starts a new Python. The wav is one short word, spoken with random weights in the sizes of CosyVoice-300M,
CosyVoice-mini and CosyVoice2; `--model-dir` measures your own model. The weights have just been written, so the system
still has them in memory. The share of the limit is the time in which the machine reads the weights once, divided by the
time taken. Each row is also printed as a line of JSON.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from measuring import (
    ROOT,
    Machine,
    add_device,
    add_measuring,
    add_models,
    measure_machine,
    repeated,
    show,
    sources,
    with_config,
)

TEXT = "Hello."


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    machine = measure_machine(args)
    inference("--help", threads=args.threads)  # not counted: compiles Python files
    seconds = repeated(lambda: inference("--help", threads=args.threads), args.repeats)
    show(machine, {"bench": "start_up", "what": "inference_joint.py --help"}, seconds, None)
    for name, source in sources(args).items():
        with TemporaryDirectory() as weights, TemporaryDirectory() as output:  # nothing is written to a model's folder
            folder = source if source.is_dir() else random_weights(source, Path(weights), args.seed)
            first_wav(machine, name, folder, Path(output) / "speech.wav", args)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    add_device(parser)
    add_measuring(parser, 3)
    return parser.parse_args(argv)


def random_weights(config: Path, folder: Path, seed: int) -> Path:
    """Make a model folder of this configuration, without the encoders, which speaking does not need."""
    from tools.random_model import write_weights

    write_weights(with_config(folder, config), seed)
    return folder


def first_wav(machine: Machine, name: str, folder: Path, wav: Path, args: argparse.Namespace) -> None:
    import soundfile

    weights = {part: folder / f"{part}.pt" for part in ("llm", "flow", "hift")}
    options = ["--text", TEXT, "--output", wav, "--model-dir", folder, "--embedding", "zero", "--device", args.device]
    options += ["--llm", weights["llm"], "--flow", weights["flow"], "--seed", args.seed]
    seconds = repeated(lambda: inference(*options, threads=args.threads), args.repeats)
    limit = sum(path.stat().st_size for path in weights.values()) / machine.bytes_per_second
    labels = {"bench": "start_up", "model": name, "what": "first wav"}
    show(machine, labels, seconds, limit, speech_seconds=soundfile.info(wav).duration)


def inference(*options: object, threads: int) -> None:
    """Run the command in a new Python until it ends."""
    command = [sys.executable, ROOT / "inference_joint.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    from cosyvoice.runtime.command import run

    run(main)
