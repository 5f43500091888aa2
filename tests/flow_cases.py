"""What the tests of both generations' flows share: small sizes, recorded batches, hooks that keep what comes out."""

import re
from typing import Any

import torch
from parity import assert_close
from torch import Tensor, nn

from cosyvoice.flow.flow_matching import TrainingDraw

ESTIMATOR_INPUTS = ("x", "mask", "mu", "t", "spks", "cond")
SOLVER_INPUTS = ("z", "t_span", "mu", "mask", "spks", "cond")

# Small models
MELS = 8
SPEAKER_DIM = 6
VOCABULARY = 11
CFM_PARAMS = {
    "sigma_min": 1e-6,
    "solver": "euler",
    "t_scheduler": "cosine",
    "training_cfg_rate": 0.2,
    "inference_cfg_rate": 0.7,
    "reg_loss_type": "l1",
}
ESTIMATOR_OPTIONS = {
    "in_channels": 4 * MELS,
    "out_channels": MELS,
    "channels": [16, 16],
    "dropout": 0.0,
    "attention_head_dim": 4,
    "n_blocks": 1,
    "num_mid_blocks": 1,
    "num_heads": 2,
    "act_fn": "gelu",
}


class Recorder:
    """Keeps what the parts of a flow put out, under the names of the recordings."""

    def __init__(self, flow: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        self.estimator_calls: list[dict[str, Tensor]] = []
        flow.encoder.register_forward_hook(lambda _, __, out: self._keep("encoder_out", out[0]))
        flow.encoder_proj.register_forward_hook(lambda _, __, out: self._keep("encoder_proj_out", out))
        flow.spk_embed_affine_layer.register_forward_hook(lambda _, __, out: self._keep("spk_proj", out))
        flow.decoder.estimator.register_forward_hook(self._keep_estimator_call)

    def _keep(self, name: str, value: Tensor) -> None:
        self.values[name] = value

    def _keep_estimator_call(self, _: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        self.estimator_calls.append(dict(zip(ESTIMATOR_INPUTS, inputs, strict=True)) | {"out": out})

    def keep_result(self, owner: Any, method: str, name: str) -> None:
        """Also keeps the first result of a method that is called directly."""
        original = getattr(owner, method)

        def recording(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._keep(name, result[0])
            return result

        setattr(owner, method, recording)


def recorded(case: dict[str, Tensor], *excluded: str) -> dict[str, Tensor]:
    """The recorded results: everything whose name does not start with one of `excluded`."""
    return {name: value for name, value in case.items() if not name.startswith(excluded)}


def training_batch(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("batch/"): value for name, value in case.items() if name.startswith("batch/")}


def training_loss(flow: nn.Module, case: dict[str, Tensor], **options: bool) -> Tensor:
    """The loss of a recorded batch, with the recorded draws in place of random ones. options: those of `flow.loss`."""
    draw = TrainingDraw(case["draw/t"], case["draw/z"], case["draw/cfg_keep"])
    flow.decoder.draw_training = lambda x1: draw
    batch = training_batch(case)
    return flow.loss(
        batch["speech_token"],
        batch["speech_token_len"],
        batch["speech_feat"],
        batch["speech_feat_len"],
        batch["embedding"],
        case["draw/cond_index"].clamp(min=0).tolist(),
        **options,
    )


def inference_sequences(case: dict[str, Tensor]) -> list[Tensor]:
    """The first arguments of `inference`: tokens, prompt tokens and prompt mel, each with its length behind it."""
    parts = (case[part] for part in ("token", "prompt_token", "prompt_feat"))
    return [value for part in parts for value in (part, torch.tensor([part.shape[1]]))]


def check_training(seen: Recorder, case: dict[str, Tensor], tolerance: dict[str, float]) -> None:
    """Compares what came out on the way to the loss."""
    (call,) = seen.estimator_calls
    values = seen.values | {f"estimator_in/{key}": call[key].float() for key in ESTIMATOR_INPUTS}
    values["estimator_out"] = call["out"]
    for key, expected in recorded(case, "batch/", "draw/", "loss", "grad").items():
        actual = values[key].view_as(expected)  # one item's time is recorded without an axis
        assert_close(actual, expected, **tolerance)


def check_gradients(flow: nn.Module, case: dict[str, Tensor], names: list[str], tolerance: dict[str, float]) -> None:
    """names: the parameters that `grad_norm_values` belongs to, which must be all."""
    gradients = {key: parameter.grad for key, parameter in flow.named_parameters()}
    assert sorted(names) == sorted(gradients)
    norms = torch.stack([gradients[key].double().norm() for key in names])
    assert_close(norms, case["grad_norm_values"], **tolerance)
    for key, expected in case.items():
        if key.startswith("grad/"):
            assert_close(gradients[key.removeprefix("grad/")], expected, **tolerance)


def check_estimator_calls(seen: Recorder, case: dict[str, Tensor], tolerance: dict[str, float]) -> None:
    for key, expected in case.items():
        if step := re.fullmatch(r"estimator_step(\d+)/(\w+)", key):
            actual = seen.estimator_calls[int(step[1])][step[2]]
            assert_close(actual.float(), expected, **tolerance)
