"""Writes encoders as small ONNX files, with weights in 8 bits or half precision and arithmetic in float32."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cosyvoice.utils.file_utils import atomic_write

OPSET = 17  # old enough for recent releases of onnxruntime
CHECKED_FRAMES = (20, 21, 300, 3000)  # of the exported file, against the module
COMPRESSED_NUMBERS = 1000  # smaller weights stay in float32


def export(
    module: nn.Module, inputs: Callable[[int], dict[str, Tensor]], output: Path, output_name: str, axes: dict
) -> None:
    """Write `module`, which takes `inputs(T)` in order, as ONNX; `axes` are its axes of variable length.

    Weights are stored in 8 bits if `round_weights` was applied, else in half precision. The arithmetic is float32. The
    file appears only if it gives the module's results for several T.
    """
    module.eval()
    example = inputs(CHECKED_FRAMES[0])
    with atomic_write(output) as temporary, warnings.catch_warnings(action="ignore"):  # about the exporter's future
        torch.onnx.export(
            module,
            tuple(example.values()),
            str(temporary),
            input_names=list(example),
            output_names=[output_name],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
        _compress(temporary)
        _check(module, temporary, [inputs(frames) for frames in CHECKED_FRAMES])


def round_weights(module: nn.Module) -> None:
    """Round each weight to 8 bits, a multiple of a 127th of the largest weight in its output channel."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                scale = _channel_scale(weight.flatten(1).numpy(), axis=0).reshape(-1, *[1] * (weight.dim() - 1))
                scale = torch.from_numpy(scale)
                weight.copy_((weight / scale).round() * scale)


def _channel_scale(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return a 127th of each channel's largest absolute value, (C,)."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    return np.maximum(np.abs(weight).max(axis=others), np.finfo(np.float32).tiny) / 127


def _compress(path: Path) -> None:
    """Store the large weights of an ONNX file in 8 bits if they were rounded to them, else in half precision."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path))
    kept, nodes = [], []
    for stored in model.graph.initializer:
        weight = numpy_helper.to_array(stored)
        if stored.data_type != TensorProto.FLOAT or weight.ndim < 2 or weight.size < COMPRESSED_NUMBERS:
            kept.append(stored)
            continue
        name, small = stored.name, f"{stored.name}.small"
        for axis in {0, weight.ndim - 1}:  # axis of the output channels in convolutions and in matrices
            scale = _channel_scale(weight, axis)
            shape = [-1 if other == axis else 1 for other in range(weight.ndim)]
            steps = weight / scale.reshape(shape)
            if np.abs(steps - steps.round()).max() < 1e-3:
                kept.append(numpy_helper.from_array(steps.round().astype(np.int8), small))
                kept.append(numpy_helper.from_array(scale.reshape(shape).astype(np.float32), f"{name}.scale"))
                # not DequantizeLinear, which onnxruntime fuses into a product that rounds the other factor too
                nodes.append(helper.make_node("Cast", [small], [f"{name}.steps"], to=TensorProto.FLOAT))
                nodes.append(helper.make_node("Mul", [f"{name}.steps", f"{name}.scale"], [name]))
                break
        else:
            kept.append(numpy_helper.from_array(weight.astype(np.float16), small))
            nodes.append(helper.make_node("Cast", [small], [name], to=TensorProto.FLOAT))
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))


def _check(module: nn.Module, path: Path, examples: Sequence[dict[str, Tensor]]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    close = []
    for example in examples:
        with torch.no_grad():
            expected = module(*example.values()).numpy()
        (found,) = session.run(None, {name: value.numpy() for name, value in example.items()})
        assert found.shape == expected.shape and found.dtype == expected.dtype, f"{path}: {found.shape}"
        close.append(np.isclose(found, expected, rtol=1e-3, atol=1e-3).ravel())
    # over all examples, since a short one has so few codes that a single borderline one would exceed 1 %
    assert np.concatenate(close).mean() > 0.99, f"{path} differs from its module"
