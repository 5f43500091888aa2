"""What training the tokenizer and the speaker encoder share: the corpus, crops, augmentation, restarts, ONNX files."""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cosyvoice.utils.audio import PROMPT_RATE_HZ, load_wav
from cosyvoice.utils.checkpoint import load_tensors
from cosyvoice.utils.command import seed_all
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.file_utils import atomic_write, save_tensors
from tools.kaldi_folder import file_stamp, read_table

OPSET = 17  # old enough for any onnxruntime of the last years
CHECKED_FRAMES = (20, 21, 300, 3000)  # of the exported file, against the module
WARM_UP = 0.05  # share of the steps in which the learning rate rises
WEIGHT_DECAY = 0.01
CHECKPOINT_STEPS = 100  # a killed run loses at most these
COMPRESSED_NUMBERS = 1000  # of the smallest weight that is not stored in float32
REPORTS = 10  # in a whole training
GRADIENT_NORM = 1.0

LN10 = math.log(10)
SNR_RANGE_DB = (5.0, 45.0)  # noise added to a crop
TILT_NEPERS = 3.0  # most that the noise's spectrum falls or rises from the lowest bin to the highest
EQ_NEPERS, EQ_POINTS = 1.5, 6  # standard deviation of a microphone's response, and its freedom over the bins


@dataclass(frozen=True)
class Recording:
    wav: Path
    speaker: str


def read_recordings(folders: Sequence[Path]) -> list[Recording]:
    """The utterances of Kaldi-style folders. Raises InputError where one has no speaker."""
    recordings = []
    for folder in folders:
        speakers = read_table(folder / "utt2spk")
        for utt, wav in read_table(folder / "wav.scp").items():
            if utt not in speakers:
                raise InputError(f"{folder / 'utt2spk'} names no speaker of {utt}; make the corpus anew")
            recordings.append(Recording(Path(wav), speakers[utt]))
    return recordings


def draw(recordings: Sequence[Recording], number: int, seed: int) -> list[Recording]:
    """`number` of the recordings at random, in their order; all where there are no more."""
    chosen = np.random.default_rng(seed).permutation(len(recordings))[:number]
    return [recordings[index] for index in sorted(chosen)]


def stamp(recordings: Sequence[Recording]) -> str:
    """Changes when the recordings are others."""
    return hashlib.sha256(repr([file_stamp(recording.wav) for recording in recordings]).encode()).hexdigest()


def load_features(recordings: Sequence[Recording], extract: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`extract` of each recording (1, samples) at 16 kHz: (bins, T), as float16. Raises InputError for bad audio."""
    progress = tqdm(recordings, desc="features", unit="utt", disable=None)
    return [extract(load_wav(recording.wav, PROMPT_RATE_HZ)).half() for recording in progress]


def wrapped(start: int, length: int, total: int) -> Tensor:
    """`length` indices from `start` on, going round in an utterance of `total` frames: int64 (length,)."""
    return (start + torch.arange(length)) % total


def augment(log_power: Tensor) -> Tensor:
    """(B, bins, T) natural logarithms of power, as another microphone in another room would have heard them.

    Draws a smooth frequency response and a tilted steady noise for each item.
    """
    batch, bins, _ = log_power.shape
    response = EQ_NEPERS * torch.randn(batch, 1, EQ_POINTS)
    response = nn.functional.interpolate(response, bins, mode="linear", align_corners=True)  # (B, 1, bins)
    heard = log_power + response.transpose(1, 2)
    level = heard.exp().mean(dim=(1, 2), keepdim=True).log()  # (B, 1, 1)
    snr_db = torch.empty(batch, 1, 1).uniform_(*SNR_RANGE_DB)
    tilt = TILT_NEPERS * torch.empty(batch, 1, 1).uniform_(-0.5, 0.5) * torch.linspace(-1, 1, bins)[:, None]
    power = torch.empty_like(heard).exponential_()  # of a noise's periodogram
    noise = level - snr_db * LN10 / 10 + tilt + power.clamp(min=1e-4).log()
    return torch.logaddexp(heard, noise)


@dataclass
class Training:
    """AdamW with warm-up and a cosine; continues from `checkpoint`, and ends with the same weights if it was killed.

    `output` is the file that comes of it, beside which the checkpoint lies; `recordings` are what it learns from.
    """

    model: nn.Module
    recordings: Sequence[Recording]
    steps: int
    seed: int
    peak_rate: float
    output: Path

    def __post_init__(self) -> None:
        self.checkpoint = checkpoint_of(self.output)
        # everything that the result depends on: a checkpoint of another recipe is not continued
        self.recipe = {"seed": self.seed, "steps": self.steps, "data": stamp(self.recordings)}

    def run(self, batch_loss: Callable[[], Tensor], report: Callable[[], str]) -> None:
        """`batch_loss` draws a batch from the global generators, which are seeded anew at every step."""
        optimiser = torch.optim.AdamW(self.model.parameters(), weight_decay=WEIGHT_DECAY)
        done = self._recall(optimiser)
        losses: list[float] = []
        with tqdm(total=self.steps, initial=done, desc="training", unit="step", disable=None) as progress:
            for step in range(done, self.steps):
                losses.append(self._step(step, optimiser, batch_loss))
                progress.update()
                if (step + 1) % CHECKPOINT_STEPS == 0:
                    self._save(step + 1, optimiser)
                if (step + 1) % max(self.steps // REPORTS, 1) == 0:
                    progress.write(f"step {step + 1}/{self.steps}: loss {np.mean(losses):.3f}, {report()}", sys.stdout)
                    sys.stdout.flush()
                    losses.clear()

    def _step(self, step: int, optimiser: torch.optim.Optimizer, batch_loss: Callable[[], Tensor]) -> float:
        seed_all(self.seed, step)
        rise = min((step + 1) / (WARM_UP * self.steps), 1)
        for group in optimiser.param_groups:
            group["lr"] = self.peak_rate * rise * (1 + math.cos(math.pi * step / self.steps)) / 2
        self.model.train()
        optimiser.zero_grad()
        loss = batch_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        optimiser.step()
        return loss.item()

    def _save(self, step: int, optimiser: torch.optim.Optimizer) -> None:
        state = {"recipe": json.dumps(self.recipe), "step": step, "model": self.model.state_dict()}
        save_tensors({**state, "optimiser": optimiser.state_dict()}, self.checkpoint)

    def _recall(self, optimiser: torch.optim.Optimizer) -> int:
        """Load what a killed run left. Returns the number of steps that it had done."""
        if not self.checkpoint.is_file():
            return 0
        state = load_tensors(self.checkpoint, "delete it, and training begins anew")
        if state["recipe"] != json.dumps(self.recipe):
            raise InputError(f"{self.checkpoint} is of other options or data; delete it, and training begins anew")
        self.model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        print(f"continuing after step {state['step']}")
        return state["step"]


def checkpoint_of(output: Path) -> Path:
    return output.with_name(f".{output.stem}.training.pt")


def export(
    module: nn.Module, inputs: Callable[[int], dict[str, Tensor]], output: Path, output_name: str, axes: dict
) -> None:
    """Write `module`, which takes `inputs(T)` in their order, as ONNX; `axes` are its axes of variable length.

    Weights are stored in 8 bits where `round_weights` was applied, else in half precision, and computed with in float32.
    The file appears only after it gave what the module gives for several T.
    """
    module.eval()
    example = inputs(CHECKED_FRAMES[0])
    with atomic_write(output) as temporary, warnings.catch_warnings(action="ignore"):  # of the exporter's future
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
    """Round weights to 8 bits: to a 127th of the largest of their output channel."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                scale = _channel_scale(weight.flatten(1).numpy(), axis=0).reshape(-1, *[1] * (weight.dim() - 1))
                scale = torch.from_numpy(scale)
                weight.copy_((weight / scale).round() * scale)


def _channel_scale(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return a 127th of the largest absolute value of each channel, (C,)."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    return np.maximum(np.abs(weight).max(axis=others), np.finfo(np.float32).tiny) / 127


def _compress(path: Path) -> None:
    """Store the large weights of an ONNX file in 8 bits where they were rounded to those, else in half precision."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path))
    kept, nodes = [], []
    for stored in model.graph.initializer:
        weight = numpy_helper.to_array(stored)
        if stored.data_type != TensorProto.FLOAT or weight.size < COMPRESSED_NUMBERS:
            kept.append(stored)
            continue
        name, small = stored.name, f"{stored.name}.small"
        for axis in {0, weight.ndim - 1}:  # of the output channels: convolutions, matrices
            scale = _channel_scale(weight, axis)
            shape = [-1 if other == axis else 1 for other in range(weight.ndim)]
            steps = weight / scale.reshape(shape)
            if np.abs(steps - steps.round()).max() < 1e-3:
                kept.append(numpy_helper.from_array(steps.round().astype(np.int8), small))
                kept.append(numpy_helper.from_array(scale.reshape(shape).astype(np.float32), f"{name}.scale"))
                # not DequantizeLinear: onnxruntime makes of that a product that rounds what is multiplied, too
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
    for example in examples:
        with torch.no_grad():
            expected = module(*example.values()).numpy()
        (found,) = session.run(None, {name: value.numpy() for name, value in example.items()})
        assert found.shape == expected.shape and found.dtype == expected.dtype, f"{path}: {found.shape}"
        close = np.isclose(found, expected, rtol=1e-3, atol=1e-3)
        assert close.mean() > 0.99, f"{path} differs from its module"  # a code may lie on the edge of two
