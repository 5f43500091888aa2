"""The flow against the recorded numbers of the public implementation. Tolerances: README of the parity data."""

import random
import re

import pytest
import torch
from flow_cases import (
    ESTIMATOR_INPUTS,
    SOLVER_INPUTS,
    Recorder,
    check_estimator_calls,
    check_gradients,
    check_training,
    inference_sequences,
    recorded,
    training_batch,
    training_loss,
)
from models import tiny
from parity import arrays, assert_close, cases, meta
from torch import Tensor, nn

from cosyvoice.flow.flow_matching import TrainingDraw

INFERENCE_ENDS = ("token", "prompt_token", "prompt_feat", "embedding", "flow_cache", "noise", "mel")
ACTIVATION = {"atol": 1e-4}
ESTIMATOR = {"atol": 2e-4, "rtol": 1e-4}
GRADIENT = {"atol": 1e-5, "rtol": 1e-3}
REGULATOR = {"atol": 5e-5}


def infer(flow: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Inference on a recorded input, with the recorded noise."""
    case = arrays(name)
    flow.decoder.draw_noise = lambda like: case["noise"]
    steps = meta(name)["n_timesteps"]
    return flow.inference(*inference_sequences(case), case["embedding"], case["flow_cache_in"], n_timesteps=steps)


@pytest.mark.parametrize("name", cases("flow_train_*"))
def test_training_activations_and_loss(name: str) -> None:
    case, flow = arrays(name), tiny("flow")
    seen = Recorder(flow)
    seen.keep_result(flow.length_regulator, "forward", "regulator_out")
    loss = training_loss(flow, case)
    check_training(seen, case, ACTIVATION)
    assert_close(loss, case["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", cases("flow_train_*"))
def test_training_gradients(name: str) -> None:
    case, flow = arrays(name), tiny("flow")
    training_loss(flow, case).backward()
    check_gradients(flow, case, meta(name)["grad_norm_names"], GRADIENT)


@pytest.mark.parametrize("name", cases("flow_train_*"))
def test_training_draws_from_the_recorded_seed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's `random` draws the prefixes; torch draws time, noise, and then which items keep conditions."""
    case, flow = arrays(name), tiny("flow")
    draws: list[TrainingDraw] = []
    draw_training, loss_of = flow.decoder.draw_training, flow.loss
    prefixes: list[list[int]] = []
    monkeypatch.setattr(flow.decoder, "draw_training", lambda x1: draws.append(draw_training(x1)) or draws[-1])
    monkeypatch.setattr(flow, "loss", lambda *inputs: prefixes.append(inputs[-1]) or loss_of(*inputs))
    random.seed(meta(name)["seed"])
    torch.manual_seed(meta(name)["seed"])
    loss = flow(training_batch(case), torch.device("cpu"))["loss"]
    assert prefixes == [case["draw/cond_index"].clamp(min=0).tolist()]
    assert_close(draws[0].t, case["draw/t"], atol=1e-6)
    assert_close(draws[0].z, case["draw/z"], atol=1e-5)
    assert draws[0].keep.tolist() == case["draw/cfg_keep"].tolist()
    assert_close(loss, case["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", cases("flow_estimator*"))
def test_estimator(name: str) -> None:
    case, flow = arrays(name), tiny("flow")
    for index in meta(name):
        velocity = flow.decoder.estimator(*(case[f"{index}/{key}"] for key in ESTIMATOR_INPUTS))
        assert_close(velocity, case[f"{index}/out"], **ESTIMATOR)


@pytest.mark.parametrize("name", cases("flow_infer_*"))
def test_inference_result(name: str) -> None:
    case = arrays(name)
    mel, flow_cache = infer(tiny("flow"), name)
    assert_close(mel, case["mel"], atol=2e-4)
    assert_close(flow_cache, case["flow_cache_out"], atol=5e-5)


@pytest.mark.parametrize("name", cases("flow_infer_*"))
def test_inference_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder, regulator, what the solver receives, and the first and last network call."""
    case, flow = arrays(name), tiny("flow")
    seen = Recorder(flow)
    seen.keep_result(flow.length_regulator, "inference", "regulator_out")
    solve, solver_inputs = flow.decoder.solve_euler, []
    monkeypatch.setattr(flow.decoder, "solve_euler", lambda *inputs: solver_inputs.append(inputs) or solve(*inputs))
    infer(flow, name)
    assert len(seen.estimator_calls) == meta(name)["n_timesteps"]
    values = seen.values | {f"solver/{key}": value for key, value in zip(SOLVER_INPUTS, solver_inputs[0], strict=True)}
    assert_close(values["solver/t_span"], case["solver/t_span"], atol=1e-7)
    for key, expected in recorded(case, "estimator_step", *INFERENCE_ENDS).items():
        assert_close(values[key].float(), expected, **ACTIVATION)
    check_estimator_calls(seen, case, ESTIMATOR)


@pytest.mark.parametrize("name", cases("length_regulator*"))
def test_length_regulator(name: str) -> None:
    case, regulator = arrays(name), tiny("flow").length_regulator
    out, lengths = regulator(case["forward/x"], case["forward/ylens"])
    assert_close(out, case["forward/out"], **REGULATOR)
    assert lengths.tolist() == case["forward/olens"].tolist()
    pieces = {key: value for key, value in meta(name).items() if key.startswith("inference/")}
    assert {f"{key}/out" for key in pieces} == {key for key in case if re.match(r"inference/.*/out$", key)}
    for key, piece in pieces.items():
        out, frames = regulator.inference(
            case[f"{key}/x1"],
            case[f"{key}/x2"],
            piece["mel_len1"],
            piece["mel_len2"],
            piece["input_frame_rate"],
        )
        assert frames == piece["total"]
        assert_close(out, case[f"{key}/out"], **REGULATOR)
