"""A voice made ready to speak: the files it consists of, the vector it speaks with, and one text after another.

Nothing here imports torch before it is needed, so that the scripts which use it answer `--help` at once.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

from config import PARTS
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.utils.command import check_least
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.frames import SPEAKER_DIMENSIONS
from cosyvoice.utils.frontend_utils import has_words
from cosyvoice.utils.text_files import decode_lines
from utils import limit_threads, pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from cosyvoice.cli.cosyvoice import CosyVoice
    from voice import Run

MOST_LETTERS_NAMED = 10
VOICE_NAME = "voice"  # under this name the chosen speaker vector is handed to the front end


@dataclass
class Line:
    """One text and the file it is spoken into."""

    number: int  # line of the text file, from 1
    text: str
    output: Path


@dataclass
class Voice:
    """What speaks: files in place of base weights, adapters on top of them, and the speaker."""

    weights: dict[str, Path] = field(default_factory=dict)  # merged files by part
    adapters: "Run | None" = None
    speaker: str | None = None  # the name of the trained speaker, where it is known
    pace: float | None = None  # the slowest of the speaker that the LLM was trained on, in speech tokens per text token


@dataclass
class ReadyVoice:
    """A loaded voice, and where each thing it speaks with came from."""

    cosyvoice: "CosyVoice"
    sources: dict[str, str]  # by part (llm, flow, hift) and `speaker`

    def speak(self, lines: Sequence[Line], speed: float, seed: int, together: int) -> Iterator[tuple[Line, float]]:
        """Speak each line into its wav; yields it with its seconds of speech.

        `together` pieces of text are written at once. The draws of each follow from (seed, line number, piece), so what
        else is spoken changes them not; but in int8 pieces that are written at once are rounded alike.
        """
        import torch

        from cosyvoice.utils.draws import Draws

        self.warn_of_letters(lines)
        jobs = [(line, number, piece) for line in lines for number, piece in enumerate(self.cosyvoice.split(line.text))]
        rate_hz, spoken = self.cosyvoice.sample_rate, []
        told = f"speed {speed}, {self.cosyvoice.model.precision}"
        for start in range(0, len(jobs), together):
            group = jobs[start : start + together]
            draws = [Draws(seed, line.number, number) for line, number, _ in group]
            pieces = [piece for _, _, piece in group]
            speeches = self.cosyvoice.speak_together(pieces, VOICE_NAME, draws, speed)
            for done, ((line, *_), speech) in enumerate(zip(group, speeches, strict=True), start=start + 1):
                spoken.append(speech)
                if done == len(jobs) or jobs[done][0] is not line:
                    whole, spoken = torch.cat(spoken, dim=1), []
                    write_wav(line.output, whole, rate_hz, comment=f"seed {seed}, line {line.number}, {told}")
                    yield line, whole.size(1) / rate_hz

    def warn_of_letters(self, lines: Sequence[Line]) -> None:
        """Say which letters nobody can expect to hear right."""
        for line in lines:
            if letters := self.cosyvoice.frontend.unknown_letters(line.text):
                some = " ".join(letters[:MOST_LETTERS_NAMED]) + " ..." * (len(letters) > MOST_LETTERS_NAMED)
                print(f"warning: line {line.number} holds letters that this model never saw: {some}", file=sys.stderr)


def open_voice(args: argparse.Namespace, model_dir: Path) -> ReadyVoice:
    """The voice that the options of `add_voice` name, or the newest of the output folder, loaded."""
    check_least("--batch-size", args.batch_size)
    limit_threads(model_dir)
    voice = choose_voice(args, model_dir)
    speaker, embedding = speaker_vector(args, voice, model_dir)
    cosyvoice = load_voice(voice, embedding, model_dir, args.device, args.precision)
    cosyvoice.frontend.text_normalize("Ready.")  # loads tokenizer and grammars, which is not speaking time
    return ReadyVoice(cosyvoice, {**file_sources(voice, model_dir), "speaker": speaker})


def speak_checkpoint(checkpoint: Path, text: str, output: Path, model_dir: Path, device_name: str, seed: int) -> None:
    """Write the wav of one text, as `inference_joint.py --adapter --batch-size 1` with the same seed does."""
    from voice import read_run

    trained = read_run(checkpoint)
    voice = Voice(adapters=trained, pace=trained.pace)
    cosyvoice = load_voice(voice, trained.state["embedding"].view(1, -1), model_dir, device_name)
    for _ in ReadyVoice(cosyvoice, {}).speak([Line(1, text, output)], speed=1.0, seed=seed, together=1):
        pass


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


def read_lines(text: str | None, text_file: Path | None, output: Path) -> list[Line]:
    """What to speak and where to; lines of a file without words are left out, and said to be.

    Raises InputError where nothing is left, or the wav cannot be written there.
    """
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; give a file, {output / 'result.wav'} for one")
    if output.suffix.lower() != ".wav":
        raise InputError(f"--output {output} is not a .wav file; only wav is written")
    if text_file is None:
        if not has_words(text):
            raise InputError(f"--text has nothing to speak: {text!r}; give it words or numbers")
        return [Line(1, text, output)]
    lines = []
    for number, line in enumerate(read_text(text_file), start=1):
        if has_words(line):
            lines.append(Line(number, line, output.with_stem(f"{output.stem}_{number:03d}")))
        elif line.strip():
            print(f"left out: line {number} of {text_file} has nothing to speak: {line.strip()!r}", file=sys.stderr)
    if not lines:
        raise InputError(f"{text_file} has nothing to speak; write one sentence or paragraph a line")
    return lines


def read_text(path: Path) -> list[str]:
    """Return the lines of a file. Raises InputError if it cannot be read or is not UTF-8 text."""
    try:
        return decode_lines(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"the text file {path} cannot be read: {error.strerror}") from None


def choose_voice(args: argparse.Namespace, model_dir: Path) -> Voice:
    """The voice that the options name, or the newest. Raises InputError where it was made from another base."""
    from voice import base_fingerprints, check_base, newest_voice, read_run

    weights = {part: getattr(args, part) for part in PARTS if getattr(args, part)}
    for part, path in weights.items():
        if not path.is_file():
            raise InputError(f"--{part} {path} does not exist")
    if args.adapter:
        adapters = read_run(args.adapter)
        if doubled := weights.keys() & set(adapters.parts):
            raise InputError(f"--adapter already brings a {' and '.join(doubled)}; leave out --{' --'.join(doubled)}")
        adapters.check_base(base_fingerprints(model_dir), model_dir)
        return Voice(weights, adapters, adapters.state["speaker"], adapters.pace)
    sidecar = find_sidecar(weights, args.output_dir) if weights else newest_voice(args.output_dir)
    if sidecar:
        trained, parts = f"the voice {sidecar['speaker']!r}", sidecar["files"]  # other parts are the base's own
        check_base(trained, sidecar["base"], parts, base_fingerprints(model_dir), model_dir)
    files = weights or sidecar["files"]
    speaks_at_it = "llm" in files and "llm" in sidecar.get("files", {})  # a base LLM has a pace of its own
    return Voice(files, speaker=sidecar.get("speaker"), pace=sidecar.get("pace") if speaks_at_it else None)


def find_sidecar(weights: dict[str, Path], output_dir: Path) -> dict[str, Any]:
    """What was written about merged files, beside them or in the output folder; empty for files of other origin."""
    from voice import read_sidecar, sidecars

    for part, path in weights.items():
        for folder in (path.parent, output_dir):
            for sidecar in sidecars(folder):
                content = read_sidecar(sidecar)
                if part in content["files"] and (folder / content["files"][part]).resolve() == path.resolve():
                    return content
    return {}


def speaker_vector(args: argparse.Namespace, voice: Voice, model_dir: Path) -> tuple[str, "Tensor"]:
    """What it is and (1, 192): zeros, a file's content, or the vector of the named or trained speaker."""
    import torch

    if args.embedding == "zero":
        return "zero vector", torch.zeros(1, SPEAKER_DIMENSIONS)
    if args.embedding != "mean":
        return args.embedding, read_vector(Path(args.embedding))
    known = known_speakers(args, voice, model_dir)
    name = args.speaker or voice.speaker or (next(iter(known)) if len(known) == 1 else None)
    if name not in known:
        asked = f"no speaker {name!r}" if name else "the files do not say who speaks"
        raise InputError(f"{asked}; give --speaker ({', '.join(known) or 'none is stored'}) or --embedding zero")
    return f"{name} (mean vector)", known[name]


def known_speakers(args: argparse.Namespace, voice: Voice, model_dir: Path) -> "dict[str, Tensor]":
    """Speaker vectors (1, 192) by name: the base model's, the voice's, and the checkpoint's, the last named first."""
    from cosyvoice.cli.frontend import read_spk2info

    folders = [model_dir, args.output_dir, *(path.parent for path in voice.weights.values())]
    stored = [read_spk2info(folder / "spk2info.pt") for folder in folders]
    entries = (entry for speakers in stored for entry in speakers.items())
    known = {name: entry["embedding"] for name, entry in entries if "embedding" in entry}
    if voice.adapters:
        known[voice.speaker] = voice.adapters.state["embedding"].view(1, -1)
    return known


def read_vector(path: Path) -> "Tensor":
    """A (1, 192) speaker vector from a .pt tensor or a .npy array."""
    import numpy as np
    import torch

    from cosyvoice.model_folder.weights import DAMAGE, load_tensors

    if path.suffix not in (".pt", ".npy") or not path.is_file():
        raise InputError(f"--embedding takes mean, zero, or an existing .pt or .npy file, not {path}")
    if path.suffix == ".pt":
        vector = load_tensors(path, f"give {SPEAKER_DIMENSIONS} numbers")
    else:
        try:
            vector = torch.from_numpy(np.load(path, allow_pickle=False))
        except (*DAMAGE, SyntaxError, MemoryError, TokenError):  # numpy reads the header as Python's literals
            raise InputError(f"{path} is damaged or no array of numbers") from None
    numbers = isinstance(vector, torch.Tensor) and vector.dtype != torch.bool and not vector.is_complex()
    if not numbers or vector.numel() != SPEAKER_DIMENSIONS or not vector.isfinite().all():
        raise InputError(f"{path} does not hold {SPEAKER_DIMENSIONS} finite numbers")
    return vector.reshape(1, -1).float()


def load_voice(
    voice: Voice, embedding: "Tensor", model_dir: Path, device_name: str, precision: str | None = None
) -> "CosyVoice":
    """With the speaker vector (1, 192) stored as VOICE_NAME. precision: default the fastest of the device."""
    from cosyvoice.cli.cosyvoice import CosyVoice
    from cosyvoice.model_folder.weights import read_state_dict
    from cosyvoice.transformer.precision import fastest_precision
    from lora import merged

    device = pick_device(device_name)
    weights: dict[str, Any] = dict(voice.weights)
    for part in voice.adapters.parts if voice.adapters else ():
        base = read_state_dict(ModelFolder(model_dir).weights(part))
        weights[part] = merged(base, voice.adapters.adapters[part], voice.adapters.scale(part))
    precision = precision or fastest_precision(device)
    cosyvoice = CosyVoice(model_dir, device=str(device), weights=weights, precision=precision)
    cosyvoice.frontend.spk2info[VOICE_NAME] = {"embedding": embedding}
    cosyvoice.model.llm.pace = voice.pace
    return cosyvoice


def file_sources(voice: Voice, model_dir: Path) -> dict[str, str]:
    """What each part was loaded from, in words."""
    folder = ModelFolder(model_dir)
    sources = {part: str(voice.weights.get(part, f"{folder.weights(part)} (base)")) for part in PARTS}
    for part in voice.adapters.parts if voice.adapters else ():
        sources[part] += f" + adapters of {voice.adapters.path}"
    return sources | {"hift": f"{folder.weights('hift')} (base)"}


def write_wav(path: Path, speech: "Tensor", rate_hz: int, comment: str) -> None:
    """16-bit mono; the comment lies in the file's header. speech: (1, samples)."""
    import soundfile

    from cosyvoice.utils.file_utils import atomic_write

    content = BytesIO()  # a full disk is no error that soundfile tells
    with soundfile.SoundFile(content, "w", rate_hz, channels=1, format="WAV") as file:
        file.comment = comment
        file.write(speech[0].numpy())
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())
