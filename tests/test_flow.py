"""Properties of the flow and its blocks that hold for any weights."""

import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flow_cases import CFM_PARAMS, ESTIMATOR_OPTIONS, MELS, SPEAKER_DIM, VOCABULARY
from torch import Tensor, nn

from cosyvoice.flow.decoder import ConditionalDecoder
from cosyvoice.flow.flow import MaskedDiffWithXvec
from cosyvoice.flow.flow_matching import ConditionalCFM, TrainingDraw
from cosyvoice.flow.length_regulator import InterpolateRegulator
from cosyvoice.flow.mel_regressor import MelRegressor
from cosyvoice.flow.token_flow import draw_prefix_length
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.encoder import ConformerEncoder
from cosyvoice.utils.rates_300m import OVERLAP_TOKENS, mel_frames
from matcha.models.components.decoder import SinusoidalPosEmb
from matcha.models.components.flow_matching import cosine_time_grid, integrate_euler, optimal_transport_path
from matcha.models.components.transformer import BasicTransformerBlock


def build_cfm(estimator: nn.Module, **params: Any) -> ConditionalCFM:
    return ConditionalCFM(3 * MELS, CFM_PARAMS | params, n_spks=1, spk_emb_dim=MELS, estimator=estimator)


def build_estimator(**options: Any) -> ConditionalDecoder:
    return ConditionalDecoder(**ESTIMATOR_OPTIONS | options).eval()


def build_flow(**options: Any) -> MaskedDiffWithXvec:
    torch.manual_seed(0)
    parts = {
        "encoder": ConformerEncoder(input_size=16, output_size=16, attention_heads=2, linear_units=32, num_blocks=1),
        "length_regulator": InterpolateRegulator(MELS, [1, 1]),
        "decoder": build_cfm(build_estimator()),
    }
    sizes = {
        "input_size": 16,
        "output_size": MELS,
        "spk_embed_dim": SPEAKER_DIM,
        "output_type": "mel",
        "vocab_size": VOCABULARY,
    }
    return MaskedDiffWithXvec(**sizes | parts | options).eval()


def inference_inputs(tokens: int, prompt_tokens: int = 0, prompt_frames: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "token": torch.randint(VOCABULARY, (1, tokens), generator=generator),
        "token_len": torch.tensor([tokens]),
        "prompt_token": torch.randint(VOCABULARY, (1, prompt_tokens), generator=generator),
        "prompt_token_len": torch.tensor([prompt_tokens]),
        "prompt_feat": torch.randn(1, prompt_frames, MELS, generator=generator),
        "prompt_feat_len": torch.tensor([prompt_frames]),
        "embedding": torch.randn(1, SPEAKER_DIM, generator=generator),
        "flow_cache": torch.zeros(1, MELS, 0, 2),
    }


def training_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "speech_token": torch.randint(VOCABULARY, (2, 6), generator=generator),
        "speech_token_len": torch.tensor([6, 4]),
        "speech_feat": torch.randn(2, 10, MELS, generator=generator),
        "speech_feat_len": torch.tensor([10, 7]),
        "embedding": torch.randn(2, SPEAKER_DIM, generator=generator),
    }


def estimator_inputs(lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    batch, frames = len(lengths), max(lengths)
    mask = torch.arange(frames)[None, None] < torch.tensor(lengths)[:, None, None]
    return {
        "x": torch.randn(batch, MELS, frames, generator=generator),
        "mask": mask,
        "mu": torch.randn(batch, MELS, frames, generator=generator),
        "t": torch.rand(batch, generator=generator),
        "spks": torch.randn(batch, MELS, generator=generator),
        "cond": torch.randn(batch, MELS, frames, generator=generator),
    }


class LinearField(nn.Module):
    """A velocity field known in closed form, 3 t² + mu + 1, which counts its calls."""

    in_channels = 4 * MELS

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor) -> Tensor:
        self.batches.append(len(x))
        return 3 * t[:, None, None] ** 2 + mu + 1


# --- the mathematics


def test_path_runs_from_noise_to_data_at_its_own_velocity() -> None:
    x_0, x_1 = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    sigma_min = 0.01
    at = [optimal_transport_path(x_1, x_0, torch.tensor(t), sigma_min) for t in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(at[0][0], x_0)
    torch.testing.assert_close(at[2][0], x_1 + sigma_min * x_0)
    torch.testing.assert_close((at[2][0] - at[0][0]) / 1.0, at[1][1])


def test_euler_converges_with_the_number_of_steps() -> None:
    """The integral of 3 t² over [0, 1] is 1; Euler's error is of first order in the step."""

    def error(steps: int) -> float:
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return abs(float(integrate_euler(lambda x, t: 3 * t**2, torch.zeros(1, dtype=torch.float64), grid)) - 1)

    assert error(1000) < 2e-3
    assert error(500) / error(1000) == pytest.approx(2, rel=0.01)


def test_cosine_grid_starts_with_short_steps() -> None:
    grid = cosine_time_grid(10, torch.device("cpu"))
    assert grid[0] == 0
    assert float(grid[-1]) == pytest.approx(1, abs=1e-6)
    assert (grid.diff().diff() > 0).all()


@pytest.mark.parametrize(("w", "items"), [(0.5, 2), (0.0, 1)])
def test_guidance_extrapolates_in_one_call_per_step_and_without_it_conditions_are_kept(w: float, items: int) -> None:
    field = LinearField()
    cfm = build_cfm(field, inference_cfg_rate=w)
    mu = torch.randn(1, MELS, 7)
    ones = torch.ones(1, 1, 7, dtype=torch.bool)
    x = cfm.solve_euler(torch.zeros_like(mu), torch.linspace(0, 1, 4001), mu, ones, mu[:, :, 0], mu)
    assert field.batches == [items] * 4000
    torch.testing.assert_close(x, 1 + (1 + w) * mu + 1, atol=2e-3, rtol=0)  # (1 + w) (mu + 1) - w (0 + 1), and 3 t²


def test_loss_is_the_mean_over_valid_cells() -> None:
    """A network that says zero is off by the target velocity, of which padding must not count."""

    class Zero(nn.Module):
        in_channels = 4 * MELS

        def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
            return torch.zeros_like(x)

    inputs = estimator_inputs([5, 3])
    cfm = build_cfm(Zero())
    draw = TrainingDraw(torch.rand(2, 1, 1), torch.randn_like(inputs["x"]), torch.tensor([True, False]))
    cfm.draw_training = lambda x1: draw
    x1 = inputs["x"].masked_fill(~inputs["mask"], 1e3)
    loss, _ = cfm.compute_loss(x1, inputs["mask"], inputs["mu"], inputs["spks"], inputs["cond"])
    u = (x1 - (1 - 1e-6) * draw.z).transpose(1, 2)
    torch.testing.assert_close(loss, u[inputs["mask"][:, 0]].square().mean())


# --- the blocks


def test_transformer_block_is_made_of_diffusers_parts() -> None:
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention

    block = BasicTransformerBlock(12, num_attention_heads=3, attention_head_dim=5).eval()
    attention = Attention(query_dim=12, heads=3, dim_head=5).eval()
    feed_forward = FeedForward(12, activation_fn="gelu").eval()
    attention.load_state_dict(block.attn1.state_dict(), strict=True)
    feed_forward.load_state_dict(block.ff.state_dict(), strict=True)
    x = torch.randn(2, 7, 12)
    visible = torch.arange(7) < torch.tensor([7, 4])[:, None]
    expected = x + attention(block.norm1(x), attention_mask=visible[:, None])
    expected = expected + feed_forward(block.norm3(expected))
    torch.testing.assert_close(block(x, visible[:, None, None]), expected)


def test_time_embedding_is_that_of_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.3, 1.0])
    expected = get_timestep_embedding(t, 32, downscale_freq_shift=1, scale=1000)
    torch.testing.assert_close(SinusoidalPosEmb(32)(t), expected, atol=1e-4, rtol=0)


def test_dropout_follows_the_mode() -> None:
    block = BasicTransformerBlock(8, num_attention_heads=2, attention_head_dim=4, dropout=0.5)
    x = torch.randn(1, 5, 8)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("channels", [[16], [16, 16], [16, 24, 32]])
def test_estimator_takes_any_length_and_depth(frames: int, channels: list[int]) -> None:
    velocity = build_estimator(channels=channels)(**estimator_inputs([frames]))
    assert velocity.shape == (1, MELS, frames)
    assert velocity.isfinite().all()


def test_estimator_sees_nothing_of_the_padding() -> None:
    estimator, inputs = build_estimator(), estimator_inputs([9, 4])
    garbled = dict(inputs)
    for name in ("x", "mu", "cond"):
        garbled[name] = inputs[name].masked_fill(~inputs["mask"], 50.0)
    velocity = estimator(**inputs)
    torch.testing.assert_close(estimator(**garbled), velocity)
    assert (velocity.masked_fill(inputs["mask"], 0) == 0).all()


def test_shared_tokens_of_two_chunks_give_the_same_frames() -> None:
    regulator = InterpolateRegulator(MELS, [1])
    regulator.model = nn.Identity()
    tokens = torch.randn(1, 90, MELS)
    none = tokens[:, :0]
    first, _ = regulator.inference(none, tokens[:, :50], 0, mel_frames(50))
    second, _ = regulator.inference(none, tokens[:, 50 - OVERLAP_TOKENS :], 0, mel_frames(40 + OVERLAP_TOKENS))
    shared = mel_frames(OVERLAP_TOKENS)
    torch.testing.assert_close(first[:, -shared:], second[:, :shared])


def test_mel_frames_is_the_duration_rounded_down() -> None:
    assert [mel_frames(n) for n in range(3000)] == [int(n / 50 * 22050 / 256) for n in range(3000)]


# --- the whole flow


def test_inference_length_and_determinism() -> None:
    flow, inputs = build_flow(), inference_inputs(tokens=9, prompt_tokens=4, prompt_frames=7)
    torch.manual_seed(5)
    mel, cache = flow.inference(**inputs)
    torch.manual_seed(5)
    again, _ = flow.inference(**inputs)
    assert mel.shape == (1, MELS, mel_frames(9))
    assert cache.shape[2] == min(mel_frames(9) + 7, mel_frames(OVERLAP_TOKENS)) + 7
    assert mel.dtype == torch.float32
    assert torch.equal(mel, again)


def test_halves_of_the_threads_compute_halves_of_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, inputs = build_flow(), inference_inputs(tokens=9, prompt_tokens=4, prompt_frames=7)
    estimator, seen = flow.decoder.estimator.forward, []

    def watched(x: Tensor, *others: Tensor) -> Tensor:
        seen.append((len(x), torch.get_num_threads()))
        return estimator(x, *others)

    def mel() -> Tensor:
        torch.manual_seed(4)
        return flow.inference(**inputs, n_timesteps=3)[0]

    monkeypatch.setattr(flow.decoder.estimator, "forward", watched)
    together = mel()
    assert seen == 3 * [(2, 1)]
    torch.set_num_threads(4)
    try:
        torch.testing.assert_close(mel(), together)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)
    assert seen[3:] == 6 * [(1, 2)]


def test_requests_at_the_same_time_leave_the_number_of_threads_alone() -> None:
    flow = build_flow()

    def speak(tokens: int) -> int:
        flow.inference(**inference_inputs(tokens=tokens), n_timesteps=2)
        return torch.get_num_threads()

    torch.set_num_threads(4)
    try:
        for _ in range(3):
            with ThreadPoolExecutor(3) as requests:  # each in a new thread
                assert list(requests.map(speak, [5, 40, 20])) == [4, 4, 4]
    finally:
        torch.set_num_threads(1)


def test_one_token_is_enough() -> None:
    mel, _ = build_flow().inference(**inference_inputs(tokens=1))
    assert mel.shape == (1, MELS, 1)


def test_the_callers_tensors_are_left_alone() -> None:
    flow, batch = build_flow(), training_batch()
    inputs = inference_inputs(tokens=60, prompt_tokens=4, prompt_frames=7)
    inputs["flow_cache"] = torch.randn(1, MELS, 20, 2)
    before = {name: value.clone() for name, value in (inputs | batch).items()}
    flow.inference(**inputs)
    flow(batch, torch.device("cpu"))
    for name, value in (inputs | batch).items():
        assert torch.equal(value, before[name]), name


def test_cache_replaces_the_start_of_noise_and_mu() -> None:
    flow, inputs = build_flow(), inference_inputs(tokens=60, prompt_tokens=4, prompt_frames=7)
    inputs["flow_cache"] = torch.randn(1, MELS, 20, 2)
    seen: list[Tensor] = []
    solve = flow.decoder.solve_euler
    flow.decoder.solve_euler = lambda *args: seen.extend((args[0], args[2])) or solve(*args)
    _, new_cache = flow.inference(**inputs)
    started = torch.stack(seen, dim=-1)  # (1, M, T, 2)
    assert torch.equal(started[:, :, :20], inputs["flow_cache"])
    assert torch.equal(new_cache[:, :, :7], started[:, :, :7])
    assert torch.equal(new_cache[:, :, 7:], started[:, :, -mel_frames(OVERLAP_TOKENS) :])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (inference_inputs(tokens=0), "no speech tokens"),
        (inference_inputs(tokens=5, prompt_tokens=3), "or neither"),
        (inference_inputs(tokens=5, prompt_frames=3), "or neither"),
        (inference_inputs(tokens=5) | {"token": torch.zeros(2, 5, dtype=torch.int64)}, "one utterance"),
    ],
)
def test_inference_refuses(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_flow().inference(**inputs)


def test_forward_is_the_loss_with_drawn_prefixes() -> None:
    flow, batch = build_flow(), training_batch()
    random.seed(3)
    torch.manual_seed(3)
    loss = flow(batch, torch.device("cpu"))["loss"]
    random.seed(3)
    torch.manual_seed(3)
    prefixes = [draw_prefix_length(frames) for frames in batch["speech_feat_len"].tolist()]
    torch.testing.assert_close(loss, flow.loss(*batch_in_order(batch), prefixes))
    torch.manual_seed(3)
    without = flow.loss(*batch_in_order(batch), [0, 0])
    torch.manual_seed(3)
    assert flow.loss(*batch_in_order(batch), [3, 2]) != without


def batch_in_order(batch: dict[str, Tensor]) -> list[Tensor]:
    names = ("speech_token", "speech_token_len", "speech_feat", "speech_feat_len", "embedding")
    return [batch[name] for name in names]


def test_prefixes_are_absent_or_short() -> None:
    random.seed(0)
    lengths = [draw_prefix_length(100) for _ in range(2000)]
    assert max(lengths) == 30
    assert 0.45 < lengths.count(0) / len(lengths) < 0.6


def test_bfloat16_stays_close_to_float32() -> None:
    """Weights in half precision, inputs as the callers have them; results come back in float32."""
    flow, batch = build_flow(), training_batch()
    inputs = inference_inputs(tokens=9, prompt_tokens=4, prompt_frames=7)

    def results() -> tuple[Tensor, Tensor]:
        torch.manual_seed(4)
        loss = flow.loss(*batch_in_order(batch), [0, 3])
        return loss, flow.inference(**inputs)[0]

    loss, mel = results()
    flow.to(torch.bfloat16)
    half_loss, half_mel = results()
    assert half_loss.dtype == half_mel.dtype == torch.float32
    torch.testing.assert_close(half_loss, loss, rtol=0.02, atol=0)
    assert (half_mel - mel).abs().mean() < 0.05 * mel.abs().mean()


# --- a network that predicts the mel


def build_mel_regressor() -> MelRegressor:
    torch.manual_seed(0)
    return MelRegressor(MELS, MELS, MELS, channels=12, kernel_size=3, num_blocks=2, mel_mean=-5, mel_std=2).eval()


def regressor_inputs(lengths: list[int]) -> dict[str, Tensor]:
    return {name: value for name, value in estimator_inputs(lengths).items() if name not in ("x", "t")}


def test_the_mel_regressor_is_compared_with_the_mel_and_not_with_padding() -> None:
    regressor, inputs = build_mel_regressor(), regressor_inputs([6, 4])
    mel = regressor.predict(**inputs)
    right, _ = regressor.compute_loss(mel + 100 * ~inputs["mask"], **inputs)
    wrong, _ = regressor.compute_loss(mel + 3, **inputs)
    torch.testing.assert_close(right, torch.tensor(0.0))
    torch.testing.assert_close(wrong, torch.tensor(3.0))


def test_the_mel_regressor_sees_nothing_of_the_padding_and_follows_each_input() -> None:
    regressor, inputs = build_mel_regressor(), regressor_inputs([9, 4])
    mel = regressor.predict(**inputs)
    assert mel.shape == (2, MELS, 9) and (mel[1, :, 4:] == 0).all()
    alone = {name: value[1:, ..., :4] if value.dim() == 3 else value[1:] for name, value in inputs.items()}
    torch.testing.assert_close(mel[1:, :, :4], regressor.predict(**alone))
    for name in ("mu", "spks", "cond"):
        moved = regressor.predict(**inputs | {name: inputs[name] + 0.5})
        assert (moved - mel).abs().amax(dim=(1, 2)).gt(1e-4).all(), name


def test_a_flow_with_a_mel_regressor_says_the_same_at_every_seed_and_trains_every_weight() -> None:
    flow = build_flow(decoder=build_mel_regressor())
    inputs = inference_inputs(tokens=5)
    torch.manual_seed(1)
    mel, cache = flow.inference(**inputs)
    torch.manual_seed(2)
    again, _ = flow.inference(**inputs)
    assert mel.shape == (1, MELS, mel_frames(5)) and torch.equal(again, mel)
    assert cache is inputs["flow_cache"]
    flow(training_batch(), torch.device("cpu"))["loss"].backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in flow.parameters())


def test_the_mel_regressor_computes_the_same_in_its_form_for_inference() -> None:
    regressor, inputs = build_mel_regressor(), regressor_inputs([9, 4])
    mel = regressor.predict(**inputs)
    regressor.prepare_inference(lambda linear: nn.Sequential(linear))
    assert all(isinstance(block.pointwise[2], nn.Sequential) for block in regressor.blocks)
    torch.testing.assert_close(regressor.predict(**inputs), mel)


# --- settings


def test_cfm_params_may_be_a_mapping_or_a_namespace() -> None:
    from omegaconf import DictConfig

    for params in (CFM_PARAMS, DictConfig(CFM_PARAMS), SimpleNamespace(**CFM_PARAMS)):
        cfm = ConditionalCFM(3 * MELS, params, n_spks=1, spk_emb_dim=MELS, estimator=LinearField())
        assert cfm.params.inference_cfg_rate == 0.7


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_estimator(act_fn="snake"), "snake"),
        (lambda: build_cfm(LinearField(), solver="midpoint"), "midpoint"),
        (lambda: build_cfm(LinearField(), t_scheduler="linear"), "linear"),
        (lambda: build_cfm(LinearField(), guidance=1.0), "guidance"),
        (lambda: ConditionalCFM(24, CFM_PARAMS, 0, MELS, LinearField()), "n_spks 0"),
        (lambda: ConditionalCFM(25, CFM_PARAMS, 1, MELS, LinearField()), "in_channels 25"),
        (lambda: InterpolateRegulator(MELS, [1, 2]), "sampling_ratios"),
        (lambda: build_flow(output_type="wav"), "output_type 'wav'"),
        (lambda: build_flow(only_mask_loss=False), "only_mask_loss"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()
