"""Reads a model folder's cosyvoice.yaml without executing anything that the file says.

The dialect is HyperPyYAML's: `!new:` builds an object, `!name:` makes a partial function, `!ref <name>`
refers to a top-level entry (or calculates with some), `!apply:` calls at load time. One tag is our own: `!file NAME`
is the path of a file that lies beside the YAML, and no other file can be named. Here the file is parsed
by a safe YAML loader into a tree of values, references and targets. Targets outside a fixed list are an
error; `!apply:` is known for seeds only and ignored. Only the parts asked for are built, and each top-level
entry at most once.
"""

import ast
import functools
import inspect
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cosyvoice.model_folder.argument_types import misfits
from cosyvoice.runtime.errors import InputError

TARGETS = frozenset(
    {
        "cosyvoice.llm.corrupted_qwen2_lm.CorruptedQwen2LM",
        "cosyvoice.llm.llm.Qwen2Encoder",
        "cosyvoice.llm.llm.Qwen2LM",
        "cosyvoice.llm.llm.TransformerLM",
        "cosyvoice.llm.monotonic.MonotonicLM",
        "cosyvoice.transformer.encoder.ConformerEncoder",
        "cosyvoice.transformer.encoder.TransformerEncoder",
        "cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder",
        "cosyvoice.flow.flow.CausalMaskedDiffWithXvec",
        "cosyvoice.flow.flow.MaskedDiffWithXvec",
        "cosyvoice.flow.length_regulator.InterpolateRegulator",
        "cosyvoice.flow.flow_matching.CausalConditionalCFM",
        "cosyvoice.flow.flow_matching.ConditionalCFM",
        "cosyvoice.flow.decoder.CausalConditionalDecoder",
        "cosyvoice.flow.decoder.ConditionalDecoder",
        "cosyvoice.flow.mel_regressor.MelRegressor",
        "cosyvoice.hifigan.generator.HiFTGenerator",
        "cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor",
        "cosyvoice.hifigan.hifigan.HiFiGan",
        "cosyvoice.hifigan.spectral_loss.SpectralLoss",
        "cosyvoice.utils.common.ras_sampling",
        "cosyvoice.tokenizer.phones.get_phone_tokenizer",
        "cosyvoice.tokenizer.tokenizer.get_byte_tokenizer",
        "cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer",
        "cosyvoice.tokenizer.tokenizer.get_tokenizer",
        "matcha.hifigan.models.MultiPeriodDiscriminator",
        "matcha.utils.audio.mel_spectrogram",
        "omegaconf.DictConfig",
        "whisper.tokenizer.get_tokenizer",
    }
)
# Where a class lives in another file here than its public path says.
LOCATIONS = {
    "cosyvoice.llm.llm.Qwen2Encoder": "cosyvoice.llm.qwen2_encoder.Qwen2Encoder",
    "cosyvoice.llm.llm.Qwen2LM": "cosyvoice.llm.qwen2_lm.Qwen2LM",
    "cosyvoice.flow.flow.CausalMaskedDiffWithXvec": "cosyvoice.flow.causal_flow.CausalMaskedDiffWithXvec",
    "cosyvoice.flow.flow_matching.CausalConditionalCFM": "cosyvoice.flow.causal_flow_matching.CausalConditionalCFM",
    "cosyvoice.flow.decoder.CausalConditionalDecoder": "cosyvoice.flow.causal_decoder.CausalConditionalDecoder",
    "cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer": "cosyvoice.tokenizer.qwen.get_qwen_tokenizer",
}
# Anything that these modules define themselves; what they import is not theirs to hand out.
TARGET_MODULES = frozenset({"cosyvoice.dataset.processor", "cosyvoice.hifigan.discriminator"})
IGNORED_CALLS = frozenset({"random.seed", "numpy.random.seed", "torch.manual_seed", "torch.cuda.manual_seed_all"})
# What PyYAML ends in where a value contradicts its tag, e.g. `!!bool maybe`.
CONTRADICTIONS = (ValueError, LookupError, AttributeError, TypeError)
OTHER_MODEL = re.compile(r"Causal|DiT|CosyVoice3")

_REFERENCE = re.compile(r"<(\w+)>")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class _Reference:
    """`!ref`: the text after the tag, e.g. `<sample_rate>` or `<chunk_size> * <token_mel_ratio>`."""

    text: str


@dataclass(frozen=True)
class _File:
    """`!file`: the name of a file beside the YAML."""

    name: str


@dataclass(frozen=True)
class _Target:
    """`!new:`, or `!name:` when partial; its arguments still hold references and targets."""

    path: str
    partial: bool
    args: list[Any]
    kwargs: dict[str, Any]


class _IgnoredCall:
    """`!apply:` of a seed function."""


def load_model_yaml(
    path: Path,
    parts: Sequence[str] | None = None,
    defaults: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the named top-level entries of the file, built; all of them when `parts` is None. See `build_entries`.

    Raises InputError, too, for a file that is missing or not in the dialect, and for a target outside the list.
    """
    return build_entries(path, parse_model_yaml(path), parts, defaults, overrides)


def build_entries(
    path: Path,
    parsed: dict[str, Any],
    parts: Sequence[str] | None = None,
    defaults: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the named entries that `parse_model_yaml` found in a file, built; all of them when `parts` is None.

    `defaults` are entries that the file may leave out, `overrides` those that count instead of the file's, e.g.
    `{"qwen_pretrain_path": "model/CosyVoice-BlankEN"}`. Entries that were not asked for, and that none of the wanted
    ones refers to, are not built and their modules not imported.

    Raises InputError for an entry that the file does not have, and arguments that a target does not take.
    """
    entries = (defaults or {}) | parsed | (overrides or {})
    names = entries if parts is None else parts
    for name in names:
        if name not in entries:
            raise InputError(f"{path} has no entry {name!r}; use the one of a CosyVoice-300M folder")
    builder = _Builder(path, entries)
    try:
        return {name: builder.entry(name) for name in names if not isinstance(entries[name], _IgnoredCall)}
    except RecursionError:
        raise InputError(f"{path} is nested too deeply") from None


def spelled(entry: Any) -> Any:
    """Return what built entries of values and partial functions consist of, in plain types: equal where these are.

    A file counts by its content, so the result does not depend on where the model folder lies.
    """
    if isinstance(entry, functools.partial):
        function = f"{entry.func.__module__}.{entry.func.__qualname__}"
        return [function, spelled(list(entry.args)), spelled(entry.keywords)]
    if isinstance(entry, Path):
        return entry.read_bytes()
    if isinstance(entry, list):
        return [spelled(item) for item in entry]
    return {name: spelled(item) for name, item in entry.items()} if isinstance(entry, dict) else entry


def parse_model_yaml(path: Path) -> dict[str, Any]:
    """Return the top-level entries, unbuilt: plain values, lists, dicts, references and targets.

    Raises InputError for a file that is missing or not in the dialect, and for a target outside the list.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; a model folder holds cosyvoice.yaml beside its .pt files")
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, OSError, *CONTRADICTIONS) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path} is not a model configuration: no `name: value` entries at the top")
    return entries


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the dialect's tags and 1e-06 as a number, without aliases or double keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # aliases can be endless, and the dialect has !ref
            raise _error("aliases are not part of this format, use !ref", self.peek_event())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in names:
                raise _error(f"{key.value!r} is given twice", key)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


def _error(message: str, place: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=place.start_mark)


def _construct_target(partial: bool) -> Callable[[_Loader, str, yaml.Node], _Target]:
    def construct(loader: _Loader, path: str, node: yaml.Node) -> _Target:
        _check_target(path, node)
        args, kwargs = _arguments(loader, node)
        return _Target(path, partial, args, kwargs)

    return construct


def _check_target(path: str, node: yaml.Node) -> None:
    module, _, name = path.rpartition(".")
    if path in TARGETS or (module in TARGET_MODULES and not name.startswith("_")):
        return
    hint = "; it belongs to CosyVoice3, use a CosyVoice2 or CosyVoice-300M folder" if OTHER_MODEL.search(path) else ""
    raise _error(f"the class or function {path!r} is not allowed{hint}", node)


def _arguments(loader: _Loader, node: yaml.Node) -> tuple[list[Any], dict[str, Any]]:
    if isinstance(node, yaml.MappingNode):
        kwargs = loader.construct_mapping(node, deep=True)
        if not all(isinstance(key, str) for key in kwargs):
            raise _error("argument names must be text", node)
        return [], kwargs
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True), {}
    if node.value:
        raise _error(f"{node.tag} takes a list or named values, not {node.value!r}", node)
    return [], {}


def _construct_reference(loader: _Loader, node: yaml.Node) -> _Reference:
    return _Reference(loader.construct_scalar(node))


def _construct_file(loader: _Loader, node: yaml.Node) -> _File:
    name = loader.construct_scalar(node)
    if Path(name).name != name:
        raise _error(f"!file takes the name of a file beside this one, not {name!r}", node)
    return _File(name)


def _construct_call(loader: _Loader, path: str, node: yaml.Node) -> _IgnoredCall:
    if path not in IGNORED_CALLS:
        raise _error(f"calling {path!r} is not allowed", node)
    return _IgnoredCall()


_Loader.add_multi_constructor("!new:", _construct_target(partial=False))
_Loader.add_multi_constructor("!name:", _construct_target(partial=True))
_Loader.add_multi_constructor("!apply:", _construct_call)
_Loader.add_constructor("!ref", _construct_reference)
_Loader.add_constructor("!file", _construct_file)
# YAML 1.1 takes `1e-06` for text: it wants a point in the mantissa and a sign in the exponent.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Builder:
    """Builds entries on demand and keeps them, so that one name is one object."""

    def __init__(self, path: Path, entries: dict[str, Any]) -> None:
        self.path = path
        self.entries = entries
        self.built: dict[str, Any] = {}
        self.underway: list[str] = []

    def entry(self, name: str) -> Any:
        if name in self.built:
            return self.built[name]
        if name not in self.entries:
            raise InputError(f"{self.path}: {self.underway[-1]!r} refers to <{name}>, which is not there")
        if name in self.underway:
            raise InputError(f"{self.path}: {' -> '.join((*self.underway, name))} refers to itself")
        self.underway.append(name)
        self.built[name] = self.value(self.entries[name])
        self.underway.pop()
        return self.built[name]

    def value(self, node: Any) -> Any:
        match node:
            case _Reference():
                return self.reference(node.text)
            case _File():
                return self.file(node.name)
            case _Target():
                return self.target(node)
            case list():
                return [self.value(item) for item in node]
            case dict():
                return {key: self.value(item) for key, item in node.items()}
            case _IgnoredCall():
                return None
        return node

    def reference(self, text: str) -> Any:
        if whole := _REFERENCE.fullmatch(text.strip()):
            return self.entry(whole[1])
        try:
            return self.calculate(ast.parse(_REFERENCE.sub(r"\1", text).strip(), mode="eval").body)
        except (SyntaxError, TypeError, ArithmeticError) as error:
            raise InputError(f"{self.path}: cannot evaluate '!ref {text}': {error}") from None

    def file(self, name: str) -> Path:
        path = self.path.parent / name
        if not path.is_file():
            raise InputError(f"{path} does not exist, and {self.path.name} needs it. Copy it from the model's download")
        return path

    def calculate(self, node: ast.expr) -> Any:
        match node:
            case ast.BinOp(op=op) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](self.calculate(node.left), self.calculate(node.right))
            case ast.Name():
                return _number(self.entry(node.id), node.id)
            case ast.Constant():
                return _number(node.value, repr(node.value))
        raise TypeError(f"only + - * / // of numbers are known, not {ast.unparse(node)}")

    def target(self, node: _Target) -> Any:
        args = [self.value(item) for item in node.args]
        kwargs = {key: self.value(item) for key, item in node.kwargs.items()}
        function = self.locate(node.path)
        signature = inspect.signature(function)
        try:
            bound = (signature.bind_partial if node.partial else signature.bind)(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"{self.path}: {node.path}: {error}") from None
        if problem := next(misfits(function, bound.arguments), None):
            raise InputError(f"{self.path}: {node.path}: {problem}")
        if node.partial:
            return functools.partial(function, *args, **kwargs)
        try:
            return function(*args, **kwargs)
        except InputError as error:  # a value that the class does not implement
            raise InputError(f"{self.path}: {error}") from None
        except (*CONTRADICTIONS, ArithmeticError, AssertionError, RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.path}: {node.path} cannot be built with these values: {reason}") from None

    def locate(self, path: str) -> Callable[..., Any]:
        """The class or function of an allowed path.

        Hydra finds it. The arguments stay out of what Hydra sees: it would turn a DictConfig meant as an
        argument into a dict, and follow `_target_` keys and `${...}` texts in them past the list of allowed
        targets.
        """
        from hydra.errors import InstantiationException  # 0.3 s, and not needed for --help
        from hydra.utils import instantiate

        try:
            function = instantiate({"_target_": LOCATIONS.get(path, path), "_partial_": True}).func
        except InstantiationException as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: {path} cannot be imported: {reason}") from error
        module = path.rpartition(".")[0]
        if module in TARGET_MODULES and function.__module__ != module:
            raise InputError(f"{self.path}: the class or function {path!r} is not allowed")
        return function


def _number(value: Any, name: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is not a number")
    return value
