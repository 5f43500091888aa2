"""Two small ONNX networks with random weights and the public models' interfaces."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cosyvoice.utils.audio import KALDI_MELS, WHISPER_MELS
from cosyvoice.utils.file_utils import atomic_write

SPEAKER_SIZE = 192
FRAME_RATE_HZ = 100  # of Whisper's log-mel
TOKENIZER_CHANNELS = 16
SPEAKER_CHANNELS = 64
OPSET, IR_VERSION = 17, 8  # old enough for recent releases of onnxruntime


def write_speech_tokenizer(path: Path, random: np.random.Generator, token_rate: int, speech_tokens: int) -> None:
    """Write a network from `feats` (1, 128, T) float32 Whisper log-mel and `feats_length` (1,) int32 to (1, N) int32.

    N is T / 2 or T / 4, rounded up, as `token_rate` asks. A random convolution of the frames minus their mean over time
    gives a vector; the token is the nearest of `speech_tokens` random directions.
    """
    stride = FRAME_RATE_HZ // token_rate
    nodes = [
        helper.make_node("Slice", ["feats", "first", "feats_length", "time_axis"], ["valid"]),
        helper.make_node("ReduceMean", ["valid"], ["mean"], axes=[2]),
        helper.make_node("Sub", ["valid", "mean"], ["centred"]),
        helper.make_node("Conv", ["centred", "kernel"], ["hidden"], strides=[stride], pads=[1, 1]),
        helper.make_node("Transpose", ["hidden"], ["rows"], perm=[0, 2, 1]),  # (1, N, C)
        helper.make_node("MatMul", ["rows", "directions"], ["scores"]),  # (1, N, tokens)
        helper.make_node("ArgMax", ["scores"], ["nearest"], axis=2, keepdims=0),
        helper.make_node("Cast", ["nearest"], ["indices"], to=TensorProto.INT32),
    ]
    directions = random.standard_normal((TOKENIZER_CHANNELS, speech_tokens), dtype=np.float32)
    constants = {
        "first": np.array([0], dtype=np.int32),
        "time_axis": np.array([2], dtype=np.int32),
        "kernel": random.standard_normal((TOKENIZER_CHANNELS, WHISPER_MELS, 3), dtype=np.float32),
        "directions": directions / np.linalg.norm(directions, axis=0),
    }
    inputs = [
        helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, WHISPER_MELS, "T"]),
        helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1]),
    ]
    output = helper.make_tensor_value_info("indices", TensorProto.INT32, [1, "N"])
    _write(path, helper.make_graph(nodes, "speech_tokenizer", inputs, [output], _tensors(constants)))


def write_speaker_encoder(path: Path, random: np.random.Generator) -> None:
    """Write a network from `input` (1, T, 80) float32, Kaldi filterbank minus its mean, to `output` (1, 192) float32.

    A random projection and tanh (without which the mean would be zero) are averaged over time and projected again.
    """
    nodes = [
        helper.make_node("MatMul", ["input", "into"], ["projected"]),  # (1, T, C)
        helper.make_node("Tanh", ["projected"], ["squashed"]),
        helper.make_node("ReduceMean", ["squashed"], ["pooled"], axes=[1], keepdims=0),  # (1, C)
        helper.make_node("MatMul", ["pooled", "out"], ["output"]),
    ]
    constants = {
        "into": random.standard_normal((KALDI_MELS, SPEAKER_CHANNELS), dtype=np.float32),
        "out": random.standard_normal((SPEAKER_CHANNELS, SPEAKER_SIZE), dtype=np.float32),
    }
    fbank = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, "T", KALDI_MELS])
    vector = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, SPEAKER_SIZE])
    _write(path, helper.make_graph(nodes, "speaker_encoder", [fbank], [vector], _tensors(constants)))


def _tensors(constants: dict[str, np.ndarray]) -> list[TensorProto]:
    return [numpy_helper.from_array(value, name) for name, value in constants.items()]


def _write(path: Path, graph: onnx.GraphProto) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
