"""Prepared weights of language model and flow: float32 is the same mathematics, the others stay close to it."""

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from torch import Tensor, nn

from cosyvoice.cli.model import CosyVoiceModel
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.runtime.command import seed_all
from cosyvoice.runtime.draws import Draws
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.decoding import (
    LEAST_CAPTURED_FRAMES,
    MOST_CAPTURED_FRAMES,
    MOST_IDLE,
    CapturedSteps,
    CapturedStepsPool,
)
from cosyvoice.transformer.precision import (
    LINEARS,
    MANY_FRAMES,
    FineInt8Linear,
    Int8Linear,
    check_precision,
    fastest_precision,
)

CPU = torch.device("cpu")
FRAMES = 300  # more than a cache holds at first
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2, "int8": 3e-2}  # error's norm over the output's


@pytest.fixture(scope="module")
def plain() -> TransformerLM:
    return tiny("llm")


def prepared(llm: TransformerLM, precision: str) -> TransformerLM:
    llm = copy.deepcopy(llm)
    llm.prepare_decoding(precision)
    return llm


@torch.inference_mode()
def log_probabilities(llm: TransformerLM, frames: Tensor) -> Tensor:
    """(N, V) after each of the frames (1, N, C) but the first 20, which are read at once."""
    cache = llm.llm.new_cache()
    parts = [frames[:, :20], *frames[:, 20:].split(1, dim=1)]
    return torch.stack([llm.next_log_probabilities(part, cache) for part in parts])


@pytest.fixture(scope="module")
def frames(plain: TransformerLM) -> Tensor:
    return torch.randn(1, FRAMES, plain.llm_embedding.embedding_dim, generator=torch.Generator().manual_seed(0))


def test_prepared_float32_is_the_plain_stack(plain: TransformerLM, frames: Tensor) -> None:
    found, expected = (log_probabilities(llm, frames) for llm in (prepared(plain, "float32"), plain))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-6)


@torch.inference_mode()
def test_a_second_sentence_decodes_like_the_first(plain: TransformerLM, frames: Tensor) -> None:
    """The distances that a long sentence has added serve the next one."""
    llm = prepared(plain, "float32")
    first = log_probabilities(llm, frames)
    assert llm.llm.encoders[0].self_attn.positions.size(2) >= FRAMES
    assert torch.equal(log_probabilities(llm, frames), first)


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_inputs_in_14_bits_lose_nothing_beside_the_weights(bias: bool) -> None:
    """Also where one of them is a hundred times the others, which leaves 7 bits little of these."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    x = torch.randn(2, 1, 96, generator=generator)
    x[:, :, 5] = 100
    scales = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = nn.functional.linear(x, (linear.weight / scales).round() * scales, linear.bias)
    coarse, fine = (form(linear)(x) - rounded for form in (Int8Linear, FineInt8Linear))
    assert fine.norm() < 1e-3 * rounded.norm()
    assert 30 * fine.norm() < coarse.norm()
    zeros = torch.zeros(1, 96)
    torch.testing.assert_close(FineInt8Linear(linear)(zeros), linear(zeros), atol=1e-6, rtol=1e-6)


def with_captured_steps(llm: TransformerLM) -> TransformerLM:
    """What `prepare_decoding` makes on a GPU; on a CPU the steps are computed instead of replayed."""
    llm = prepared(llm, "float32")
    llm.captured = CapturedStepsPool(llm.llm, llm.speech_embedding, llm.llm_decoder)
    return llm


@torch.inference_mode()
def test_steps_for_a_graph_are_the_same_mathematics(plain: TransformerLM, frames: Tensor) -> None:
    """Also in a cache that another sequence has filled before."""
    llm, sent = with_captured_steps(plain), torch.arange(FRAMES) % plain.speech_token_size
    found, expected = (model.following(frames[:, :20], FRAMES) for model in (llm, prepared(plain, "float32")))
    for _ in range(2):
        torch.testing.assert_close(next(found), next(expected), atol=1e-5, rtol=1e-5)
        for token in sent.tolist():
            torch.testing.assert_close(found.send(token), expected.send(token), atol=1e-5, rtol=1e-5)
        found.close()
        found, expected = (model.following(frames[:, 30:35], FRAMES) for model in (llm, prepared(plain, "float32")))


@pytest.mark.parametrize("start", [250, 508, 1018])
@torch.inference_mode()
def test_a_step_attends_to_as_many_rows_as_the_shortest_graph_that_holds_it(plain: TransformerLM, start: int) -> None:
    """The numbers are those of the eager step on both sides of each boundary; the rows beyond are not read at all."""
    llm, boundary = with_captured_steps(plain), 1 << start.bit_length()
    prefix = torch.randn(1, start, plain.llm_embedding.embedding_dim, generator=torch.Generator().manual_seed(1))
    eager = prepared(plain, "float32").following(prefix, 12)
    next(eager)
    with llm.captured.lent(start + 12) as steps:
        llm.next_log_probabilities(prefix, steps.cache)
        for layer_cache in steps.cache:
            layer_cache.keys[:, :, boundary:] = layer_cache.values[:, :, boundary:] = torch.nan
        for place in range(start, start + 12):
            assert steps.rows_for(place) == (boundary if place < boundary else 2 * boundary)
            if place == boundary:
                for layer_cache in steps.cache:
                    layer_cache.keys[:, :, boundary:] = layer_cache.values[:, :, boundary:] = 0
            torch.testing.assert_close(steps.after(place % 7), eager.send(place % 7), atol=1e-5, rtol=1e-5)
        whole = steps.compute(steps.capacity)  # the same step again, over all rows
        torch.testing.assert_close(steps.compute(2 * boundary), whole, atol=1e-5, rtol=1e-5)


class FakeCuda:
    """Stands for what a capture uses of torch.cuda; a graph computes when it is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.captured, self.fails = "the thread's", 0, False
        for name in ("Stream", "current_stream", "stream", "set_stream", "CUDAGraph", "graph", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None, name=self.current)

    def set_stream(self, stream: SimpleNamespace) -> None:
        self.current = stream.name

    def stream(self, stream: SimpleNamespace) -> nullcontext:
        return nullcontext()

    def device(self, device: torch.device) -> nullcontext:
        return nullcontext()

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: None)

    @contextmanager
    def graph(self, graph: SimpleNamespace, stream: SimpleNamespace, capture_error_mode: str) -> Iterator[None]:
        self.current = "the other"
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield
        self.captured += 1


@torch.inference_mode()
def test_graphs_are_captured_when_they_are_needed_and_once(
    plain: TransformerLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, cuda = with_captured_steps(plain), FakeCuda(monkeypatch)
    prefix = torch.randn(1, 250, plain.llm_embedding.embedding_dim)
    for _ in range(2):
        with llm.captured.lent(300) as steps:
            steps.replays = True
            llm.next_log_probabilities(prefix, steps.cache)
            for place in range(250, 260):
                steps.after(1)
                assert sorted(steps.graphs) == ([256] if place < 256 and cuda.captured == 1 else [256, 512])
    assert cuda.captured == 2 and len(steps.graphs) == 2


@torch.inference_mode()
def test_a_capture_that_fails_is_tried_again_by_the_next_sentence(
    plain: TransformerLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, cuda = with_captured_steps(plain), FakeCuda(monkeypatch)
    cuda.fails = True
    with pytest.raises(torch.OutOfMemoryError), llm.captured.lent(10) as steps:
        steps.replays = True
        steps.after(1)
    assert cuda.current == "the thread's" and not steps.graphs
    cuda.fails = False
    with llm.captured.lent(10) as again:
        again.after(1)
    assert again is steps and list(steps.graphs) == [256] and cuda.current == "the thread's"


@torch.inference_mode()
def test_sequences_at_the_same_time_have_steps_of_their_own(plain: TransformerLM, frames: Tensor) -> None:
    llm = with_captured_steps(plain)
    alone = llm.following(frames[:, :20], 10)
    expected = [next(alone), *(alone.send(token) for token in (1, 2, 3))]
    alone.close()
    first, other = (llm.following(part, 10) for part in (frames[:, :20], frames[:, 20:50]))
    found = [next(first)]
    next(other)
    for token in (1, 2, 3):
        found.append(first.send(token))
        other.send(token + 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    first.close()
    other.close()
    assert len(llm.captured.idle) == 2
    with llm.captured.lent(2 * LEAST_CAPTURED_FRAMES + 1) as longer:
        assert longer.capacity == 4 * LEAST_CAPTURED_FRAMES
    assert llm.captured.idle == [longer]  # it serves shorter ones too
    longest = llm.following(frames[:, :20], MOST_CAPTURED_FRAMES)
    assert torch.equal(next(longest), expected[0])
    assert llm.captured.idle == [longer]


@torch.inference_mode()
def test_many_threads_get_steps_of_their_own_and_few_are_kept(plain: TransformerLM) -> None:
    pool, threads = with_captured_steps(plain).captured, 3 * MOST_IDLE
    all_hold, taken = threading.Barrier(threads), []

    def hold(number: int) -> None:
        for _ in range(5):
            with pool.lent(10 + number) as steps:
                all_hold.wait(timeout=60)
                taken.append(steps)
                all_hold.wait(timeout=60)

    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(hold, range(threads)))
    for start in range(0, len(taken), threads):
        assert len(set(map(id, taken[start : start + threads]))) == threads
    assert len(pool.idle) == MOST_IDLE


@torch.inference_mode()
def test_a_text_by_itself_is_written_with_captured_steps(plain: TransformerLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets the tokens that it gets in company, since each text has its own draws."""
    llm, taken = with_captured_steps(plain), []
    after = CapturedSteps.after
    monkeypatch.setattr(CapturedSteps, "after", lambda steps, token: taken.append(token) or after(steps, token))
    texts, embedding = [torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7]])], torch.ones(1, 192)
    (alone,) = llm.inference_together(texts[:1], embedding, [Draws(1)])
    assert len(taken) >= len(alone) - 1 > 0
    del taken[:]
    assert llm.inference_together(texts, embedding, [Draws(1), Draws(2)])[0] == alone
    assert not taken


@torch.inference_mode()
def test_a_sequence_of_nans_leaves_nothing_to_the_next(plain: TransformerLM, frames: Tensor) -> None:
    llm = with_captured_steps(plain)

    def written() -> list[Tensor]:
        sequence = llm.following(frames[:, :20], 10)
        found = [next(sequence), *(sequence.send(token) for token in (1, 2, 3))]
        sequence.close()
        return found

    expected = written()
    broken = llm.following(frames * torch.nan, 10)
    next(broken)
    broken.close()
    assert all(torch.equal(a, b) for a, b in zip(written(), expected, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", LINEARS)
@torch.inference_mode()
def test_a_product_in_each_precision(precision: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48, bias=bias), torch.randn(1, 3, 64)
    nn.init.zeros_(linear.weight[0])  # a row of zeros has no largest value to be scaled by
    expected = linear(x)
    error = LINEARS[precision](linear)(x) - expected
    assert error.norm() <= TOLERANCE[precision] * expected.norm()
    assert precision == "float32" or error.norm() > 0


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_fewer_bits_stay_close(plain: TransformerLM, frames: Tensor, precision: str) -> None:
    found, expected = (log_probabilities(llm, frames) for llm in (prepared(plain, precision), plain))
    assert found.isfinite().all()
    spread = (expected - expected.mean(dim=1, keepdim=True)).norm()
    assert 0 < (found - expected).norm() < 2 * TOLERANCE[precision] * spread
    best = expected.topk(5, dim=1).indices
    assert (found.argmax(dim=1, keepdim=True) == best).any(dim=1).float().mean() > 0.95


@pytest.mark.parametrize("precision", MANY_FRAMES)
@torch.inference_mode()
def test_a_prepared_velocity_network_stays_close(precision: str) -> None:
    torch.manual_seed(0)
    plain = tiny("flow").decoder.estimator
    network = copy.deepcopy(plain)
    network.prepare_inference(MANY_FRAMES[precision])
    x, mask = torch.randn(3, 2, 80, 33), torch.ones(2, 1, 33)
    inputs = (x[0], mask, x[1], torch.rand(2), torch.randn(2, 80), x[2])
    found, expected = network(*inputs), plain(*inputs)
    exact = MANY_FRAMES[precision] is LINEARS["float32"]
    assert (found - expected).norm() <= (TOLERANCE["float32"] if exact else TOLERANCE[precision]) * expected.norm()
    assert exact or (found - expected).norm() > 0


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_prepared_model_speaks(plain: TransformerLM, precision: str) -> None:
    llm, none, speaker = prepared(plain, precision), torch.zeros(1, 0, dtype=torch.int64), torch.randn(1, 192)
    text, empty = torch.arange(3).unsqueeze(0), torch.tensor([0])
    torch.manual_seed(0)
    tokens = list(llm.inference(text, torch.tensor([3]), none, empty, none, empty, speaker))
    assert 6 <= len(tokens) <= 60 and all(0 <= token < llm.speech_token_size for token in tokens)


@pytest.mark.parametrize(
    ("pace", "text_tokens", "most"),
    [
        (None, 30, 600),
        (4.0, 30, 180),
        (4.0, 3, 60),  # 20 a text token: the model's own
        (4.0, 9, 60),  # as 10 text tokens
        (20.0, 30, 600),  # the model's own
        (0.5, 30, 60),  # the model's least
    ],
)
def test_a_voice_that_talks_on_is_cut(
    plain: TransformerLM, monkeypatch: pytest.MonkeyPatch, pace: float | None, text_tokens: int, most: int
) -> None:
    """By the pace of its speaker, in all ways of writing."""
    llm, text = prepared(plain, "float32"), torch.arange(text_tokens).unsqueeze(0)
    llm.pace = pace
    assert llm.bounds(text) == (2 * text_tokens, most)
    monkeypatch.setattr(llm, "choose", lambda log_p, tokens, least, sampling: 7)  # never the end
    none, empty, speaker = text[:, :0], torch.tensor([0]), torch.randn(1, 192)
    written = llm.inference(text, torch.tensor([text_tokens]), none, empty, none, empty, speaker)
    assert len(list(written)) == most
    assert len(llm.best_take(text, none, none, speaker)) == most
    assert [len(tokens) for tokens in llm.inference_together([text], speaker, [nullcontext()])] == [most]


@pytest.mark.parametrize("takes", [1, 3])
def test_texts_written_together_get_the_tokens_that_each_gets_alone(plain: TransformerLM, takes: int) -> None:
    llm, none, speaker = prepared(plain, "float32"), torch.zeros(1, 0, dtype=torch.int64), torch.randn(1, 192)
    llm.takes = takes
    texts, empty = [torch.arange(length).unsqueeze(0) for length in (5, 2, 9)], torch.tensor([0])
    alone = []
    for number, text in enumerate(texts):
        seed_all(number)
        if takes == 1:
            length = torch.tensor([text.size(1)])
            alone.append(list(llm.inference(text, length, none, empty, none, empty, speaker)))
        else:
            alone.append(llm.best_take(text, none, none, speaker))
    together = llm.inference_together(texts, speaker, [Draws(number) for number in range(3)])
    assert together == alone and len({len(tokens) for tokens in alone}) == 3


@torch.inference_mode()
def test_the_likeliest_take_is_spoken(plain: TransformerLM) -> None:
    """Three takes are what three texts with shared draws get; a teacher-forced pass tells how likely each is."""
    llm, text, speaker = prepared(plain, "float32"), torch.arange(4).unsqueeze(0), torch.randn(1, 192)
    length, bounds, found = torch.tensor([4]), (8, 80), []
    for seed in range(6):
        seed_all(seed)
        prefix = llm.inference_prefix(text, text[:, :0], text[:, :0], speaker)
        takes = llm.likeliest([prefix] * 3, [bounds] * 3, [nullcontext()] * 3, sampling=25, takes=1)
        merits = []
        for tokens in takes:
            sizes = {"text_token_len": length, "speech_token_len": torch.tensor([len(tokens)])}
            batch = {"text_token": text, "speech_token": torch.tensor([tokens]), "embedding": speaker} | sizes
            ended = len(tokens) < bounds[1]
            scores, classes, *_ = plain.predictions(batch, CPU)
            count = len(tokens) + ended
            merits.append((ended, -nn.functional.cross_entropy(scores[:count], classes[:count]).item()))
        best = max(range(3), key=merits.__getitem__)
        seed_all(seed)
        assert llm.likeliest([prefix], [bounds], [nullcontext()], sampling=25, takes=3) == [takes[best]]
        found.append(best)
    assert len({*found}) > 1


@pytest.mark.parametrize("ending", [0, 1])
def test_a_take_that_does_not_end_is_not_spoken(
    plain: TransformerLM, monkeypatch: pytest.MonkeyPatch, ending: int
) -> None:
    llm = prepared(plain, "float32")
    chosen = iter([7, 7, *((llm.speech_token_size, 7) if ending == 0 else (7, llm.speech_token_size)), 7])
    monkeypatch.setattr(llm, "choose", lambda *_: next(chosen))
    prefix = torch.randn(1, 5, llm.llm_embedding.embedding_dim)
    with torch.inference_mode():
        assert llm.likeliest([prefix], [(0, 3)], [nullcontext()], sampling=25, takes=2) == [[7]]


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        ("int4", "cpu", "unknown precision 'int4'; give one of float32, float16, bfloat16, int8"),
        ("int8", "cuda", "precision int8 is for the CPU; use float32 or float16 on cuda"),
        ("bfloat16", "cuda", "precision bfloat16 is for the CPU; use float32 or float16 on cuda"),
        ("bfloat16", "cpu", "bfloat16: this processor has no instructions"),
    ],
)
def test_precisions_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, message: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(InputError, match=message):
        check_precision(precision, torch.device(device))
    check_precision("float32", torch.device(device))


def test_a_gpu_takes_half_precision_where_it_is_asked_for() -> None:
    check_precision("float16", torch.device("cuda"))
    assert fastest_precision(torch.device("cuda")) == "float32"


@torch.inference_mode()
def test_half_precision_on_a_gpu_is_that_of_whole_modules(
    plain: TransformerLM, frames: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried on the CPU: all weights of language model and flow are float16, and what they compute stays close."""
    monkeypatch.setattr("cosyvoice.transformer.precision.is_on_gpu", lambda module: True)
    model = CosyVoiceModel(tiny("llm"), tiny("flow"), tiny("hift"), device="cpu", precision="float16")
    model.load(*(tiny(part).state_dict() for part in ("llm", "flow", "hift")))
    llm, flow = model.llm, model.flow
    assert {weight.dtype for part in (llm, flow) for weight in part.parameters()} == {torch.float16}
    assert {weight.dtype for weight in model.hift.parameters()} == {torch.float32}
    expected = log_probabilities(plain, frames)
    llm.captured = CapturedStepsPool(llm.llm, llm.speech_embedding, llm.llm_decoder)
    for found in (log_probabilities(llm, frames.half()), log_probabilities(llm, frames[:, :30].half())):
        spread = (expected - expected.mean(dim=1, keepdim=True)).norm()
        assert found.dtype == torch.float32 and found.isfinite().all()
        assert 0 < (found - expected[: len(found)]).norm() < 0.02 * spread
    speaker, text = torch.ones(1, 192), torch.arange(3).unsqueeze(0)
    for speech in model.tts_together([text, text[:, :2]], speaker, [Draws(1), Draws(2)]):
        assert speech.dtype == torch.float32 and speech.isfinite().all()
    (speech,) = model.tts(text=text, flow_embedding=speaker, llm_embedding=speaker)
    assert speech["tts_speech"].dtype == torch.float32 and speech["tts_speech"].isfinite().all()
    pieces = list(
        model.tts(text=torch.arange(60).unsqueeze(0), flow_embedding=speaker, llm_embedding=speaker, stream=True)
    )
    assert len(pieces) > 1 and all(piece["tts_speech"].isfinite().all() for piece in pieces)


def test_fp16_is_another_word_for_half_precision_and_changes_nothing_on_a_cpu() -> None:
    model = CosyVoiceModel(tiny("llm"), tiny("flow"), tiny("hift"), device="cpu", fp16=True)
    assert not model.fp16 and model.precision == "float32"


@pytest.mark.parametrize(
    ("device", "engines", "fastest"),
    [("cpu", ["none", "fbgemm"], "int8"), ("cpu", ["none", "qnnpack"], "float32"), ("cuda", ["fbgemm"], "float32")],
)
def test_the_fastest_precision_is_one_that_can_be(
    monkeypatch: pytest.MonkeyPatch, device: str, engines: list[str], fastest: str
) -> None:
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=engines))
    assert fastest_precision(torch.device(device)) == fastest
    check_precision(fastest, torch.device(device))


def test_the_model_refuses_before_it_loads() -> None:
    with pytest.raises(InputError, match="unknown precision"):
        CosyVoiceModel(tiny("llm"), tiny("flow"), tiny("hift"), device="cpu", precision="float64")
