"""The options that choose a voice, for all commands that speak. Nothing here imports torch before it is needed."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from config import PARTS
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.command import check_least
from utils import limit_threads, pick_device

if TYPE_CHECKING:
    from voices.synthesis import ReadyVoice


def add_voice(parser: argparse.ArgumentParser) -> None:
    """Add the options that `open_voice` reads."""
    voice = parser.add_argument_group("voice (default: the newest of the output folder)")
    voice.add_argument("--llm", type=Path, help="merged LLM weights (default with --flow, --adapter: the base)")
    voice.add_argument("--flow", type=Path, help="merged Flow weights (default with --llm, --adapter: the base)")
    voice.add_argument("--adapter", type=Path, metavar="CKPT", help="speak with a checkpoint's adapters")
    voice.add_argument("--speaker", metavar="NAME", help="entry of spk2info.pt (default: the trained speaker)")
    voice.add_argument(
        "--embedding",
        default="mean",
        metavar="mean|zero|FILE",
        help="speaker vector: the speaker's mean, zeros, or a .pt or .npy of 192 numbers (default: mean)",
    )
    voice.add_argument(
        "--precision",
        metavar="float32|float16|bfloat16|int8",
        help="of LLM and Flow: float32 is exact, int8 fastest on a CPU; a GPU takes float32 or float16 (default: int8 "
        "on Intel and AMD, else float32)",
    )
    voice.add_argument(
        "--batch-size", type=int, default=8, help="sentences the LLM writes at once (default: %(default)s)"
    )


def open_voice(args: argparse.Namespace, folder: ModelFolder) -> "tuple[ReadyVoice, dict[str, str]]":
    """Return the voice that the options of `add_voice` name, or the newest of the output folder, loaded.

    Beside it, what each part (llm, flow, hift) and the `speaker` was loaded from.
    """
    from voices.choice import choose_voice, file_sources, speaker_vector
    from voices.synthesis import load_voice

    check_least("--batch-size", args.batch_size)
    limit_threads(folder)
    weights = {part: getattr(args, part) for part in PARTS if getattr(args, part)}
    voice = choose_voice(weights, args.adapter, args.output_dir, folder)
    speaker, embedding = speaker_vector(args.embedding, args.speaker, voice, args.output_dir, folder)
    ready = load_voice(voice, embedding, folder, pick_device(args.device), args.precision)
    ready.cosyvoice.frontend.text_normalize("Ready.")  # loads tokenizer and grammars, which is not speaking time
    return ready, {**file_sources(voice, folder), "speaker": speaker}
