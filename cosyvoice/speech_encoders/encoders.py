"""The two ONNX networks of a model folder, which turn speech into tokens and into a speaker vector."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cosyvoice.runtime.errors import InputError, is_memory_trouble
from cosyvoice.utils.audio import MAX_PROMPT_SECONDS, PROMPT_RATE_HZ, is_silent, kaldi_fbank, whisper_log_mel
from cosyvoice.utils.frames import SPEAKER_DIMENSIONS
from cosyvoice.utils.rates_300m import TOKEN_RATE_HZ

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ONNX_THREADS = 1  # per call; several Python threads encode several recordings
MIN_SECONDS = 0.1  # shorter audio has no frame for the networks


class SpeechEncoder:
    """An ONNX network for speech of at most 30 seconds. The file is opened at the first call.

    device: "cpu", "cuda", or "auto" for CUDA if onnxruntime has it.
    """

    def __init__(self, path: Path | str, device: str = "auto") -> None:
        self.path = Path(path)
        self.device = device
        self._session: InferenceSession | None = None
        self._opening = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what makes the same encoder in another process, which opens the file for itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_session", "_opening")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _session=None, _opening=threading.Lock())

    def open(self) -> "InferenceSession":
        """Return the session, which is made once. Raises InputError if the file is missing or not an ONNX model."""
        with self._opening:
            if self._session is None:
                self._session = self._load()
            return self._session

    def _load(self) -> "InferenceSession":
        if not self.path.is_file():
            raise InputError(f"{self.path} does not exist. Copy it from the model's download")
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as failures

        has_cuda = CUDA in onnxruntime.get_available_providers()
        if self.device == "cuda" and not has_cuda:
            raise InputError("onnxruntime has no CUDA here; install onnxruntime-gpu, or use the device cpu")
        # without it cuDNN searches for its fastest convolutions again at each new length
        cuda = (CUDA, {"cudnn_conv_algo_search": "HEURISTIC"})
        providers = [CPU] if self.device == "cpu" or not has_cuda else [cuda, CPU]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = ONNX_THREADS
        options.inter_op_num_threads = ONNX_THREADS
        options.log_severity_level = 3  # errors only
        damage = (
            failures.InvalidProtobuf,
            failures.InvalidGraph,
            failures.InvalidArgument,  # an empty file
            failures.Fail,
            failures.NoModel,
        )
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=providers)
        except damage as error:
            raise InputError(f"{self.path} is not an ONNX model, or is damaged; copy it again") from error

    def run(self, *inputs: np.ndarray) -> Tensor:
        """Return the first output for these inputs, given in the order in which the file declares them.

        Raises InputError if the file expects other inputs, RuntimeError if memory is full.
        """
        session = self.open()
        from onnxruntime.capi import onnxruntime_pybind11_state as failures

        names = [declared.name for declared in session.get_inputs()]
        try:
            output = session.run(None, dict(zip(names, inputs, strict=True)))[0]
        except (ValueError, failures.InvalidArgument, failures.Fail, failures.RuntimeException) as error:
            if is_memory_trouble(error):
                raise RuntimeError(f"{self.path}: {error}") from error
            raise InputError(f"{self.path} expects other inputs. Copy this model's own file again") from error
        return torch.from_numpy(output)


class SpeechTokenizer(SpeechEncoder):
    """The network speech_tokenizer_v1.onnx, with 50 tokens a second, or speech_tokenizer_v2.onnx, with 25.

    Its inputs are `feats` float32 (1, 128, T), Whisper log-mel at 100 frames a second, and `feats_length` int32 (1,);
    its output is int32 (1, about T / 100 * token_rate_hz).
    """

    def __init__(self, path: Path | str, device: str = "auto", token_rate_hz: int = TOKEN_RATE_HZ) -> None:
        """Set the file. token_rate_hz is the rate of its model, which the file itself does not contain."""
        super().__init__(path, device)
        self.token_rate_hz = token_rate_hz

    def __call__(self, wav_16k: Tensor) -> Tensor:
        """Return the tokens int32 (1, N) of (1, samples) at 16 kHz. Raises InputError if there are none."""
        check_prompt(wav_16k)
        feats = whisper_log_mel(wav_16k)  # (1, 128, T)
        tokens = self.run(feats.numpy(), np.array([feats.shape[2]], dtype=np.int32))
        tokens = tokens.reshape(1, -1).to(torch.int32)
        if not tokens.shape[1]:
            raise InputError("the speech tokenizer found no token in the audio")
        return tokens


class SpeakerEncoder(SpeechEncoder):
    """The network campplus.onnx, from float32 (1, T, 80), Kaldi filterbank minus its mean, to float32 (1, 192)."""

    def __call__(self, wav_16k: Tensor) -> Tensor:
        """Return the speaker vector float32 (1, 192), not normalised, of (1, samples) at 16 kHz.

        Raises InputError if the network gives no usable vector.
        """
        check_prompt(wav_16k)
        vector = self.run(kaldi_fbank(wav_16k)[None].numpy()).reshape(1, -1)
        if vector.shape[1] != SPEAKER_DIMENSIONS:
            raise InputError(f"{self.path} gives {vector.shape[1]} numbers, not {SPEAKER_DIMENSIONS}; copy it again")
        if not vector.isfinite().all() or not vector.any():
            raise InputError("the speaker encoder gave no usable vector")
        return vector


def check_prompt(wav_16k: Tensor) -> None:
    """Raise InputError for audio (1, samples) at 16 kHz that the networks cannot take, or that is silent."""
    if wav_16k.dim() != 2 or wav_16k.shape[0] != 1:
        raise InputError(f"prompt audio must have the shape (1, samples), not {tuple(wav_16k.shape)}")
    seconds = wav_16k.shape[1] / PROMPT_RATE_HZ
    if not MIN_SECONDS <= seconds <= MAX_PROMPT_SECONDS:
        raise InputError(f"prompt audio lasts {seconds:.2f} s; it must last {MIN_SECONDS} to {MAX_PROMPT_SECONDS} s")
    if not wav_16k.isfinite().all():
        raise InputError("the audio has samples that are not numbers")
    if is_silent(wav_16k):
        raise InputError("the audio is silent")
