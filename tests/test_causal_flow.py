"""Properties of CosyVoice2's flow and its streams that hold for any weights."""

import inspect
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_cases import CFM_PARAMS, ESTIMATOR_OPTIONS, MELS, SPEAKER_DIM, VOCABULARY
from models import ORIGIN, tiny2
from parity import V1
from torch import Tensor, nn

from config import JOINT_TRAINING_CONFIG, with_changes
from cosyvoice.flow import causal_flow
from cosyvoice.flow.causal_decoder import CausalConditionalDecoder
from cosyvoice.flow.causal_flow import CausalMaskedDiffWithXvec
from cosyvoice.flow.causal_flow_matching import MOST_FRAMES, CausalConditionalCFM
from cosyvoice.flow.flow import MaskedDiffWithXvec
from cosyvoice.flow.flow_matching import TrainingDraw
from cosyvoice.flow.mel_stream import MelStream
from cosyvoice.runtime.device import free_memory
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.precision import KEPT
from cosyvoice.transformer.upsample_encoder import UpsampleConformerEncoder
from llm_flow_model import JointModel
from lora import inject
from matcha.models.components import past as past_module
from matcha.models.components.past import Past

CHUNK = 4  # tokens
LOOKAHEAD = 3
RATIO = 2
STEPS = 2
LINEARS = ("linear_q", "linear_k", "linear_v", "linear_out", "w_1", "w_2")
ESTIMATOR_LINEARS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")


def build_encoder(**options: Any) -> UpsampleConformerEncoder:
    sizes = {"input_size": 12, "output_size": 16, "attention_heads": 2, "linear_units": 32}
    return UpsampleConformerEncoder(**sizes | {"num_blocks": 2, "static_chunk_size": CHUNK} | options)


def build_estimator(**options: Any) -> CausalConditionalDecoder:
    causal = {"channels": [16], "static_chunk_size": RATIO * CHUNK, "num_decoding_left_chunks": -1}
    return CausalConditionalDecoder(**ESTIMATOR_OPTIONS | causal | options)


def build_cfm(estimator: nn.Module) -> CausalConditionalCFM:
    return CausalConditionalCFM(3 * MELS, CFM_PARAMS, n_spks=1, spk_emb_dim=MELS, estimator=estimator)


def build_flow(**options: Any) -> CausalMaskedDiffWithXvec:
    torch.manual_seed(0)
    parts = {"encoder": build_encoder(), "decoder": build_cfm(build_estimator())}
    sizes = {
        "input_size": 12,
        "output_size": MELS,
        "spk_embed_dim": SPEAKER_DIM,
        "output_type": "mel",
        "vocab_size": VOCABULARY,
    }
    return CausalMaskedDiffWithXvec(**sizes | parts | options).eval()


def voice(prompt_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt tokens, prompt mel and speaker vector."""
    generator = torch.Generator().manual_seed(1)
    prompt_token = torch.randint(VOCABULARY, (1, prompt_tokens), generator=generator)
    prompt_feat = torch.randn(1, RATIO * prompt_tokens, MELS, generator=generator)
    return prompt_token, prompt_feat, torch.randn(1, SPEAKER_DIM, generator=generator)


def tokens(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, count), generator=torch.Generator().manual_seed(2))


def whole(
    flow: CausalMaskedDiffWithXvec, token: Tensor, prompt: int, streaming: bool = True, finalize: bool = True
) -> Tensor:
    prompt_token, prompt_feat, embedding = voice(prompt)
    sequences = [value for x in (token, prompt_token, prompt_feat) for value in (x, torch.tensor([x.shape[1]]))]
    mel, _ = flow.inference(*sequences, embedding, streaming, finalize, n_timesteps=STEPS)
    return mel


def training_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 6])
    return {
        "speech_token": torch.randint(VOCABULARY, (2, 9), generator=generator),
        "speech_token_len": lengths,
        "speech_feat": torch.randn(2, RATIO * 9, MELS, generator=generator),
        "speech_feat_len": RATIO * lengths,
        "embedding": torch.randn(2, SPEAKER_DIM, generator=generator),
    }


def loss(flow: CausalMaskedDiffWithXvec, batch: dict[str, Tensor], prefixes: Sequence[int] = (4, 0), **options: Any):
    torch.manual_seed(4)
    return flow.loss(*batch.values(), prefixes, **options)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


# --- the weights


def test_the_state_dict_is_that_of_the_public_model() -> None:
    """Sizes of CosyVoice2-0.5B. The fixed noise is no part of it."""
    with torch.device("meta"):  # shapes without memory
        encoder = UpsampleConformerEncoder(512, 512, 6, attention_heads=8, linear_units=2048, static_chunk_size=25)
        sizes = {"channels": [256], "n_blocks": 4, "num_mid_blocks": 12, "num_heads": 8, "attention_head_dim": 64}
        estimator = build_estimator(in_channels=320, out_channels=80, **sizes)
        decoder = CausalConditionalCFM(240, CFM_PARAMS, n_spks=1, spk_emb_dim=80, estimator=estimator)
        flow = CausalMaskedDiffWithXvec(
            encoder,
            decoder,
            input_size=512,
            output_size=80,
            spk_embed_dim=192,
            output_type="mel",
            vocab_size=6561,
        )
    expected = V1.table("manifest_cosyvoice2_05b")["flow"]
    found = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in flow.state_dict().items()
    }
    assert found == expected["keys"]
    assert sum(parameter.numel() for parameter in flow.parameters()) == expected["num_parameters"]


def test_building_a_flow_does_not_seed_the_process() -> None:
    def after(seed: int) -> tuple[float, Tensor]:
        random.seed(seed)
        torch.manual_seed(seed)
        flow = build_cfm(build_estimator())
        flow(torch.zeros(1, MELS, 3), torch.ones(1, 1, 3), STEPS, 1.0, torch.zeros(1, MELS), torch.zeros(1, MELS, 3))
        return random.random(), torch.rand(3)

    once, other, again = after(5), after(6), after(5)
    assert once[0] == again[0] != other[0]
    assert torch.equal(once[1], again[1]) and not torch.equal(once[1], other[1])
    random.seed(5)
    assert random.random() == once[0]


def test_adapters_find_the_linear_layers() -> None:
    adapted = inject(build_flow(), [*LINEARS, *ESTIMATOR_LINEARS], rank=2, alpha=2, dropout=0)
    blocks = [f"encoder.encoders.{n}" for n in range(2)] + [f"encoder.up_encoders.{n}" for n in range(4)]
    assert {name for name in adapted if name.startswith("encoder.")} == {
        f"{block}.{'self_attn' if name.startswith('linear') else 'feed_forward'}.{name}"
        for block in blocks
        for name in LINEARS
    }
    stages = [f"decoder.estimator.{way}_blocks.0.1.0" for way in ("down", "mid", "up")]
    assert {name for name in adapted if name.startswith("decoder.")} == {
        f"{stage}.{name}" for stage in stages for name in ESTIMATOR_LINEARS
    }


# --- what a frame depends on


@pytest.mark.parametrize("streaming", [False, True])
@torch.no_grad()
def test_a_token_sees_its_chunk_the_past_and_the_lookahead(streaming: bool) -> None:
    encoder, count, changed = build_encoder().eval(), 4 * CHUNK, 2 * CHUNK
    x, lengths = torch.randn(1, count, 12), torch.tensor([count])
    other = x.clone()
    other[:, changed] += 1
    moved = (
        (encoder(other, lengths, None, streaming)[0] - encoder(x, lengths, None, streaming)[0]).abs().amax(dim=(0, 2))
    )
    # the look-ahead takes the change into the chunk before, and attention spreads it there
    first = RATIO * CHUNK if streaming else 0
    assert (moved[:first] == 0).all() and (moved[first:] > 1e-6).all()


@pytest.mark.parametrize("streaming", [False, True])
@torch.no_grad()
def test_a_velocity_sees_its_chunk_and_the_past(streaming: bool) -> None:
    estimator, chunk = build_estimator().eval(), RATIO * CHUNK
    x, mu, cond = torch.randn(3, 1, MELS, 4 * chunk)
    other = x.clone()
    other[:, :, 2 * chunk + 3] += 1
    rest = torch.ones(1, 1, 4 * chunk), mu, torch.rand(1), torch.randn(1, MELS), cond, streaming
    moved = (estimator(other, *rest) - estimator(x, *rest)).abs().amax(dim=(0, 1))
    first = 2 * chunk if streaming else 0
    assert (moved[:first] == 0).all() and (moved[first:] > 1e-7).all()


@torch.no_grad()
def test_a_velocity_sees_nothing_of_the_padding() -> None:
    estimator, lengths = build_estimator().eval(), (11, 5)
    x, mu, cond = torch.randn(3, 2, MELS, lengths[0])
    mask = torch.arange(lengths[0]) < torch.tensor(lengths)[:, None, None]
    t, spks = torch.rand(2), torch.randn(2, MELS)
    for streaming in (False, True):
        together = estimator(x, mask, mu, t, spks, cond, streaming)
        assert (together[1, :, lengths[1] :] == 0).all()
        short = (value[1:, :, : lengths[1]] for value in (x, mask, mu))
        x1, mask1, mu1 = short
        alone = estimator(x1, mask1, mu1, t[1:], spks[1:], cond[1:, :, : lengths[1]], streaming)
        close(together[1:, :, : lengths[1]], alone)


def test_a_longer_call_repeats_the_final_frames_of_a_shorter_one() -> None:
    flow, token = build_flow(), tokens(3 * CHUNK + LOOKAHEAD)
    longer = whole(flow, token, prompt=CHUNK)
    for chunks in (1, 2):
        shorter = whole(flow, token[:, : chunks * CHUNK + LOOKAHEAD], prompt=CHUNK, finalize=False)
        assert shorter.shape == (1, MELS, RATIO * chunks * CHUNK)
        close(shorter, longer[:, :, : shorter.shape[2]])
        full = whole(flow, token[:, : chunks * CHUNK + LOOKAHEAD], CHUNK, streaming=False, finalize=False)
        assert (full - longer[:, :, : full.shape[2]]).abs().max() > 1e-3


# --- streams


def pieces_of(token: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    assert sum(sizes) == token.shape[1]
    return list(token.split(list(sizes), dim=1))


@pytest.mark.parametrize("prompt", [0, 1, CHUNK, 2 * CHUNK + 3, 3 * CHUNK - 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_stream_gives_what_one_call_over_all_tokens_so_far_gives(prompt: int, seed: int) -> None:
    flow, rng = build_flow(), random.Random(seed)
    sizes = [rng.choice([0, 1, 2, 3, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 2]) for _ in range(7)]
    token = tokens(sum(sizes) + 1)
    stream, mel, final = flow.stream(*voice(prompt), STEPS), torch.zeros(1, MELS, 0), torch.zeros(1, MELS, 0)
    count = 0
    for piece in token[:, :-1].split(sizes, dim=1):
        settled, count = stream.settled, count + piece.shape[1]
        assert torch.equal(mel[:, :, :settled], final)
        mel = torch.cat([final, stream.push(piece)], dim=2)
        assert mel.shape[2] == RATIO * max(0, count - LOOKAHEAD)
        if count > LOOKAHEAD:
            close(mel, whole(flow, token[:, :count], prompt, finalize=False))
        final = mel[:, :, : stream.settled]
        assert stream.settled == max(0, RATIO * ((prompt + count - LOOKAHEAD) // CHUNK * CHUNK - prompt))
    mel = torch.cat([final, stream.push(token[:, -1:], finalize=True)], dim=2)
    close(mel, whole(flow, token, prompt))
    assert stream.settled == mel.shape[2] == RATIO * token.shape[1]


def test_a_stream_computes_every_frame_once_where_pieces_end_with_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, prompt, computed = build_flow(), CHUNK + 1, []
    step = flow.decoder.estimator.step
    monkeypatch.setattr(flow.decoder.estimator, "step", lambda x, *rest: computed.append(x.shape[2]) or step(x, *rest))
    stream = flow.stream(*voice(prompt), STEPS)
    assert computed == [] and stream.settled == 0, "the look-ahead of the prompt's chunk is not there"
    sizes = [CHUNK - 1 + LOOKAHEAD, CHUNK, 2 * CHUNK, 1]
    for piece in pieces_of(tokens(sum(sizes)), sizes)[:-1]:
        stream.push(piece)
    stream.push(tokens(1), finalize=True)
    chunks = [2, 1, 2]
    assert computed == [RATIO * CHUNK * count for count in chunks for _ in range(STEPS)] + STEPS * [RATIO * 4]


def test_a_prompt_is_computed_when_the_stream_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, computed = build_flow(), []
    step = flow.decoder.estimator.step
    monkeypatch.setattr(flow.decoder.estimator, "step", lambda x, *rest: computed.append(x.shape[2]) or step(x, *rest))
    stream = flow.stream(*voice(2 * CHUNK + LOOKAHEAD), STEPS)
    assert computed == STEPS * [RATIO * 2 * CHUNK]
    assert stream.settled == 0


def test_streams_do_not_disturb_each_other() -> None:
    flow, token = build_flow(), tokens(9)

    def spoken(prompt: int) -> Tensor:
        stream = flow.stream(*voice(prompt), STEPS)
        parts = []
        for number, piece in enumerate(token.split(3, dim=1)):
            before = stream.settled
            part = stream.push(piece, finalize=number == 2)
            parts.append(part if stream.ended else part[:, :, : stream.settled - before])
        return torch.cat(parts, dim=2)

    prompts = [0, 1, 5, 9]
    with ThreadPoolExecutor(4) as pool:
        for prompt, found in zip(prompts, pool.map(spoken, prompts), strict=True):
            close(found, whole(flow, token, prompt))


def test_guidance_goes_in_two_halves_on_a_cpu_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, token, seen = build_flow(), tokens(2 * CHUNK + LOOKAHEAD + 2), []
    expected = whole(flow, token, prompt=3)
    velocity = flow.decoder.estimator.velocity

    def watched(x: Tensor, *others: Any) -> Tensor:
        seen.append(len(x))
        return velocity(x, *others)

    monkeypatch.setattr(flow.decoder.estimator, "velocity", watched)
    torch.set_num_threads(4)
    try:
        close(whole(flow, token, prompt=3), expected)
        stream = flow.stream(*voice(3), STEPS)
        before = stream.push(token[:, :-2])[:, :, : stream.settled]
        close(torch.cat([before, stream.push(token[:, -2:], finalize=True)], dim=2), expected)
    finally:
        torch.set_num_threads(1)
    assert seen == 3 * STEPS * [1, 1]


def test_a_stream_without_guidance_keeps_half_and_gives_what_one_call_gives() -> None:
    guided, flow, token = build_flow(), build_flow(), tokens(2 * CHUNK + LOOKAHEAD + 2)
    flow.decoder.params = replace(flow.decoder.params, inference_cfg_rate=0.0)
    expected, stream = whole(flow, token, prompt=3), flow.stream(*voice(3), STEPS)
    before = stream.push(token[:, :-2])[:, :, : stream.settled]
    close(torch.cat([before, stream.push(token[:, -2:], finalize=True)], dim=2), expected)
    assert stream.decoder_past.frame_bytes == guided.stream(*voice(3), STEPS).decoder_past.frame_bytes // 2


def test_an_utterance_that_ends_at_once_and_one_that_waits() -> None:
    flow = build_flow()
    close(flow.stream(*voice(0), STEPS).push(tokens(1), finalize=True), whole(flow, tokens(1), prompt=0))
    stream = flow.stream(*voice(0), STEPS)
    assert stream.push(tokens(LOOKAHEAD)).shape == (1, MELS, 0)
    close(stream.push(tokens(0), finalize=True), whole(flow, tokens(LOOKAHEAD), prompt=0))


def test_what_a_stream_refuses() -> None:
    flow = build_flow()
    with pytest.raises(InputError, match="no speech tokens"):
        flow.stream(*voice(CHUNK), STEPS).push(tokens(0), finalize=True)
    stream = flow.stream(*voice(0), STEPS)
    stream.push(tokens(2), finalize=True)
    with pytest.raises(InputError, match="has ended"):
        stream.push(tokens(2))
    prompt_token, prompt_feat, embedding = voice(4)
    with pytest.raises(InputError, match="need 8 frames of mel, not 7"):
        flow.stream(prompt_token, prompt_feat[:, 1:], embedding)
    for parts in ({"encoder": build_encoder(static_chunk_size=0)}, {"encoder": build_encoder(static_chunk_size=5)}):
        with pytest.raises(InputError, match="needs a static_chunk_size"):
            build_flow(**parts).stream(*voice(0))


def test_a_stream_ends_where_the_noise_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosyvoice.flow.causal_flow_matching.MOST_FRAMES", 3 * RATIO * CHUNK)
    flow = build_flow()
    stream = flow.stream(*voice(CHUNK), STEPS)
    stream.push(tokens(2 * CHUNK))
    with pytest.raises(InputError, match="26 mel frames"):
        stream.push(tokens(1), finalize=True)
    with pytest.raises(InputError, match="has ended"):
        stream.push(tokens(0), finalize=True)


def blocks_of(stream: MelStream) -> list[Tensor]:
    """All that is kept of keys and values."""
    earlier = [past.earlier for step in stream.decoder_past.steps for past in (step, *step.halves)]
    return [tensor for blocks in earlier for tensor in (*blocks.blocks, *blocks.scales)]


@pytest.mark.parametrize("kept_type", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_stream_keeps_what_its_final_frames_need_and_moves_none_of_it(kept_type: torch.dtype, threads: int) -> None:
    flow, prompt, places = build_flow(), CHUNK + 1, {}
    flow.kept_type = kept_type
    torch.set_num_threads(threads)
    try:
        stream = flow.stream(*voice(prompt), STEPS)
        for size in (CHUNK, 1, 0, 3 * CHUNK, CHUNK, 2, CHUNK + 1):
            stream.push(tokens(size))
            found = {block.data_ptr(): block.numel() for block in blocks_of(stream)}
            assert places.items() <= found.items(), "a block was copied or enlarged"
            places = found
            held = sum(block.numel() * block.itemsize for block in blocks_of(stream))
            assert held == stream.decoder_past.length * stream.decoder_past.frame_bytes
    finally:
        torch.set_num_threads(1)
    assert len(places) > 4 and stream.settled > 0


def test_what_a_frame_of_cosyvoice2_keeps() -> None:
    """As docs/performance.md says; 112 layers and halves, ten steps, 512 keys and values."""
    with torch.device("meta"):
        sizes = {"channels": [256], "n_blocks": 4, "num_mid_blocks": 12, "num_heads": 8, "attention_head_dim": 64}
        decoder = CausalConditionalCFM(
            240,
            CFM_PARAMS,
            n_spks=1,
            spk_emb_dim=80,
            estimator=build_estimator(in_channels=320, out_channels=80, **sizes),
        )
    found = {dtype: decoder.new_past(10, dtype).frame_bytes for dtype in (torch.float32, torch.float16, torch.int8)}
    assert found == {torch.float32: 4_587_520, torch.float16: 2_293_760, torch.int8: 1_218_560}


@pytest.mark.parametrize(("precision", "most"), [("float16", 5e-4), ("int8", 2e-2)])
def test_keys_in_fewer_bits_stay_close(precision: str, most: float) -> None:
    """Of the mean size of the mel: ten times less than what int8 weights move it by."""
    flow, token = build_flow(), tokens(6 * CHUNK)
    expected = whole(flow, token, prompt=4)
    flow.kept_type = KEPT[precision]
    stream, parts = flow.stream(*voice(4), STEPS), []
    for piece in token.split(2 * CHUNK, dim=1):
        settled, part = stream.settled, stream.push(piece, finalize=len(parts) == 2)
        parts.append(part if stream.ended else part[:, :, : stream.settled - settled])
    error = (torch.cat(parts, dim=2) - expected).abs().mean() / expected.abs().mean()
    assert 1e-6 < error < most


def test_a_stream_attends_with_torchs_fast_kernels_to_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask has four axes or is left out, and a few chunks of a long prompt do not read those behind them."""
    flow, seen = build_flow(), []
    attention = past_module.F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **encoders: Any) -> Tensor:
        if not encoders:  # options that only the encoder's attention gives
            seen.append((query.size(2), key.size(2)))
            assert attn_mask is None or attn_mask.shape == (1, 1, query.size(2), key.size(2))
        return attention(query, key, value, attn_mask=attn_mask, **encoders)

    monkeypatch.setattr(past_module.F, "scaled_dot_product_attention", watched)
    stream = flow.stream(*voice(10 * CHUNK + LOOKAHEAD), STEPS)
    chunk = RATIO * CHUNK
    assert set(seen) >= {(4 * chunk, 4 * chunk), (4 * chunk, 8 * chunk), (2 * chunk, 10 * chunk)}
    seen.clear()
    stream.push(tokens(CHUNK))
    assert (chunk, 11 * chunk) in seen


def test_a_stream_without_memory_for_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = build_flow()
    frame_bytes = flow.stream(*voice(0), STEPS).decoder_past.frame_bytes
    chunk_bytes = RATIO * CHUNK * frame_bytes
    free = [2 * chunk_bytes, chunk_bytes, chunk_bytes - 1]
    monkeypatch.setattr("cosyvoice.flow.causal_flow_matching.free_memory", lambda _: free.pop(0))
    stream = flow.stream(*voice(2 * CHUNK + LOOKAHEAD), STEPS)
    stream.push(tokens(CHUNK))
    with pytest.raises(InputError, match=r"^a stream of 32 mel frames, .* do not stream$"):
        stream.push(tokens(CHUNK))
    free.append(None)  # a system that does not say
    flow.stream(*voice(2 * CHUNK + LOOKAHEAD), STEPS)


def test_free_memory_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "meminfo"
    monkeypatch.setattr("cosyvoice.runtime.device.MEMORY_FILE", file)
    assert free_memory(torch.device("cpu")) is None
    file.write_text("MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:    2000000 kB\n")
    assert free_memory(torch.device("cpu")) == 2_048_000_000


def test_a_past_keeps_final_frames_only() -> None:
    past, layer = Past(), nn.Identity()
    frames = torch.arange(9.0).view(1, 1, 9)
    past.final = 3
    assert past.with_context(layer, frames[:, :, :5], 2).flatten().tolist() == [0, 0, 0, 1, 2, 3, 4]
    past.advance()
    past.final = 0
    assert past.with_context(layer, frames[:, :, 3:6], 2).flatten().tolist() == [1, 2, 3, 4, 5]
    past.advance()
    assert past.with_context(layer, frames[:, :, 3:], 2).flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert past.length == 3


# --- inference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": tokens(0)}, "no speech tokens"),
        ({"token": tokens(LOOKAHEAD), "finalize": False}, "more than 3 tokens"),
        ({"token": tokens(4).expand(2, -1)}, "one utterance"),
        ({"prompt_feat": torch.zeros(1, 0, MELS)}, "or neither"),
        ({"prompt_feat": torch.zeros(1, 9, MELS)}, "need 8 frames of mel, not 9"),
        ({"token": torch.zeros(1, MOST_FRAMES // RATIO - 3, dtype=torch.int64)}, "15002 mel frames"),
    ],
)
def test_inference_refuses(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = build_flow()
    monkeypatch.setattr(flow.encoder, "attend", lambda *_: pytest.fail("refused too late"))
    prompt_token, prompt_feat, embedding = voice(4)
    inputs = {"token": tokens(5), "prompt_token": prompt_token, "prompt_feat": prompt_feat} | change
    lengths = {
        f"{name}_len": torch.tensor([inputs[name].shape[1]]) for name in ("token", "prompt_token", "prompt_feat")
    }
    with pytest.raises(InputError, match=message):
        flow.inference(**inputs, **lengths, embedding=embedding)


def test_the_callers_tensors_are_left_alone_and_nothing_is_drawn() -> None:
    flow, token = build_flow(), tokens(9)
    before, state = token.clone(), torch.get_rng_state()
    first = whole(flow, token, prompt=4)
    assert torch.equal(whole(flow, token, prompt=4), first)
    assert torch.equal(token, before) and torch.equal(torch.get_rng_state(), state)


def test_bfloat16_stays_close_to_float32() -> None:
    flow, token = build_flow(), tokens(2 * CHUNK)
    batch = training_batch()
    exact = loss(flow, batch, streaming=True), whole(flow, token, prompt=4)
    flow.to(torch.bfloat16)
    half = loss(flow, batch, streaming=True), whole(flow, token, prompt=4)
    stream = flow.stream(*voice(4), STEPS)
    before = stream.push(token[:, :7])[:, :, : stream.settled]
    streamed = torch.cat([before, stream.push(token[:, 7:], finalize=True)], dim=2)
    assert {value.dtype for value in (*half, streamed)} == {torch.float32}
    torch.testing.assert_close(half[0], exact[0], rtol=0.02, atol=0)
    for mel in (half[1], streamed):
        assert (mel - exact[1]).abs().mean() < 0.05 * exact[1].abs().mean()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_prepared_flow_stays_close_in_one_piece_and_in_a_stream(precision: str) -> None:
    flow, token = build_flow(), tokens(2 * CHUNK)
    expected = whole(flow, token, prompt=4)
    flow.prepare_inference(precision)
    assert isinstance(flow.decoder.estimator.mid_blocks[0][1][0].ff.net[2], nn.Linear) == (precision == "float32")
    stream = flow.stream(*voice(4), STEPS)
    before = stream.push(token[:, :7])[:, :, : stream.settled]
    streamed = torch.cat([before, stream.push(token[:, 7:], finalize=True)], dim=2)
    for mel in (whole(flow, token, prompt=4), streamed):
        assert (mel - expected).abs().mean() < (1e-5 if precision == "float32" else 0.1) * expected.abs().mean()


# --- training


def test_the_loss_has_the_interface_of_the_first_generations() -> None:
    first, second = (
        list(inspect.signature(flow.loss).parameters) for flow in (MaskedDiffWithXvec, CausalMaskedDiffWithXvec)
    )
    assert second[: len(first)] == first


def test_the_loss_draws_whether_to_attend_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, batch = build_flow(), training_batch()
    by_chunks, full = (loss(flow, batch, streaming=streaming) for streaming in (True, False))
    assert (by_chunks - full).abs() > 1e-6
    random.seed(0)
    found = [loss(flow, batch) for _ in range(12)]
    assert {value.item() for value in found} == {by_chunks.item(), full.item()}
    coins = [causal_flow.draw_streaming() for _ in range(2000)]
    assert 0.45 < sum(coins) / len(coins) < 0.55


def test_the_loss_takes_given_times_and_keeps_conditions_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, batch, times = build_flow(), training_batch(), torch.tensor([0.2, 0.7])
    draw = TrainingDraw(torch.rand(2, 1, 1), torch.randn(2, MELS, 18), torch.tensor([False, True]))
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(flow.decoder, "draw_training", lambda x1: draw)
    flow.decoder.estimator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    loss(flow, batch, times=times, drops_conditions=False, streaming=False)
    loss(flow, batch, streaming=False)
    assert torch.equal(seen[0][3], times) and torch.equal(seen[1][3], draw.t.flatten())
    assert (seen[0][2][0] != 0).any() and (seen[1][2][0] == 0).all()
    known = batch["speech_feat"].transpose(1, 2)
    assert torch.equal(seen[0][5][0, :, :4], known[0, :, :4]) and (seen[0][5][0, :, 4:] == 0).all()


@pytest.mark.parametrize(("token_len", "feat_len"), [([9, 4], [18, 12]), ([9, 6], [18, 9]), ([8, 6], [17, 15])])
def test_the_longer_of_tokens_and_mel_is_cut_to_the_shorter(token_len: list[int], feat_len: list[int]) -> None:
    flow, batch = build_flow(), training_batch()
    lengths = {"speech_token_len": torch.tensor(token_len), "speech_feat_len": torch.tensor(feat_len)}
    cut = torch.tensor([min(n, t // RATIO) for n, t in zip(token_len, feat_len, strict=True)])
    longest = int(cut.max())
    fitting = {
        "speech_token": batch["speech_token"][:, :longest],
        "speech_token_len": cut,
        "speech_feat": batch["speech_feat"][:, : RATIO * longest],
        "speech_feat_len": RATIO * cut,
        "embedding": batch["embedding"],
    }
    for streaming in (False, True):
        found = loss(flow, batch | lengths, streaming=streaming)
        assert torch.equal(found, loss(flow, fitting, streaming=streaming))


def test_a_clip_that_is_too_short_is_named() -> None:
    batch = training_batch() | {"speech_feat_len": torch.tensor([18, 1])}
    with pytest.raises(InputError, match="leave it out"):
        loss(build_flow(), batch)


class TowardsGoal(nn.Module):
    """The velocity that leads all noise to one mel; it keeps what it was asked."""

    in_channels = 4 * MELS

    def __init__(self, goal: Tensor) -> None:
        super().__init__()
        self.goal = goal
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, *conditions: Any, **attention: Any) -> Tensor:
        self.asked.append((x, t))
        return (self.goal - x) / (1 - t[:, None, None])


def test_the_median_flow_goes_to_what_it_predicts_and_sees_nothing_of_the_recording() -> None:
    torch.manual_seed(0)
    goal, recording = torch.randn(2, 1, MELS, 9)
    network = TowardsGoal(goal)
    params = CFM_PARAMS | {"reg_loss_type": "median"}
    decoder = CausalConditionalCFM(3 * MELS, params, n_spks=1, spk_emb_dim=MELS, estimator=network)
    mask = torch.ones(1, 1, 9)
    mask[..., 6:] = 0
    error, y = decoder.compute_loss(recording, mask, goal, goal[..., 0], goal, times=torch.tensor([0.4]))
    assert error.item() == pytest.approx((goal - recording)[..., :6].abs().mean().item(), abs=1e-5)
    (noise, start), (on_the_way, then) = network.asked
    assert (start.item(), then.item()) == (0, pytest.approx(0.4))
    close(on_the_way, 0.6 * noise + 0.4 * goal)
    close(y, on_the_way)


def test_every_weight_is_trained() -> None:
    flow = build_flow()
    random.seed(1)
    torch.manual_seed(1)
    flow(training_batch(), torch.device("cpu"))["loss"].backward()
    untrained = [name for name, weight in flow.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not untrained


def test_it_trains_as_a_part_of_the_joint_model() -> None:
    """Adapters learn, with blocks computed again as without, and nothing else does."""
    changes = [f"flow_lora.{name}" for name in ("lora_r=2", "lora_dropout=0.0")]
    gradients = []
    for recompute in (False, True):
        config = with_changes(JOINT_TRAINING_CONFIG, [*changes, f"recompute={recompute}"])
        torch.manual_seed(5)
        model = JointModel({"flow": build_flow()}, config, 0, torch.zeros(SPEAKER_DIM), ORIGIN)
        model.train()
        loss(model.parts["flow"], training_batch(), streaming=True).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    plain, again = gradients
    assert all(name.endswith(("lora_A", "lora_B")) for name in plain)
    assert all(gradient.any() for name, gradient in plain.items() if name.endswith("lora_B"))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


# --- settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_estimator(channels=[16, 16]), "channels of 2 levels"),
        (lambda: build_estimator(num_decoding_left_chunks=2), "num_decoding_left_chunks 2"),
        (lambda: build_estimator(act_fn="snake"), "CausalConditionalDecoder: act_fn 'snake'"),
        (lambda: build_encoder(use_cnn_module=True), "use_cnn_module=False only"),
        (lambda: build_encoder(macaron_style=True), "macaron_style=False only"),
        (lambda: build_flow(token_mel_ratio=3), "token_mel_ratio 3"),
        (lambda: build_flow(pre_lookahead_len=2), "pre_lookahead_len 2"),
        (lambda: build_flow(output_type="wav"), "output_type 'wav'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


def test_sizes_come_from_the_configuration() -> None:
    encoder = build_encoder(up_ratio=3, pre_lookahead_len=2, num_up_blocks=1)
    flow = build_flow(
        encoder=encoder,
        decoder=build_cfm(build_estimator(static_chunk_size=3 * CHUNK)),
        token_mel_ratio=3,
        pre_lookahead_len=2,
    )
    prompt = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, MELS), torch.ones(1, SPEAKER_DIM)
    stream = flow.stream(*prompt, STEPS)
    assert isinstance(stream, MelStream)
    assert stream.push(tokens(CHUNK + 2)).shape == (1, MELS, 3 * CHUNK) and stream.settled == 3 * CHUNK
    assert len(encoder.up_encoders) == 1


def test_the_yaml_names_the_public_classes() -> None:
    flow = tiny2("flow")
    assert isinstance(flow, CausalMaskedDiffWithXvec)
    assert isinstance(flow.encoder, UpsampleConformerEncoder)
    assert isinstance(flow.decoder, CausalConditionalCFM)
    assert isinstance(flow.decoder.estimator, CausalConditionalDecoder)
    assert flow.input_frame_rate == 25
