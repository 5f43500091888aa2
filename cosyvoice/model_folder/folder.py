"""A base model's folder: which files it has, where they lie, and what they say about the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.utils.errors import InputError

MOST_THREADS = 1024


@dataclass(frozen=True)
class Generation:
    """What all model folders of one generation share."""

    name: str  # as its users call it
    yaml: str
    speech_tokenizer: str
    download: str  # where it comes from


COSYVOICE_300M = Generation(
    name="CosyVoice-300M",
    yaml="cosyvoice.yaml",
    speech_tokenizer="speech_tokenizer_v1.onnx",
    download="FunAudioLLM/CosyVoice-300M",
)
GENERATIONS = (COSYVOICE_300M,)
UNKNOWN_YAMLS = {"cosyvoice2.yaml": "CosyVoice2", "cosyvoice3.yaml": "CosyVoice3"}


def is_model_folder(path: Path) -> bool:
    """Return whether the folder has the YAML of a generation that the suite knows."""
    return any((path / generation.yaml).is_file() for generation in GENERATIONS)


class ModelFolder:
    """The folder of a base model.

    Nothing is read before it is asked for. Raises InputError for a folder that does not exist, and for one of a
    generation that the suite does not know.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            source = f"https://huggingface.co/{COSYVOICE_300M.download}"
            raise InputError(f"there is no model folder {path}; download {COSYVOICE_300M.name} from {source}")
        for name, model in UNKNOWN_YAMLS.items():
            if (self.path / name).exists():
                raise InputError(f"{path} is a {model} folder; use CosyVoice-300M, -SFT or -Instruct")
        known = [generation for generation in GENERATIONS if (self.path / generation.yaml).is_file()]
        self.generation = known[0] if known else COSYVOICE_300M  # reading it says what is missing

    @property
    def yaml(self) -> Path:
        return self.path / self.generation.yaml

    @property
    def speech_tokenizer(self) -> Path:
        return self.path / self.generation.speech_tokenizer

    @property
    def speaker_encoder(self) -> Path:
        return self.path / "campplus.onnx"

    @property
    def stored_speakers(self) -> Path:
        """The file of the stored voices, which may be absent."""
        return self.path / "spk2info.pt"

    def weights(self, part: str) -> Path:
        """Return the file of a part's weights: llm, flow or hift."""
        return self.path / f"{part}.pt"

    def parts(self, names: Sequence[str], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the named entries of the YAML, built. See `load_model_yaml`."""
        return load_model_yaml(self.yaml, names, dict(defaults or {}))

    @cached_property
    def _for_users(self) -> dict[str, Any]:
        """The entries that this suite adds to the format."""
        return self.parts(("finetuning", "threads"), {"finetuning": {}, "threads": None})

    @property
    def finetuning(self) -> dict[str, Any]:
        """The settings of few-shot training that suit this model better than the defaults, as config.py names them.

        Raises InputError if the entry of the YAML is no mapping.
        """
        found = self._for_users["finetuning"]
        if not isinstance(found, dict):
            raise InputError(f"{self.yaml}: finetuning holds {found!r}. Give settings of config.py by their names")
        return found

    @property
    def threads(self) -> int | None:
        """The number of CPU threads that suits the model, or None if any does. Raises InputError for other values."""
        found = self._for_users["threads"]
        if found is not None and (type(found) is not int or not 1 <= found <= MOST_THREADS):
            raise InputError(f"{self.yaml}: threads is {found!r}. Give a number from 1 to {MOST_THREADS}")
        return found
