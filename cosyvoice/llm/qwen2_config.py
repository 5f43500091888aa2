"""Reads the sizes of a Qwen2 model from its folder. Of that folder nothing else is read, and nothing is run."""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyvoice.model_folder.argument_types import MOST_ANYTHING
from cosyvoice.model_folder.blank_en import REMEDY, read_json
from cosyvoice.runtime.errors import InputError

if TYPE_CHECKING:
    from transformers import Qwen2Config

TESTED_RELEASE = "5.24"  # of transformers: others name layers, masks and caches differently
MOST_LAYERS = 200

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
NUMBERS = ("rms_norm_eps", "rope_theta")
# What the public Qwen2 models have, and all that is implemented here.
ONLY = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None}


def read_qwen2_config(folder: Path) -> "Qwen2Config":
    """Return the configuration that `config.json` in the folder describes.

    Raises InputError if the file is missing, damaged or describes what is not implemented here, and if the installed
    transformers is of a release that was not tested.
    """
    path = folder / "config.json"
    values = _checked(path, read_json(path))
    check_release()
    from transformers import Qwen2Config  # 2 seconds

    return Qwen2Config(
        **{name: values[name] for name in COUNTS},
        rms_norm_eps=values["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(values["rope_theta"])},
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        attention_dropout=values.get("attention_dropout", 0.0),
    )


def check_release() -> None:
    """Raise InputError if transformers is missing or of a release that was not tested."""
    remedy = f"install it with: pip install 'transformers=={TESTED_RELEASE}.*'"
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise InputError(f"CosyVoice2 needs transformers, which is missing; {remedy}") from None
    if not installed.startswith(f"{TESTED_RELEASE}."):
        raise InputError(f"transformers {installed} was not tested with CosyVoice2, {TESTED_RELEASE} was; {remedy}")


def _checked(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    for name in COUNTS:
        most = MOST_LAYERS if name == "num_hidden_layers" else MOST_ANYTHING
        if type(values.get(name)) is not int or not 0 < values[name] <= most:
            raise InputError(f"{path}: {name} is {values.get(name)!r:.80}, and should be a whole number; {REMEDY}")
    for name in NUMBERS:
        if type(values.get(name)) not in (int, float) or not 0 < values[name] < float("inf"):
            raise InputError(f"{path}: {name} is {values.get(name)!r:.80}, and should be a positive number; {REMEDY}")
    if type(values.get("tie_word_embeddings", False)) is not bool:
        raise InputError(f"{path}: tie_word_embeddings is neither true nor false; {REMEDY}")
    dropout = values.get("attention_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise InputError(f"{path}: attention_dropout is {dropout!r:.80}, and should be a share; {REMEDY}")
    for name, value in ONLY.items():
        if values.get(name, value) != value:
            raise InputError(f"{path}: {name} {values[name]!r:.80} is not implemented, only {value!r}; {REMEDY}")
    width, heads, key_heads = (values[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if width % (2 * heads) or heads % key_heads:
        raise InputError(f"{path}: {width} channels do not divide into {heads} heads that share {key_heads}; {REMEDY}")
    return values
