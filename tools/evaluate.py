#!/usr/bin/env python3
"""Judge speech: can it be understood, whose voice is it, how good does it sound, and does it talk on?

    python tools/evaluate.py --text-file examples/mini/eval_sentences.txt --reference examples/raw_audio
    python tools/evaluate.py --wavs FOLDER --reference examples/raw_audio

The first command speaks with the newest voice of the output folder and judges that; the second judges recordings
NNN.wav that say NNN.txt. Both print a table, and write evaluation.json and evaluation.png. Beside each figure stands
that of the target speaker's own recordings, which is the ceiling. `make eval` installs the judges.

    word error       of Whisper base; the same heard words against wrong texts must come near 1
    phoneme error    of hama, which has no language model; in English only, with the same control
    duration ratio   to the target speaker's own seconds per character; where it is high, the voice talks on
    DNSMOS overall   how good it sounds, from 1 to 5
    similarity       to the mean of the target speaker's recordings, and the margin over the nearest base voice

A base model is judged by its files: --llm MODEL/llm.pt --flow MODEL/flow.pt --speaker NAME. With --stream, the lines
are spoken in pieces as in `inference_joint.py --stream`, and where the pieces join is judged, too.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosyvoice.model_folder.folder import ModelFolder
    from tools.evaluation_report import Evaluation
    from tools.measures import Delivery
    from voices.lines import Line
    from voices.synthesis import ReadyVoice

ROOT = Path(__file__).resolve().parents[1]
SPEAKING = ("llm", "flow", "adapter", "speaker", "stream")  # options


def main(argv: Sequence[str] | None = None) -> int:
    from config import find_input_dir, find_model_dir
    from utils import check_writable

    args = parse(argv)
    args.results = args.results or args.output_dir / "evaluation"
    folder, args.reference = find_model_dir(args.model_dir), find_input_dir(args.reference)
    args.model_dir = folder.path  # for the report
    check_writable(args.results, folder.path)

    from tools.evaluation_report import draw, table, write_json

    evaluation = evaluate(args, folder)
    print(table(evaluation))
    write_json(evaluation, args.results / "evaluation.json")
    draw(evaluation, args.results / "evaluation.png")
    print(f"{args.results / 'evaluation.json'}\n{args.results / 'evaluation.png'}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from utils import add_device, add_folders, add_seeds
    from voices.options import add_voice

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    judged = parser.add_argument_group("what is judged").add_mutually_exclusive_group(required=True)
    judged.add_argument("--text-file", type=Path, help="UTF-8; each line is spoken and judged")
    judged.add_argument("--wavs", type=Path, metavar="FOLDER", help="recordings NNN.wav with their texts NNN.txt")
    compared = parser.add_argument_group("what it is compared with")
    compared.add_argument(
        "--reference", type=Path, metavar="FOLDER", help="the target speaker's clips and texts (default: raw_audio/)"
    )
    compared.add_argument(
        "--base-voices", type=Path, metavar="FOLDER", help="holds a folder of recordings for each base voice"
    )
    parser.add_argument_group("judges").add_argument(
        "--language", metavar="CODE", help="of the texts, e.g. de (default: zh for Chinese characters, else en)"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--results", type=Path, metavar="FOLDER", help="for JSON, picture and wavs (default: OUTPUT_DIR/evaluation)"
    )
    parser.add_argument("--stream", action="store_true", help="speak in pieces, as they are made")
    add_voice(parser)
    add_folders(parser, "model", "output")
    add_device(parser)
    add_seeds(parser)
    args = parser.parse_args(argv)
    if args.wavs:
        refuse_speaking(args)
    return args


def refuse_speaking(args: argparse.Namespace) -> None:
    """Raise InputError for an option that would do nothing, since nothing is spoken."""
    from cosyvoice.runtime.errors import InputError

    if given := [option for option in SPEAKING if getattr(args, option)]:
        raise InputError(f"--{given[0]} is for speech from --text-file; --wavs judges recordings as they are")


def evaluate(args: argparse.Namespace, folder: "ModelFolder") -> "Evaluation":
    """Speak where there are texts, and ask the judges. What is missing shows before the work."""
    from cosyvoice.utils.frontend_utils import contains_chinese
    from tools.evaluation_report import Evaluation
    from tools.judges import open_judges
    from tools.listening import judge_all, original_pace, read_saying, read_sayings, read_voices
    from tools.packages import optional
    from voices.lines import read_lines

    seeds = args.seeds if args.text_file else []
    lines = {seed: read_lines(None, args.text_file, args.results / f"spoken_{seed}.wav") for seed in seeds}
    recordings = read_sayings(args.wavs) if args.wavs else []
    texts = [saying.text for saying in recordings] + [line.text for line in chain(*lines.values())]
    judges = open_judges(args.language or ("zh" if any(map(contains_chinese, texts)) else "en"))
    with optional():
        import matplotlib  # noqa: F401
    originals = read_sayings(args.reference, all_needed=False)
    bases = read_voices(args.base_voices, args.reference) if args.base_voices else {}
    voice, delivery = speak(lines, args, folder) if lines else (None, None)
    spoken = [read_saying(line.output, line.text, seed) for seed in lines for line in lines[seed]]
    judged = judge_all(recordings or spoken, originals, bases, judges)
    options = {name: str(value) for name, value in vars(args).items() if value is not None}
    return Evaluation({"options": options, "voice": voice}, original_pace(originals), *judged, delivery)


def speak(
    lines: dict[int, list["Line"]], args: argparse.Namespace, folder: "ModelFolder"
) -> tuple[dict[str, str], "Delivery"]:
    """Speak the lines of every seed into their wavs, the text beside each.

    Returns what each part of the voice was loaded from, and how the speech was made.
    """
    from tqdm import tqdm

    from cosyvoice.utils.file_utils import atomic_write
    from tools.measures import Delivery
    from voices.options import open_voice
    from voices.wav import speak_into_files

    voice, sources = open_voice(args, folder)
    started, total, streams = time.perf_counter(), 0.0, []
    for seed, own in lines.items():
        if args.stream:
            spoken = stream(voice, own, seed, streams)
        else:
            spoken = speak_into_files(voice, own, speed=1.0, seed=seed, together=args.batch_size)
        for line, seconds in tqdm(spoken, desc=f"speaking with seed {seed}", total=len(own), unit="sentence"):
            total += seconds
            with atomic_write(line.output.with_suffix(".txt")) as temporary:
                temporary.write_text(line.text + "\n", encoding="utf-8")
    delivery = Delivery((time.perf_counter() - started) / total)
    if streams:
        waits, jumps = zip(*streams, strict=True)
        delivery.first_sound_seconds, delivery.seam_jump = sum(waits) / len(waits), max(jumps)
    return sources, delivery


def stream(
    voice: "ReadyVoice", lines: list["Line"], seed: int, streams: list[tuple[float, float]]
) -> Iterator[tuple["Line", float]]:
    """Stream each line into its file, and yield it with its seconds of speech.

    Appends to `streams` the seconds until the first sound, and the jump at the seams.
    """
    from tools.measures import seam_jump
    from voices.wav import write_stream

    for line in lines:
        started, wait, pieces = time.perf_counter(), None, []
        for piece in voice.stream(line, seed):
            wait = time.perf_counter() - started if wait is None else wait
            pieces.append(piece)
        streams.append((wait, seam_jump(pieces)))
        yield line, write_stream(voice, line, seed, pieces)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
