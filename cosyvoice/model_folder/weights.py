"""Reading weights: never code, always strict, and a mismatch explained."""

import mmap
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError

# Integers that training checkpoints of this format carry among the weights.
TRAINING_COUNTERS = ("epoch", "step")
BATCH_NORM_COUNTER = "num_batches_tracked"
GROUPS_SHOWN = 6
TEXT_ROWS_25HZ = (60510, 60515)
COSYVOICE2_NAMES = re.compile(r"^(llm\.model\.|encoder\.up_|encoder\.pre_lookahead|ups\.2\.)")
COSYVOICE2_ROWS = {"speech_embedding.weight": 6564, "input_embedding.weight": 6561}

# Functions that fill weights with random numbers: methods of tensors, those of torch.nn.init, and transformers' own.
RANDOM_INITS = ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_")

NAME_LENGTHS_AT, LOCAL_HEADER_BYTES = 26, 30  # of a part of a zip file (PKWARE's APPNOTE 4.3.7)
_ANOTHER = "take another copy, or train again"

# What reading a damaged file ends in, by where the damage lies.
DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)


def load_tensors(path: Path, remedy: str, mapped: bool = False) -> Any:
    """What torch.save wrote, tensors and plain values only, on the CPU.

    mapped: leave the tensors in the file, where it allows that; Windows then lets nobody replace it. Raises InputError,
    with the remedy, when the file is missing, damaged, or would run code on loading.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; {remedy}")
    try:
        _check_sums(path)
        with warnings.catch_warnings(action="ignore"):  # about pickles of other versions, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            problem = f"is refused: it wants to load {wanted[1]}, and data need no code; it was not run"
            raise InputError(f"{path} {problem}; {remedy}") from None
        raise InputError(f"{path} is damaged or of another kind; {remedy}") from None
    except DAMAGE:
        raise InputError(f"{path} is damaged or of another kind; {remedy}") from None


def _check_sums(path: Path) -> None:
    """Raise BadZipFile if a part of the file is not what was written: torch writes a sum of each and compares none."""
    if not zipfile.is_zipfile(path):
        return  # torch's format before 1.6 has none
    with (
        path.open("rb") as file,
        zipfile.ZipFile(file) as parts,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
    ):
        for part in parts.infolist():
            names = struct.unpack_from("<HH", content, part.header_offset + NAME_LENGTHS_AT)
            start = part.header_offset + LOCAL_HEADER_BYTES + sum(names)
            if zlib.crc32(content[start : start + part.compress_size]) != part.CRC:
                raise zipfile.BadZipFile(part.filename)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` file by name, on the CPU, memory-mapped where the file allows it.

    Raises InputError when the file is missing, damaged, would run code on loading, or holds something else than finite
    floating-point numbers.
    """
    state = load_tensors(path, "copy it, or download it again", mapped=True)
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
    state = {name: value for name, value in state.items() if name not in TRAINING_COUNTERS}
    _check_tensors(path, state)
    return state


def load_strict(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Loads `state` into `module`; every name and every shape must match.

    The older spellings of a vocoder are understood: a `generator.` prefix, `weight_g` and `weight_v` for
    weight norm. `name` is what a message calls the file. Raises InputError with the differing names,
    grouped, and the likely cause.
    """
    state = {current_name(key): value for key, value in state.items()}
    own = module.state_dict()
    missing = own.keys() - state.keys()
    unexpected = state.keys() - own.keys()
    reshaped = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    problems = [
        f"{len(missing)} missing ({_grouped(missing)})" if missing else "",
        f"{len(unexpected)} unexpected ({_grouped(unexpected)})" if unexpected else "",
        f"{len(reshaped)} of another shape ({_shapes(sorted(reshaped), state, own)})" if reshaped else "",
    ]
    if any(problems):
        differences = "; ".join(filter(None, problems))
        cause = _likely_cause(state, own, missing, unexpected)
        raise InputError(f"{name} does not fit this model: {differences}. Likely cause: {cause}")
    module.load_state_dict(state, strict=True)


class NoRandomInit(TorchFunctionMode):
    """Modules that are built in this context have memory for their weights, and in it whatever was there.

    For modules that `load_strict` fills: at 300M sizes the random numbers alone would take seconds.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in RANDOM_INITS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_part(folder: ModelFolder, part: str, weights: Path | None = None) -> nn.Module:
    """Return `llm`, `flow` or `hift` of a model folder, built and strictly loaded, in eval mode on the CPU.

    weights: a file in place of the folder's own.
    """
    with NoRandomInit():
        module = folder.parts([part])[part]
    file = weights or folder.weights(part)
    load_strict(module, read_state_dict(file), str(file))
    return module.eval()


def _check_tensors(path: Path, state: dict) -> None:
    if "state_dict" in state:
        raise InputError(f"{path} is a training checkpoint where weights are expected; merge or average it first")
    others = sorted(
        str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    )
    if others or not state:
        what = f"{', '.join(others[:GROUPS_SHOWN])} are not named tensors" if others else "it is empty"
        raise InputError(f"{path} is not a weights file: {what}")
    check_finite(path, state)


def check_fields(path: Path, found: Any, kinds: Mapping[str, Any], remedy: str) -> None:
    """Raise InputError if the mapping `found` lacks one of the fields, or has another kind of value there."""
    for name, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise InputError(f"{path} is damaged: its {name or 'content'} is missing or of another kind; {remedy}")


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises InputError, naming the file, unless all are finite floating-point numbers."""
    for name, tensor in tensors.items():
        if name.endswith(BATCH_NORM_COUNTER):
            continue
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{path}: {name} is of type {kind}, and weights are floating-point; {_ANOTHER}")
        # of finite numbers almost always finite, too, and quickly made
        total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
        if not total.isfinite() and not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds values that are not finite; {_ANOTHER}")


def current_name(name: str) -> str:
    """Return what the modules here call a weight that files of older versions may call something else."""
    name = name.removeprefix("generator.")
    if name.endswith((".weight_g", ".weight_v")):
        return f"{name[:-9]}.parametrizations.weight.original{'gv'.index(name[-1])}"
    return name


def _shapes(names: list[str], state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """`text_embedding.weight 60515x512, not 51866x512`, for the first few names."""

    def size(tensor: Tensor) -> str:
        return "x".join(map(str, tensor.shape)) or "a scalar"

    shown = [f"{name} {size(state[name])}, not {size(own[name])}" for name in names[:GROUPS_SHOWN]]
    return ", ".join([*shown, "..."] if len(names) > GROUPS_SHOWN else shown)


def _grouped(names: set[str]) -> str:
    """`decoder.estimator.*: 120, encoder.*: 12`: counts under the longest prefixes that give few groups."""
    patterns = [re.sub(r"\.\d+(?=\.|$)", ".*", name).split(".") for name in sorted(names)]
    for depth in range(max(map(len, patterns)), 0, -1):
        groups = Counter(_prefix(pattern, depth) for pattern in patterns)
        if len(groups) <= GROUPS_SHOWN:
            break
    shown = [f"{group}: {count}" for group, count in groups.most_common(GROUPS_SHOWN)]
    return ", ".join([*shown, "..."] if len(groups) > GROUPS_SHOWN else shown)


def _prefix(pattern: list[str], depth: int) -> str:
    return ".".join(pattern[:depth]) + (".*" if len(pattern) > depth else "")


def _of_cosyvoice2(state: dict[str, Tensor]) -> bool:
    rows = {name: len(tensor) for name, tensor in state.items() if tensor.dim()}
    return any(map(COSYVOICE2_NAMES.search, state)) or bool(COSYVOICE2_ROWS.items() & rows.items())


def _likely_cause(state: dict[str, Tensor], own: dict[str, Tensor], missing: set[str], unexpected: set[str]) -> str:
    rows = {name: len(tensor) for name, tensor in state.items() if tensor.dim()}
    if any("lora_" in name for name in unexpected):
        return "it holds LoRA adapters; give the base weights here, or merge first"
    if unexpected and {name.replace(".attn.", ".attn1.") for name in unexpected} == missing:
        return "its attention layers are named attn, not attn1; another version of the code wrote it"
    if _of_cosyvoice2(state) and not _of_cosyvoice2(own):
        return "it belongs to CosyVoice2; use CosyVoice-300M, -SFT or -Instruct"
    if _of_cosyvoice2(own) and not _of_cosyvoice2(state):
        return "it belongs to another model; use CosyVoice2-0.5B"
    if rows.get("text_embedding.weight") in TEXT_ROWS_25HZ:
        return "it belongs to CosyVoice-300M-25Hz; use the 50 Hz CosyVoice-300M, -SFT or -Instruct"
    if len(unexpected) == len(state):
        return "it holds the weights of another part of the model"
    return "the weights and the YAML come from different models, or the file is incomplete"
