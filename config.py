"""All settings of the suite, their check, and where models and recordings are looked for.

Change values here, or for one run with `--set KEY=VALUE` (nested keys with a dot: `llm_lora.lora_r=4`).
Nothing here imports torch, so that every script answers `--help` at once.
"""

import ast
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cosyvoice.model_folder.folder import COSYVOICE_300M, GENERATIONS, ModelFolder, is_model_folder, merged_settings
from cosyvoice.runtime.errors import InputError

PROJECT_DIR = Path(__file__).resolve().parent
DATA_DIR = Path("data")
OUTPUT_DIR = Path("output")
MINI_NAME = "CosyVoice-mini"  # the small model that ships with the suite
PARTS = ("llm", "flow")  # that are trained
MODES = {"joint": PARTS, "llm_only": ("llm",), "flow_only": ("flow",)}
SEED = 1986
CHECKPOINT_KEY = "voice"  # where the suite's own state lies in a training checkpoint

JOINT_TRAINING_CONFIG: dict[str, Any] = {
    "training_mode": "joint",  # joint, llm_only or flow_only
    # the sum of both losses is what training lowers
    "llm_loss_weight": 2.0,  # rhythm first
    "flow_loss_weight": 1.0,
    # a part stops when its training loss, the mean of three epochs, falls to this; far below, the voice talks on
    "llm_loss_threshold": 1.5,  # nats per speech token
    "flow_loss_threshold": 0.3,  # mean squared error
    "early_stopping_patience": 10,  # epochs without improvement, however few steps they have; each part by itself
    "llm_lora": {
        "lora_r": 8,
        "lora_alpha": 16,  # the update is scaled by lora_alpha / lora_r
        "lora_dropout": 0.15,
        "target_modules": ["linear_q", "linear_k", "linear_v", "linear_out", "w_1", "w_2"],
    },
    "flow_lora": {
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": [
            "to_q", "to_k", "to_v", "to_out.0", "linear_q", "linear_k", "linear_v", "linear_out", "w_1", "w_2",
            "ff.net.0.proj", "ff.net.2",
        ],
    },
    "learning_rate": 2e-4,
    "weight_decay": 0.01,
    "warmup_ratio": 0.05,  # share of all planned optimiser steps
    "gradient_clip_val": 1.0,
    "max_epochs": 100,
    "batch_size": 1,  # clips
    "accumulate_grad_batches": 16,  # batches an optimiser step; see also PASSES_ON_GPU
    # mel frames of a clip that the flow sees at once (2.9 s of CosyVoice-300M, 5 s of CosyVoice2); the LLM always hears
    # whole clips
    "max_feat_len": 250,
    "recompute": False,  # compute blocks again for their gradients, slower, but in a fraction of the memory
    "precision": "16-mixed",  # 32-true, bf16-mixed or 16-mixed, for which a CPU takes one of the others
    "validation_ratio": 0.1,  # share of the clips held out to choose the best weights
    "zero_embedding_ratio": 0.1,  # share of clips trained with a zero speaker vector, so that the weights alone speak
    "flow_prompt_ratio": 0.0,  # share of clips whose first mel frames are given to the flow; none are at inference
}  # fmt: skip

# What a GPU computes faster, where neither is set: the clips of a step in fewer passes, to the same gradient.
PASSES_ON_GPU = {"batch_size": 4, "accumulate_grad_batches": 4}


def settings_for(folder: ModelFolder) -> dict[str, Any]:
    """Return JOINT_TRAINING_CONFIG with the settings that the base model's folder asks for.

    Raises InputError if one of those is not a setting of this model, or has an impossible value.
    """
    known = merged_settings(JOINT_TRAINING_CONFIG, folder.generation.finetuning)
    config = copy.deepcopy(merged_settings(known, folder.finetuning))
    check_config(config, known, f"the finetuning entry of {folder.yaml} needs a change")
    return config


def _number(kind: type, low: float, high: float, above: bool = False) -> tuple[str, Callable[[Any], bool]]:
    """A rule for a number from `low` (or above it) to `high`."""
    allowed = (int, float) if kind is float else (int,)
    bound = "above" if above else "at least"
    name = "a whole number" if kind is int else "a number"

    def holds(value: Any) -> bool:
        return type(value) in allowed and value <= high and (value > low if above else value >= low)

    return f"{name} {bound} {low:g} and at most {high:g}", holds


def _choice(*values: str) -> tuple[str, Callable[[Any], bool]]:
    return "one of " + ", ".join(values), lambda value: value in values


def _names() -> tuple[str, Callable[[Any], bool]]:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)

    return "a list of layer names", holds


_LORA_RULES = {
    "lora_r": _number(int, 1, 1024),
    "lora_alpha": _number(float, 0, 4096, above=True),
    "lora_dropout": _number(float, 0, 0.95),
    "target_modules": _names(),
}
_RULES = {
    "training_mode": _choice(*MODES),
    "llm_loss_weight": _number(float, 0, 1e3, above=True),
    "flow_loss_weight": _number(float, 0, 1e3, above=True),
    "llm_loss_threshold": _number(float, 0, 1e3),
    "flow_loss_threshold": _number(float, 0, 1e3),
    "early_stopping_patience": _number(int, 1, 1_000_000),
    **{f"llm_lora.{key}": rule for key, rule in _LORA_RULES.items()},
    **{f"flow_lora.{key}": rule for key, rule in _LORA_RULES.items()},
    "learning_rate": _number(float, 0, 1, above=True),
    "weight_decay": _number(float, 0, 1),
    "warmup_ratio": _number(float, 0, 1),
    "gradient_clip_val": _number(float, 0, 1e6, above=True),
    "max_epochs": _number(int, 1, 1_000_000),
    "batch_size": _number(int, 1, 4096),
    "accumulate_grad_batches": _number(int, 1, 4096),
    "max_feat_len": _number(int, 32, 100_000),
    "recompute": ("True or False", lambda value: isinstance(value, bool)),
    "precision": _choice("32-true", "bf16-mixed", "16-mixed"),
    "validation_ratio": _number(float, 0, 0.5),
    "zero_embedding_ratio": _number(float, 0, 1),
    "flow_prompt_ratio": _number(float, 0, 1),
}
# Settings of some models only: the others do not have them.
_RULES_OF_SOME = {"bistream_ratio": _number(float, 0, 1)}


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with dotted names: {"llm_lora": {"lora_r": 8}} -> {"llm_lora.lora_r": 8}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[key] = value
    return flat


def check_config(
    config: dict[str, Any], known: dict[str, Any], what: str = "the settings (config.py, --set) need a change"
) -> None:
    """Raise one InputError that names every unknown, missing or impossible setting and the remedy.

    known: settings of the same model. Those that only some models have must be among them.
    """
    flat = flatten(config)
    rules = _RULES | {key: rule for key, rule in _RULES_OF_SOME.items() if key in known}
    problems = [f"{key} is no setting{' of this model' * (key in _RULES_OF_SOME)}" for key in flat if key not in rules]
    known_names = f" (known: {', '.join(rules)})" if problems else ""
    problems += [f"{key} is missing" for key in rules if key not in flat]
    for key, (wanted, holds) in rules.items():
        if key in flat and not holds(flat[key]):
            problems.append(f"{key} must be {wanted}, not {flat[key]!r}")
    if problems:
        raise InputError(f"{what}: " + "; ".join(problems) + known_names)


def with_changes(config: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A copy of `config` with `KEY=VALUE` texts applied, checked."""
    changed = copy.deepcopy(config)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"--set takes KEY=VALUE, not {change!r}")
        *path, last = key.strip().split(".")
        place = changed
        for name in path:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {key}: {name} has no settings inside; use --set {name}=VALUE")
        place[last] = _parsed(text.strip())
    check_config(changed, config)
    return changed


def _parsed(text: str) -> Any:
    """A Python literal (number, list, quoted text), or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def find_model_dir(given: str | Path | None) -> ModelFolder:
    """Return the model folder: the one given, else one of a public model under `pretrained_models/`.

    It is looked for here, in the project and one level up, CosyVoice-300M first; where there are several, a line says
    which is used. Where there is none, the small model that ships with the suite is used, and a line says so.
    """
    if given is not None:
        path = Path(given)
        folder = ModelFolder(path) if path.is_dir() else None  # says what is wrong with one that the suite cannot use
        if folder is None or not folder.yaml.is_file():
            yamls = " or ".join(generation.yaml for generation in GENERATIONS)
            raise InputError(f"{path} is no model folder: it holds no {yamls}; {_DOWNLOAD}")
        return folder
    names = [name for generation in GENERATIONS for name in generation.models]
    places = [parent / "pretrained_models" / name for parent in _search_roots() for name in names]
    found = sorted(filter(is_model_folder, places), key=lambda folder: names.index(folder.name))
    if found:
        others = dict.fromkeys(folder.name for folder in found if folder.name != found[0].name)
        if others:
            print(f"using {found[0]}; --model-dir chooses {' or '.join(others)} instead")
        return ModelFolder(found[0])
    mini = PROJECT_DIR / "pretrained_models" / MINI_NAME
    if is_model_folder(mini):
        small = "a small English model to try things out with (docs/mini.md)"
        print(f"no {COSYVOICE_300M.name} found: using {MINI_NAME}, {small}")
        return ModelFolder(mini)
    looked = ", ".join(str(parent / "pretrained_models") for parent in _search_roots())
    raise InputError(f"no model folder {COSYVOICE_300M.name} in {looked}; name one with --model-dir, or {_DOWNLOAD}")


def find_input_dir(given: str | Path | None) -> Path:
    """The folder of recordings: the one given, else `raw_audio/` or `data_preparation/short_raw_data/`."""
    if given is not None:
        if not Path(given).is_dir():
            raise InputError(f"the folder of recordings {given} does not exist")
        return Path(given)
    places = [parent / name for name in ("raw_audio", "data_preparation/short_raw_data") for parent in _search_roots()]
    for folder in places:
        if folder.is_dir():
            return folder
    looked = ", ".join(map(str, places))
    raise InputError(f"no folder of recordings ({looked}); put NNN.wav and NNN.txt there, or use --input-dir")


def _search_roots() -> list[Path]:
    """The working folder, the project and the folder above it, each once."""
    return list(dict.fromkeys((Path.cwd(), PROJECT_DIR, PROJECT_DIR.parent)))


_DOWNLOAD = (
    "download one: pip install huggingface_hub && python -c \"from huggingface_hub import snapshot_download; "
    f"snapshot_download('{COSYVOICE_300M.download}', local_dir='pretrained_models/{COSYVOICE_300M.name}')\""
)
