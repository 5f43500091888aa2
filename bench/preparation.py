"""Clips per second that prepare_joint_data.py prepares.

    python bench/preparation.py

It prepares the recordings in examples/raw_audio, each time into an empty folder, with as many clips at a time as
threads. Without `--model-dir` the two ONNX encoders are small and have random weights, so the time is that of reading,
resampling, features, text, and writing. There is no share of a limit, because the encoders' floating-point operations
are not counted. The row is also printed as a line of JSON.
"""

import argparse
import io
import statistics
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from measuring import ROOT, add_device, add_measuring, measure_machine, repeated, show

RECORDINGS = ROOT / "examples" / "raw_audio"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    machine = measure_machine(args)
    from clips.recordings import find_recordings

    recordings = [recording.audio for recording in find_recordings(RECORDINGS)]
    with TemporaryDirectory() as temporary:
        model_dir = args.model_dir or random_encoders(Path(temporary), args.seed)
        prepare(model_dir, args)  # not counted: imports, and the text grammars
        seconds = repeated(lambda: prepare(model_dir, args), args.repeats)
    encoders = model_dir.name if args.model_dir else "random encoders"
    labels = {"bench": "preparation", "model": encoders, "what": RECORDINGS.name, "clips": len(recordings)}
    median, speech_seconds = statistics.median(seconds), sum(map(duration, recordings))
    figures = {"clips_per_second": len(recordings) / median, "real_time_factor": median / speech_seconds}
    show(machine, labels, seconds, None, **figures)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, help="model folder (default: small encoders with random weights)")
    add_device(parser)
    add_measuring(parser, 3)
    return parser.parse_args(argv)


def random_encoders(folder: Path, seed: int) -> Path:
    from tools.random_model import make_random_model

    return make_random_model(folder, seed)


def prepare(model_dir: Path, args: argparse.Namespace) -> None:
    """Prepare all recordings and discard what the command prints."""
    from prepare_joint_data import main as prepare_joint_data

    with TemporaryDirectory() as data_dir, redirect_stdout(io.StringIO()):
        folders = ["--model-dir", str(model_dir), "--input-dir", str(RECORDINGS), "--data-dir", data_dir]
        prepare_joint_data([*folders, "--workers", str(args.threads), "--device", args.device])


def duration(recording: Path) -> float:
    import soundfile

    return soundfile.info(recording).duration


if __name__ == "__main__":
    from cosyvoice.runtime.command import run

    run(main)
