"""A base model's folder: which files it has, where they lie, and what they say about the model."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cosyvoice.model_folder.fingerprints import fingerprint_file
from cosyvoice.model_folder.model_yaml import build_entries, parse_model_yaml, spelled
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.frames import Rates

MOST_THREADS = 1024
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")  # of a text model


@dataclass(frozen=True)
class Generation:
    """What all model folders of one generation share."""

    models: tuple[str, ...]  # as their users call them, and their folders; the first one is looked for first
    yaml: str
    speech_tokenizer: str
    token_rate: int  # speech tokens a second, where the YAML does not say
    text_model: str | None = None  # folder with configuration and tokenizer of the text model it goes on from
    finetuning: Mapping[str, Any] = field(default_factory=dict)  # settings that differ from those in config.py

    @property
    def name(self) -> str:
        return self.models[0]

    @property
    def download(self) -> str:
        return f"FunAudioLLM/{self.name}"


COSYVOICE_300M = Generation(
    models=("CosyVoice-300M", "CosyVoice-300M-SFT", "CosyVoice-300M-Instruct"),
    yaml="cosyvoice.yaml",
    speech_tokenizer="speech_tokenizer_v1.onnx",
    token_rate=50,
)
COSYVOICE2 = Generation(
    models=("CosyVoice2-0.5B",),
    yaml="cosyvoice2.yaml",
    speech_tokenizer="speech_tokenizer_v2.onnx",
    token_rate=25,
    text_model="CosyVoice-BlankEN",
    finetuning={
        "bistream_ratio": 0.5,  # share of the clips in which text and speech take turns, as the model was trained
        "llm_lora": {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        },
    },
)
GENERATIONS = (COSYVOICE_300M, COSYVOICE2)
UNKNOWN_YAMLS = {"cosyvoice3.yaml": "CosyVoice3"}
_KNOWN = " or ".join(generation.name for generation in GENERATIONS)


def is_model_folder(path: Path) -> bool:
    """Return whether the folder has the YAML of a generation that the suite knows."""
    return any((path / generation.yaml).is_file() for generation in GENERATIONS)


class ModelFolder:
    """The folder of a base model.

    Nothing is read before it is asked for, and the YAML is read once. Raises InputError for a folder that does not
    exist, one of a generation that the suite does not know, and one that could be of two.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            source = f"https://huggingface.co/{COSYVOICE_300M.download}"
            raise InputError(f"there is no model folder {path}; download {COSYVOICE_300M.name} from {source}")
        found = [generation for generation in GENERATIONS if (self.path / generation.yaml).is_file()]
        if len(found) > 1:
            names = " and ".join(generation.yaml for generation in found)
            raise InputError(f"{path} has {names}. Remove the one that its weights do not belong to")
        for name, model in UNKNOWN_YAMLS.items():
            if (self.path / name).exists():
                raise InputError(f"{path} is a {model} folder; use {_KNOWN}")
        self.generation = found[0] if found else COSYVOICE_300M  # reading its YAML says what is missing

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

    @property
    def text_model(self) -> Path | None:
        """The folder of the text model that the language model goes on from, None where there is no such model."""
        return self.path / self.generation.text_model if self.generation.text_model else None

    def weights(self, part: str) -> Path:
        """Return the file of a part's weights: llm, flow or hift."""
        return self.path / f"{part}.pt"

    def encoders(self) -> str:
        """Return what tells apart models whose tokens and vectors mean different things, as a SHA-256 in hexadecimal.

        It is made of both encoders and the text tokenizer. Raises InputError if a file of these is missing.
        """
        files = [self.speech_tokenizer, self.speaker_encoder]
        if self.text_model:
            files += [self.text_model / name for name in TOKENIZER_FILES]
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} does not exist; copy it from the {self.generation.name} download")
        tokenizer = self.parts(["get_tokenizer"], text_model=Path(self.generation.text_model or ""))["get_tokenizer"]
        content = " ".join([*map(fingerprint_file, files), str(spelled(tokenizer))])
        return hashlib.sha256(content.encode()).hexdigest()

    def parts(
        self, names: Sequence[str], defaults: Mapping[str, Any] | None = None, text_model: Path | None = None
    ) -> dict[str, Any]:
        """Return the named entries of the YAML, built. See `build_entries`.

        text_model: what is named as the folder of the text model, if not where it lies.
        """
        overrides = {"qwen_pretrain_path": str(text_model or self.text_model)} if self.text_model else {}
        return build_entries(self.yaml, self._entries, names, dict(defaults or {}), overrides)

    @cached_property
    def _entries(self) -> dict[str, Any]:
        return parse_model_yaml(self.yaml)

    @cached_property
    def rates(self) -> Rates:
        """The rates of samples, mel frames and speech tokens."""
        names = ("sample_rate", "feat_extractor", "token_frame_rate")
        found = self.parts(names, {"token_frame_rate": self.generation.token_rate})
        return Rates.of_yaml(*(found[name] for name in names))

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
        return merged_settings(self.generation.finetuning, found)

    @property
    def threads(self) -> int | None:
        """The number of CPU threads that suits the model, or None if any does. Raises InputError for other values."""
        found = self._for_users["threads"]
        if found is not None and (type(found) is not int or not 1 <= found <= MOST_THREADS):
            raise InputError(f"{self.yaml}: threads is {found!r}. Give a number from 1 to {MOST_THREADS}")
        return found


def as_folder(model_dir: str | Path | ModelFolder) -> ModelFolder:
    """Return the folder itself, or that of a path."""
    return model_dir if isinstance(model_dir, ModelFolder) else ModelFolder(model_dir)


def merged_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes; where both hold a mapping, that of the first is changed in turn."""
    merged = dict(settings)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **value} if both else value
    return merged
