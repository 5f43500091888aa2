"""Captured decoding steps, half precision and streams on a GPU, against eager steps and the CPU."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from models import tiny
from torch import Tensor

from config import MINI_NAME, PROJECT_DIR
from cosyvoice.cli.cosyvoice import CosyVoice
from cosyvoice.cli.model import CosyVoiceModel
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.runtime.draws import Draws
from cosyvoice.transformer.decoding import CapturedSteps

TOKENS = 200
PREFIX = 100  # so that the tokens pass the end of the first graph, at 256
TOLERANCE = {"float32": 1e-4, "float16": 0.1}  # of log-probabilities, which are down to -80
SHIPPED = PROJECT_DIR / "pretrained_models" / MINI_NAME
THREADS = 8


@pytest.fixture(params=TOLERANCE)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def llm(gpu: torch.device, precision: str) -> TransformerLM:
    llm = tiny("llm").to(gpu)
    llm.prepare_decoding(precision)
    return llm


@pytest.fixture
def model(gpu: torch.device, precision: str) -> CosyVoiceModel:
    parts = ("llm", "flow", "hift")
    model = CosyVoiceModel(*map(tiny, parts), device=gpu, precision=precision)
    model.load(*(tiny(part).state_dict() for part in parts))
    return model


def eager(llm: TransformerLM) -> TransformerLM:
    """The same weights without graphs."""
    other = copy.copy(llm)
    other.captured = None
    return other


@torch.inference_mode()
def written(llm: TransformerLM, seed: int, tokens: int = TOKENS) -> Tensor:
    """(N + 1, V): log-probabilities after a random prefix, and after each of the tokens that follow."""
    draw = torch.Generator().manual_seed(seed)
    weight = llm.speech_embedding.weight
    prefix = torch.randn(1, PREFIX, weight.size(1), generator=draw).to(weight)
    sent = torch.randint(0, llm.speech_token_size, (tokens,), generator=draw).tolist()
    with closing(llm.following(prefix, tokens)) as steps:
        return torch.stack([next(steps).cpu(), *(steps.send(token).cpu() for token in sent)])


def assert_near(found: Tensor, expected: Tensor, precision: str) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE[precision], rtol=0)


def test_captured_steps_give_the_numbers_of_eager_ones(llm: TransformerLM, precision: str) -> None:
    for seed in range(2):  # the second replays what the first has captured
        assert_near(written(llm, seed), written(eager(llm), seed), precision)
    (steps,) = llm.captured.idle
    assert sorted(steps.graphs) == [256, 512]


def test_a_gpu_gives_the_numbers_of_the_cpu(llm: TransformerLM, precision: str) -> None:
    plain = tiny("llm")
    plain.prepare_decoding("float32")
    assert_near(written(llm, 0), written(plain, 0), precision)


def side_by_side(work: Callable[[int], Tensor]) -> list[Tensor]:
    """The results of `work` of each of many threads, which begin together, each on a stream of its own."""
    begin = threading.Barrier(THREADS)

    def run(number: int) -> Tensor:
        begin.wait(timeout=60)
        with torch.cuda.stream(torch.cuda.Stream()):
            return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def test_threads_on_streams_of_their_own_capture_and_replay_side_by_side(llm: TransformerLM, precision: str) -> None:
    expected = [written(eager(llm), number) for number in range(THREADS)]
    for _ in range(2):
        for found, alone in zip(side_by_side(lambda number: written(llm, number)), expected, strict=True):
            assert_near(found, alone, precision)


def mel(model: CosyVoiceModel, seed: int) -> Tensor:
    """(1, 80, T) of random tokens, by the flow alone."""
    device = model.device
    tokens = torch.randint(0, 100, (1, 50), generator=torch.Generator().manual_seed(seed)).to(device)
    lengths, none = torch.tensor([[50], [0]], device=device), tokens[:, :0]
    no_mel, speaker = torch.zeros(1, 0, 80, device=device), torch.ones(1, 192, device=device)
    with Draws(seed):
        return model.flow.inference(tokens, lengths[0], none, lengths[1], no_mel, lengths[1], speaker, None)[0].cpu()


def test_a_capture_beside_another_threads_flow(model: CosyVoiceModel, precision: str) -> None:
    """Neither changes the other's numbers."""
    steps, sounds, done = written(eager(model.llm), 0), mel(model, 0), threading.Event()

    def go_on() -> list[Tensor]:
        found = [mel(model, 0)]
        while not done.is_set():
            found.append(mel(model, 0))
        return found

    with ThreadPoolExecutor(1) as other:
        beside = other.submit(go_on)
        try:
            for _ in range(5):
                model.llm.captured.idle.clear()  # captured anew
                assert_near(written(model.llm, 0), steps, precision)
        finally:
            done.set()
        for found in beside.result():
            torch.testing.assert_close(found, sounds, atol=1e-3 if precision == "float32" else 0.05, rtol=0)


def test_a_stream_that_is_closed_early_leaves_the_model_as_it_was(model: CosyVoiceModel) -> None:
    speaker = torch.ones(1, 192)

    def stream() -> list[Tensor]:
        torch.manual_seed(0)
        voice = {"flow_embedding": speaker, "llm_embedding": speaker}
        pieces = model.tts(text=torch.arange(80).unsqueeze(0), stream=True, **voice)
        with closing(pieces):
            return [next(pieces)["tts_speech"]]

    first, threads = stream(), threading.active_count()
    second = stream()
    assert first[0].isfinite().all() and first[0].shape == second[0].shape
    assert threading.active_count() == threads
    (whole,) = model.tts(text=torch.arange(5).unsqueeze(0), flow_embedding=speaker, llm_embedding=speaker)
    assert whole["tts_speech"].isfinite().all()


def test_a_failed_capture_leaves_the_thread_on_its_stream_and_the_next_sentence_works(
    llm: TransformerLM, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, before, expected = CapturedSteps.compute, torch.cuda.current_stream(), written(eager(llm), 0)

    def waits(steps: CapturedSteps, rows: int) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            steps.token.item()  # which no capture may do
        return compute(steps, rows)

    with monkeypatch.context() as broken:
        broken.setattr(CapturedSteps, "compute", waits)
        with pytest.raises(RuntimeError):
            written(llm, 0)
    assert torch.cuda.current_stream() == before
    assert_near(written(llm, 0), expected, precision)


def test_the_small_models_tokens_are_those_of_the_cpu(gpu: torch.device) -> None:
    found = []
    for device in ("cpu", str(gpu)):
        cosyvoice = CosyVoice(SHIPPED, device=device, precision="float32")
        text = cosyvoice.frontend.frontend_sft("The old man walks to the market.", "kumo")["text"].to(device)
        embedding = cosyvoice.frontend.spk2info["kumo"]["embedding"].to(device)
        found.append(cosyvoice.model.llm.inference_together([text], embedding, [Draws(0)]))
    assert found[0] == found[1]


def test_the_small_model_speaks_in_half_precision(gpu: torch.device) -> None:
    cosyvoice = CosyVoice(SHIPPED, device=str(gpu), fp16=True)
    assert {weight.dtype for weight in cosyvoice.model.llm.parameters()} == {torch.float16}
    torch.manual_seed(0)
    (piece,) = cosyvoice.inference_sft("The old man walks to the market.", "kumo")
    assert 1 < piece["tts_speech"].size(1) / cosyvoice.sample_rate < 4 and piece["tts_speech"].isfinite().all()
