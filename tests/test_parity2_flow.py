"""CosyVoice2's flow against the recorded numbers of the public one. Tolerances: README of the parity data."""

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
from models import tiny2
from parity import V2, assert_close
from torch import Tensor, nn

from cosyvoice.flow import causal_flow_matching
from cosyvoice.utils.mask import add_optional_chunk_mask, make_pad_mask, subsequent_chunk_mask

INFERENCE_ENDS = ("token", "prompt_token", "prompt_feat", "embedding", "mel")
ENCODER = {"atol": 2e-5}
ACTIVATION = {"atol": 1e-4}
GRADIENT = {"atol": 1e-4, "rtol": 2e-3}
LOSS = {"atol": 1e-4}
MEL = {"atol": 3e-4}
STREAM = {"atol": 1e-4}
TRAINING = V2.cases("flow_train_*")
INFERENCE = V2.cases("flow_infer_*")


def training_case(name: str) -> dict[str, Tensor]:
    """A recorded batch. Its padded mel counts as mel, as it did in the recording: tokens say how long a clip is."""
    case = V2.arrays(name)
    return case | {"batch/speech_feat_len": 2 * case["batch/speech_token_len"]}


def infer(flow: nn.Module, name: str) -> Tensor:
    case, how = V2.arrays(name), V2.meta(name)
    options = {key: how[key] for key in ("streaming", "finalize", "n_timesteps")}
    mel, cache = flow.inference(*inference_sequences(case), case["embedding"], **options)
    assert cache is None
    return mel


# --- the encoder


@pytest.fixture(scope="module", params=V2.cases("encoder"))
def encoded(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return V2.arrays(request.param)


def watch(encoder: nn.Module) -> dict[str, Tensor]:
    """What comes out on the way, under the names of the recordings, once the encoder has been called."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, name: str) -> None:
        def hook(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
            seen.setdefault(name, out)  # of the first call: a second one embeds the context

        module.register_forward_hook(hook)

    keep(encoder.embed, "embed_out")
    keep(encoder.pre_lookahead_layer, "lookahead_out")
    keep(encoder.encoders[-1], "lower_out")
    keep(encoder.up_layer, "upsampled")
    keep(encoder.up_embed, "up_embed_out")
    encoder.encoders[0].register_forward_pre_hook(lambda _, inputs: seen.update(lower_mask=inputs[1]))
    encoder.up_encoders[0].register_forward_pre_hook(lambda _, inputs: seen.update(upper_mask=inputs[1]))
    return seen


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["batch", "single", "context", "short"])
@torch.no_grad()
def test_parity2_upsampling_encoder(encoded: dict[str, Tensor], name: str, streaming: bool) -> None:
    encoder = tiny2("flow").encoder
    seen = watch(encoder)
    lengths = encoded[f"{name}/lens"]
    out, mask = encoder(encoded[f"{name}/x"], lengths, encoded.get(f"{name}/context"), streaming)
    values = seen | {"out": out, "mask": mask, "upsampled": seen["upsampled"].transpose(1, 2)}
    prefix = f"{name}/{'stream' if streaming else 'full'}/"
    expected = {key.removeprefix(prefix): value for key, value in encoded.items() if key.startswith(prefix)}
    assert expected.keys() >= {"out", "mask"}
    for key, value in expected.items():
        if key.endswith("mask"):
            assert torch.equal(values[key], value), key
            continue
        frames_first = [part.transpose(1, 2) if key == "upsampled" else part for part in (values[key], value)]
        valid = ~make_pad_mask(lengths * (frames_first[0].size(1) // int(lengths.max())))
        assert_close(frames_first[0][valid], frames_first[1][valid], **ENCODER)


def test_parity2_chunk_masks(encoded: dict[str, Tensor]) -> None:
    masks = [key for key in encoded if "_mask/" in key]
    assert masks
    for key in masks:
        if sizes := re.fullmatch(r"chunk_mask/(\d+)_(\d+)", key):
            assert torch.equal(subsequent_chunk_mask(int(sizes[1]), int(sizes[2])), encoded[key])
        else:
            size = int(key.removeprefix("optional_mask/static"))
            valid = ~make_pad_mask(encoded["batch/lens"]).unsqueeze(1)
            found = add_optional_chunk_mask(encoded["batch/x"], valid, False, False, 0, size, -1)
            assert torch.equal(found, encoded[key])


# --- training


@pytest.mark.parametrize("name", TRAINING)
def test_parity2_training_activations_and_loss(name: str) -> None:
    case, flow = training_case(name), tiny2("flow")
    seen = Recorder(flow)
    loss = training_loss(flow, case, streaming=V2.meta(name)["streaming"])
    check_training(seen, case, ACTIVATION)
    assert_close(loss, case["loss"], **LOSS)


@pytest.mark.parametrize("name", TRAINING)
def test_parity2_training_gradients(name: str) -> None:
    case, flow = training_case(name), tiny2("flow")
    training_loss(flow, case, streaming=V2.meta(name)["streaming"]).backward()
    check_gradients(flow, case, V2.meta(name)["grad_norm_names"], GRADIENT)


@pytest.mark.parametrize("name", [name for name in TRAINING if "shortmel" not in name])
def test_parity2_training_draws_from_the_recorded_seed(name: str) -> None:
    """The coin of all, then those of the clips, from Python's `random`; time, noise and guidance from torch."""
    case, flow = V2.arrays(name), tiny2("flow")
    seed = V2.meta(name)["seed"]
    random.seed(seed)
    torch.manual_seed(seed)
    assert_close(flow(training_batch(case), torch.device("cpu"))["loss"], case["loss"], **LOSS)
    after = torch.rand(1)
    torch.manual_seed(seed)
    torch.rand(len(case["draw/t"])), torch.randn(case["draw/z"].shape), torch.rand(len(case["draw/t"]))
    assert after == torch.rand(1), "nothing else is drawn"


@pytest.mark.parametrize("name", [name for name in TRAINING if "shortmel" in name])
def test_parity2_missing_mel_is_not_trained_as_silence(name: str) -> None:
    """The public code takes padding for mel where a clip has too little; here tokens are cut to the mel instead."""
    case, flow = V2.arrays(name), tiny2("flow")
    tokens, frames = case["batch/speech_token_len"], case["batch/speech_feat_len"]
    assert (frames < 2 * tokens).any()
    found = training_loss(flow, case, streaming=False)
    cut = torch.minimum(tokens, frames // 2)
    lengths = {"batch/speech_token_len": cut, "batch/speech_feat_len": 2 * cut}
    assert_close(found, training_loss(flow, case | lengths, streaming=False).detach())
    assert abs(found - case["loss"]) > 0.01


# --- inference


@pytest.mark.parametrize("name", V2.cases("flow_estimator*"))
@torch.no_grad()
def test_parity2_estimator(name: str) -> None:
    case, estimator = V2.arrays(name), tiny2("flow").decoder.estimator
    for key, how in V2.meta(name).items():
        index, kind = key.split("/")
        inputs = (case[f"{index}/{each}"] for each in ESTIMATOR_INPUTS)
        assert_close(estimator(*inputs, how["streaming"]), case[f"{index}/out_{kind}"], **ACTIVATION)


@pytest.mark.parametrize("name", V2.cases("rand_noise"))
def test_parity2_noise(name: str) -> None:
    case = V2.arrays(name)
    shape = V2.meta(name)["shape"]
    noise = causal_flow_matching.noise_of(torch.empty(shape), 0)
    head, tail = case["head"], case["tail"]
    assert noise.shape == tuple(shape)
    assert_close(noise[:, :, : head.shape[2]], head, atol=1e-6)
    assert_close(noise[:, :, -tail.shape[2] :], tail, atol=1e-6)
    assert_close(noise.double().sum(dim=2), case["row_sum"], atol=1e-6)
    assert torch.equal(causal_flow_matching.noise_of(torch.empty(1, shape[1], 9), 100), noise[:, :, 100:109])


@pytest.mark.parametrize("name", INFERENCE)
def test_parity2_inference_result(name: str) -> None:
    assert_close(infer(tiny2("flow"), name), V2.arrays(name)["mel"], **MEL)


@pytest.mark.parametrize("name", INFERENCE)
def test_parity2_inference_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder, what the solver receives, and the first and last network call."""
    case, flow = V2.arrays(name), tiny2("flow")
    seen = Recorder(flow)
    solve, solver_inputs = flow.decoder.solve_euler, []
    monkeypatch.setattr(flow.decoder, "solve_euler", lambda *inputs: solver_inputs.extend(inputs) or solve(*inputs))
    infer(flow, name)
    assert len(seen.estimator_calls) == V2.meta(name)["n_timesteps"]
    values = seen.values | {f"solver/{key}": value for key, value in zip(SOLVER_INPUTS, solver_inputs, strict=False)}
    for key, expected in recorded(case, "estimator_step", *INFERENCE_ENDS).items():
        assert_close(values[key].float(), expected, **ACTIVATION)
    check_estimator_calls(seen, case, MEL)


@pytest.mark.parametrize("name", INFERENCE[:1])
def test_parity2_inference_draws_nothing(name: str) -> None:
    flow = tiny2("flow")
    before = random.getstate(), torch.get_rng_state()
    infer(flow, name)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


# --- streams


@pytest.mark.parametrize("piece", [11, 25, 28, 1000])
@pytest.mark.parametrize("name", [name for name in INFERENCE if V2.meta(name)["streaming"]])
def test_parity2_streams_give_the_recorded_frames(name: str, piece: int) -> None:
    case, flow, finalize = V2.arrays(name), tiny2("flow"), V2.meta(name)["finalize"]
    pieces = case["token"].split(piece, dim=1)
    stream = flow.stream(case["prompt_token"], case["prompt_feat"], case["embedding"])
    mel = torch.zeros(1, 80, 0)
    for number, token in enumerate(pieces, start=1):
        settled = stream.settled
        mel = torch.cat([mel[:, :, :settled], stream.push(token, finalize=finalize and number == len(pieces))], dim=2)
    assert_close(mel, case["mel"], **STREAM)
