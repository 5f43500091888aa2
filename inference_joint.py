"""Speak text in a trained voice, without reference audio.

    python inference_joint.py --text "To be spoken."

By default the newest voice of the output folder speaks.
"""

if __name__ == "__main__":  # before the imports, which take a while
    from cosyvoice.runtime.startup import stop_silently

    stop_silently()

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config import find_model_dir
from cosyvoice.runtime.command import run
from utils import add_device, add_folders, add_seed, check_writable
from voices.lines import read_lines
from voices.options import add_voice, open_voice

if TYPE_CHECKING:
    from voices.lines import Line
    from voices.synthesis import ReadyVoice


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    lines = read_lines(args.text, args.text_file, args.output or args.output_dir / "result.wav")
    from cosyvoice.cli.model import check_speed  # torch, from here on
    from voices.wav import speak_into_files

    check_speed(args.speed, args.stream)
    folder = find_model_dir(args.model_dir)
    check_writable(lines[0].output.parent, folder.path)
    voice, sources = open_voice(args, folder)
    for part, source in sources.items():
        print(f"{part:8} {source}")
    started, total = time.perf_counter(), 0.0
    if args.stream:
        total = sum(stream(voice, line, args.seed) for line in lines)
    else:
        for line, seconds in speak_into_files(voice, lines, args.speed, args.seed, args.batch_size):
            print(f"{line.output}: {seconds:.2f} s of speech", flush=True)
            total += seconds
    elapsed = time.perf_counter() - started
    print(f"{total:.2f} s of speech in {elapsed:.2f} s, real-time factor {elapsed / total:.2f}")
    return 0


def stream(voice: "ReadyVoice", line: "Line", seed: int) -> float:
    """Speak a line piece by piece, and say when the first one was there. Return its seconds of speech."""
    from voices.wav import stream_into_files

    started = time.perf_counter()
    for number, (path, seconds) in enumerate(stream_into_files(voice, line, seed)):
        after = f", first sound after {time.perf_counter() - started:.2f} s" if number == 0 else ""
        print(f"{path}: {seconds:.2f} s of speech{after}", flush=True)
    return seconds


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = parser.add_argument_group("text").add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="what to speak")
    text.add_argument("--text-file", type=Path, help="UTF-8; each line becomes a wav with the line's number")
    add_voice(parser)
    sound = parser.add_argument_group("sound")
    sound.add_argument("--output", type=Path, help="wav to write (default: result.wav in the output folder)")
    sound.add_argument(
        "--stream", action="store_true", help="write pieces as they are made, result.piece001.wav and so on, at speed 1"
    )
    sound.add_argument("--speed", type=float, default=1.0, help="0.5 (slow) to 2 (fast) (default: %(default)s)")
    add_folders(parser, "model", "output")
    add_device(parser)
    add_seed(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
