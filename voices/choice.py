"""Which voice speaks: the files that it consists of, and the vector that it speaks with."""

from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch import Tensor

from config import PARTS
from cosyvoice.cli.frontend import read_spk2info
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import DAMAGE, load_tensors
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.frames import SPEAKER_DIMENSIONS
from voices.run import Run, check_base, read_run
from voices.sidecar import Sidecar, newest_voice, read_sidecar, sidecars


@dataclass
class Voice:
    """What speaks: files in place of base weights, adapters on top of them, and the speaker."""

    weights: dict[str, Path] = field(default_factory=dict)  # merged files by part
    adapters: Run | None = None
    speaker: str | None = None  # the name of the trained speaker, where it is known
    pace: float | None = None  # the slowest of the speaker that the LLM was trained on, in speech tokens per text token

    @classmethod
    def of_run(cls, run: Run, weights: dict[str, Path] | None = None) -> "Voice":
        """Return the voice of a checkpoint's adapters, beside merged files of other parts."""
        return cls(weights or {}, run, run.state.origin.speaker, run.pace)


def choose_voice(weights: dict[str, Path], checkpoint: Path | None, output_dir: Path, folder: ModelFolder) -> Voice:
    """Return the voice of merged files by part, of a checkpoint's adapters, of both, or the newest of the folder.

    Raises InputError if a file does not exist, or was made from another base model than that of the model folder.
    """
    for part, path in weights.items():
        if not path.is_file():
            raise InputError(f"--{part} {path} does not exist")
    if checkpoint:
        run = read_run(checkpoint)
        if doubled := weights.keys() & set(run.parts):
            raise InputError(f"--adapter already brings a {' and '.join(doubled)}; leave out --{' --'.join(doubled)}")
        run.check_base(folder)
        return Voice.of_run(run, weights)
    sidecar = find_sidecar(weights, output_dir) if weights else newest_voice(output_dir)
    if sidecar is None:
        return Voice(weights)
    files = weights or sidecar.files  # other parts are the base's own
    check_base(f"the voice {sidecar.speaker!r}", sidecar.base, sidecar.files, folder)
    speaks_at_it = "llm" in files and "llm" in sidecar.files  # a base LLM has a pace of its own
    return Voice(files, speaker=sidecar.speaker, pace=sidecar.pace if speaks_at_it else None)


def find_sidecar(weights: dict[str, Path], output_dir: Path) -> Sidecar | None:
    """Return what was written about merged files, beside them or in the output folder; None for other files."""
    for part, path in weights.items():
        for folder in (path.parent, output_dir):
            for sidecar in map(read_sidecar, sidecars(folder)):
                if part in sidecar.files and sidecar.files[part].resolve() == path.resolve():
                    return sidecar
    return None


def speaker_vector(
    embedding: str, speaker: str | None, voice: Voice, output_dir: Path, folder: ModelFolder
) -> tuple[str, Tensor]:
    """Return what the speaker vector is, and the vector (1, 192).

    embedding: "zero", a file, or "mean", which is the vector of the named or of the trained speaker.
    """
    if embedding == "zero":
        return "zero vector", torch.zeros(1, SPEAKER_DIMENSIONS)
    if embedding != "mean":
        return embedding, read_vector(Path(embedding))
    known = known_speakers(voice, output_dir, folder)
    name = speaker or voice.speaker or (next(iter(known)) if len(known) == 1 else None)
    if name not in known:
        asked = f"no speaker {name!r}" if name else "the files do not say who speaks"
        raise InputError(f"{asked}; give --speaker ({', '.join(known) or 'none is stored'}) or --embedding zero")
    return f"{name} (mean vector)", known[name]


def known_speakers(voice: Voice, output_dir: Path, folder: ModelFolder) -> dict[str, Tensor]:
    """Return speaker vectors (1, 192) by name, of base model, voice and checkpoint. The last of a name counts."""
    places = (output_dir, *(path.parent for path in voice.weights.values()))
    files = [folder.stored_speakers, *(place / "spk2info.pt" for place in places)]
    entries = (entry for file in files for entry in read_spk2info(file).items())
    known = {name: entry["embedding"] for name, entry in entries if "embedding" in entry}
    if voice.adapters:
        known[voice.speaker] = voice.adapters.embedding
    return known


def read_vector(path: Path) -> Tensor:
    """A (1, 192) speaker vector from a .pt tensor or a .npy array."""
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


def file_sources(voice: Voice, folder: ModelFolder) -> dict[str, str]:
    """Return what each part was loaded from, in words."""
    sources = {part: str(voice.weights.get(part, f"{folder.weights(part)} (base)")) for part in PARTS}
    for part in voice.adapters.parts if voice.adapters else ():
        sources[part] += f" + adapters of {voice.adapters.path}"
    return sources | {"hift": f"{folder.weights('hift')} (base)"}
