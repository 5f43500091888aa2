"""Whether values from a file fit the signature of what they are for, and are of a size that somebody may mean."""

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# The more of these a model has, the more memory it takes while it is built; the largest public models stay far below.
MOST = {"num_blocks": 200, "n_blocks": 100, "num_mid_blocks": 100, "num_up_blocks": 100, "takes": 64, "num_mels": 1000}
MAY_BE_NEGATIVE = {"num_decoding_left_chunks"}  # -1: all of them
MOST_ANYTHING = 10**7
# Rates and sizes of the data's steps, which divide by them or have nothing to work on without.
ABOVE_ZERO = {
    *("resample_rate", "sample_rate", "sampling_rate", "hop_size", "n_fft", "win_size", "num_mels"),
    *("truncate_length", "num_frames", "bands"),
}
MOST_ITEMS = 100


def misfits(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each argument that is of another type than the signature says, or out of all proportion.

    arguments: by name, as they are bound to the function. What a class passes on to its parent as `**options` is
    compared with the parent's signature.
    """
    parameters = inspect.signature(function).parameters
    for name, value in arguments.items():
        kind, annotation = parameters[name].kind, parameters[name].annotation
        if kind is inspect.Parameter.VAR_KEYWORD and inspect.isclass(function):
            parent = function.__mro__[1]
            known = inspect.signature(parent).parameters
            yield from misfits(parent, {key: item for key, item in value.items() if key in known})
        elif not _fits(value, annotation):
            yield f"{name} must be {_spelled(annotation)}, not {value!r:.80}"
        elif not _is_moderate(abs(value) if name in MAY_BE_NEGATIVE else value, MOST.get(name, MOST_ANYTHING)):
            yield f"{name} is {value!r:.80}, which no model has"
        elif name in ABOVE_ZERO and value == 0:
            yield f"{name} is 0; it must be at least 1"


def _fits(value: Any, annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, kind) for kind in inner)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if origin is Callable:
        return callable(value)
    if annotation is type(None) or annotation is None:
        return value is None
    unsaid = (Any, inspect.Parameter.empty)
    return annotation in unsaid or not inspect.isclass(annotation) or isinstance(value, annotation)


def _is_moderate(value: Any, most: int) -> bool:
    if isinstance(value, int | float):
        return abs(value) <= most and not (isinstance(value, int) and value < 0)  # no size is negative
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return len(value) <= MOST_ITEMS and all(_is_moderate(item, most) for item in value)
    return True


def _spelled(annotation: Any) -> str:
    return inspect.formatannotation(annotation).replace("collections.abc.", "")
