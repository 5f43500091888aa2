"""CosyVoice2's tokens to speech, in one piece and in streams, against recorded numbers and chunk schedules."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity import V2, assert_close
from tiny2 import tiny2_model_dir
from torch import Tensor, nn

from cosyvoice.cli.cosyvoice import AutoModel
from cosyvoice.cli.model import CosyVoice2Model
from cosyvoice.utils.common import fade_in_out

MEL = {"atol": 3e-4}
SOURCE = {"atol": 1e-3}
WAVE = {"atol": 2e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CosyVoice2Model:
    return AutoModel(model_dir=tiny2_model_dir(tmp_path_factory.mktemp("model")), device="cpu").model


class Heard:
    """What the vocoder of a model gets, and what it returns, while the context lasts."""

    def __init__(self, model: CosyVoice2Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mels: list[Tensor] = []
        self.sources: list[Tensor] = []
        inference = model.hift.inference

        def hift(speech_feat: Tensor, cache_source: Tensor) -> tuple[Tensor, Tensor]:
            speech, source = inference(speech_feat, cache_source)
            self.mels.append(speech_feat.clone())
            self.sources.append(source.clone())
            return speech, source

        monkeypatch.setattr(model.hift, "inference", hift)


def spoken(case: dict[str, Tensor], prefix: str = "prompt/") -> dict[str, Tensor]:
    prompt = {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}
    return {"source_speech_token": case["source_tokens"], "flow_embedding": case["flow_embedding"], **prompt}


def assert_chunks(name: str, case: dict[str, Tensor], heard: Heard, speech: list[Tensor]) -> None:
    numbers = V2.meta(name)
    assert [piece.shape[1] for piece in speech] == numbers["chunk_samples"]
    for i, piece in enumerate(speech):
        assert_close(heard.mels[i], case[f"chunk{i}/hift_mel"], **MEL)
        assert_close(heard.sources[i], case[f"chunk{i}/source"], **SOURCE)
        assert_close(piece, case[f"chunk{i}/wav"], **WAVE)


@pytest.mark.parametrize("name", V2.cases("stream_*") + V2.cases("whole_*"))
def test_parity2_given_tokens(name: str, model: CosyVoice2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With full attention in the last chunk, as the public code computes it."""
    monkeypatch.setattr(model, "last_chunk_sees_all", True)
    case, numbers, heard = V2.arrays(name), V2.meta(name), Heard(model, monkeypatch)
    torch.manual_seed(numbers["seed"])
    speech = [piece["tts_speech"] for piece in model.tts(**spoken(case), stream=numbers["stream"])]
    assert_chunks(name, case, heard, speech)


@pytest.mark.parametrize("name", V2.cases("stream_*"))
def test_parity2_what_one_chunk_leaves_for_the_next(name: str, model: CosyVoice2Model) -> None:
    case, numbers = V2.arrays(name), V2.meta(name)
    prompt_token = case.get("prompt/flow_prompt_speech_token", torch.zeros(1, 0, dtype=torch.int32))
    prompt_feat = case.get("prompt/prompt_speech_feat", torch.zeros(1, 0, 80))
    session = model.new_session()
    torch.manual_seed(numbers["seed"])
    first = case["source_tokens"][:, : numbers["tokens_given"][0]]
    model.token2wav(first, prompt_token, prompt_feat, case["flow_embedding"], session)
    assert_close(session.mel, case["chunk0/cache/mel"], **MEL)
    assert_close(session.source, case["chunk0/cache/source"], **SOURCE)
    assert_close(session.speech, case["chunk0/cache/speech"], **WAVE)


@pytest.mark.usefixtures("as_recorded")
@pytest.mark.parametrize("name", V2.cases("tts_speed*"))
def test_parity2_text_to_speech_in_one_piece(
    name: str, model: CosyVoice2Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, numbers, heard = V2.arrays(name), V2.meta(name), Heard(model, monkeypatch)
    tokens: list[Tensor] = []
    next_mel = model.next_mel
    monkeypatch.setattr(model, "next_mel", lambda token, *rest: (tokens.append(token), next_mel(token, *rest))[1])
    inputs = {
        "text": case["in/text"],
        "prompt_text": case["in/prompt_text"],
        "llm_prompt_speech_token": case["in/prompt_speech_token"],
        "flow_prompt_speech_token": case["in/prompt_speech_token"],
        "prompt_speech_feat": case["in/prompt_speech_feat"],
        "llm_embedding": case["in/embedding"],
        "flow_embedding": case["in/flow_embedding"],
    }
    torch.manual_seed(numbers["seed"])
    speech = [piece["tts_speech"] for piece in model.tts(**inputs, speed=numbers["speed"])]
    assert torch.equal(tokens[0], case["token"])
    assert_chunks(name, case, heard, speech)


@pytest.mark.parametrize("name", V2.cases("windows"))
def test_parity2_windows(name: str, model: CosyVoice2Model) -> None:
    case, numbers = V2.arrays(name), V2.meta(name)
    for key in ("token_hop_len", "token_max_hop_len", "stream_scale_factor", "mel_cache_len", "source_cache_len"):
        assert getattr(model, key) == numbers[key]
    assert (model.flow.pre_lookahead_len, model.flow.token_mel_ratio) == (
        numbers["pre_lookahead_len"],
        numbers["token_mel_ratio"],
    )
    assert_close(model.speech_window, case["speech_window"], atol=1e-7)
    assert_close(
        fade_in_out(case["fade/in"], case["fade/out_tail"], model.speech_window), case["fade/result"], atol=1e-6
    )


class SilentFlow(nn.Module):
    """Right shapes, no work, and a list of what was asked."""

    input_frame_rate, pre_lookahead_len, token_mel_ratio = 25, 3, 2
    encoder = SimpleNamespace(static_chunk_size=25)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, bool]] = []  # tokens so far, and whether attention goes by chunks
        self.settled = 0

    def inference(self, token: Tensor, *_: Any) -> tuple[Tensor, None]:
        self.asked.append((token.shape[1], False))
        return torch.zeros(1, 80, 2 * token.shape[1]), None

    def stream(self, prompt_token: Tensor, *_: Any) -> "SilentFlow":
        self.given = 0
        return self

    def push(self, token: Tensor, finalize: bool) -> Tensor:
        self.given += token.shape[1]
        self.asked.append((self.given, True))
        before, self.settled = self.settled, 2 * (self.given - (0 if finalize else 3))
        return torch.zeros(1, 80, self.settled - before)


@pytest.mark.parametrize("sees_all", [False, True])
def test_parity2_a_session_keeps_tokens_only_for_a_last_chunk_that_sees_all(sees_all: bool) -> None:
    model = CosyVoice2Model(Counting(0), SilentFlow(), SilentVocoder(), device="cpu")
    model.last_chunk_sees_all = sees_all
    session = model.new_session()
    token = torch.zeros(1, 28, dtype=torch.int64)
    voice = torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 0, 80), torch.zeros(1, 192)
    model.next_mel(token, *voice, session, finalize=False)
    watched = weakref.ref(token)
    del token
    assert (watched() is not None) == sees_all


class SilentVocoder(nn.Module):
    samples_per_frame = 480

    def inference(self, speech_feat: Tensor, cache_source: Tensor) -> tuple[Tensor, Tensor]:
        samples = 480 * speech_feat.shape[2]
        return torch.zeros(1, samples), torch.zeros(1, 1, samples)


class Counting(nn.Module):
    """A language model that says 0, 1, 2, ... as many times as it is told."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def inference(self, *_: Any) -> Iterator[int]:
        yield from range(self.count)


def schedules() -> list[dict[str, Any]]:
    if not (V2.folder / "stream_schedule.json").is_file():
        return []
    # the second call of the public code starts with the hop that the first one grew to, which is a fault
    return [case for case in V2.table("stream_schedule")["cases"] if case["call"] == 1]


@pytest.mark.parametrize("live", [False, True], ids=["given tokens", "language model"])
@pytest.mark.parametrize("plan", schedules(), ids=lambda plan: f"{plan['tokens']}-{plan['prompt_tokens']}")
def test_parity2_schedule(plan: dict[str, Any], live: bool) -> None:
    prompt = {
        "flow_prompt_speech_token": torch.zeros(1, plan["prompt_tokens"], dtype=torch.int32),
        "prompt_speech_feat": torch.zeros(1, 2 * plan["prompt_tokens"], 80),
    }
    given = {} if live else {"source_speech_token": torch.arange(plan["tokens"])[None]}
    for _ in range(2):  # the second utterance starts as the first one did
        flow = SilentFlow()
        model = CosyVoice2Model(Counting(plan["tokens"]), flow, SilentVocoder(), device="cpu")
        model.last_chunk_sees_all = True
        samples = sum(piece["tts_speech"].shape[1] for piece in model.tts(**given, **prompt, stream=True))
        assert flow.asked == list(zip(plan["given"], plan["chunked"], strict=True))
        assert samples == 960 * plan["tokens"]
