"""What CosyVoice2's API promises beyond the recorded numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model_dir
from parity import V2
from tiny2 import tiny2_model_dir
from torch import Tensor

from cosyvoice.cli.cosyvoice import AutoModel, CosyVoice, CosyVoice2, CosyVoice3
from cosyvoice.runtime.draws import Draws
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import read_json_lists, read_lists

TEXT = "hello, this is a test of the small voice."
HOP_SAMPLES, FADE_SAMPLES = 25 * 960, 3840


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny2_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
def voice(model_dir: Path) -> CosyVoice2:
    return AutoModel(model_dir=str(model_dir), device="cpu")


@pytest.fixture(scope="module")
def prompt() -> str:
    return str(V2.folder / "prompt_a.wav")


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(6561, (1, count), generator=torch.Generator().manual_seed(seed))


def given(count: int, prompt_tokens: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Tokens to speak, with a prompt of noise."""
    random = torch.Generator().manual_seed(seed + 1)
    return {
        "source_speech_token": tokens(count, seed),
        "flow_embedding": torch.randn(1, 192, generator=random),
        "flow_prompt_speech_token": torch.randint(6561, (1, prompt_tokens), generator=random),
        "prompt_speech_feat": torch.randn(1, 2 * prompt_tokens, 80, generator=random),
    }


def streamed(voice: CosyVoice2, seed: int = 0, **inputs: Tensor) -> Iterator[Tensor]:
    """The pieces of a stream, each drawn as if nothing else were spoken in between."""
    draws = Draws(seed)
    stream = voice.model.tts(**inputs, stream=True)
    while True:
        with draws:
            piece = next(stream, None)
        if piece is None:
            return
        yield piece["tts_speech"]


def mels_of(voice: CosyVoice2, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The mel that each later chunk adds."""
    mels, next_mel = [], voice.model.next_mel

    def noted(*arguments: Any) -> Tensor:
        mels.append(next_mel(*arguments))
        return mels[-1]

    monkeypatch.setattr(voice.model, "next_mel", noted)
    return mels


@pytest.mark.parametrize("prompt_tokens", [0, 18])
def test_a_stream_goes_on_exactly_to_its_end(
    voice: CosyVoice2, prompt_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mels, inputs = mels_of(voice, monkeypatch), given(120, prompt_tokens)
    chunks = list(streamed(voice, **inputs))
    assert sum(chunk.shape[1] for chunk in chunks) == 120 * 960
    voice_inputs = [inputs[name] for name in ("flow_prompt_speech_token", "prompt_speech_feat", "flow_embedding")]
    length = torch.tensor([0])  # follows from the shapes
    arguments = (inputs["source_speech_token"], length, voice_inputs[0], length, voice_inputs[1], length)
    by_chunks, _ = voice.model.flow.inference(*arguments, voice_inputs[2], streaming=True)
    torch.testing.assert_close(torch.cat(mels, dim=2), by_chunks, atol=1e-4, rtol=0)

    first, mels[:] = mels[:], []
    voice.model.last_chunk_sees_all = True
    list(streamed(voice, **inputs))
    assert torch.equal(torch.cat(mels[:-1], dim=2), torch.cat(first[:-1], dim=2))
    assert (mels[-1] - first[-1]).abs().max() > 0.1, "frames of another course of the flow"


def test_the_first_sound_needs_28_tokens(voice: CosyVoice2) -> None:
    written = []

    def writing(*_: Any) -> Iterator[int]:
        for token in tokens(100)[0].tolist():
            written.append(token)
            yield token

    voice.model.llm.inference = writing
    for _ in range(2):  # the second utterance begins as soon as the first
        written.clear()
        stream = voice.inference_sft(TEXT, "voice", stream=True)
        assert next(stream)["tts_speech"].shape[1] == HOP_SAMPLES - FADE_SAMPLES
        assert len(written) == 28
        assert next(stream)["tts_speech"].shape[1] == 2 * HOP_SAMPLES
        assert len(written) == 78
        stream.close()


def test_two_streams_at_once_do_not_disturb_each_other(voice: CosyVoice2) -> None:
    inputs = [given(120, 18, seed=1), given(90, seed=2)]
    alone = [list(streamed(voice, seed, **inputs[seed])) for seed in range(2)]
    together: list[list[Tensor]] = [[], []]
    streams = [streamed(voice, seed, **inputs[seed]) for seed in range(2)]
    for number in (0, 1, 1, 0, 1, 0):
        together[number].append(next(streams[number]))
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) == 3 and all(map(torch.equal, one, other))


def test_a_stream_of_one_chunk_is_speech_in_one_piece(voice: CosyVoice2) -> None:
    inputs = given(27, 18)
    [stream] = streamed(voice, **inputs)
    with Draws(0):
        [whole] = voice.model.tts(**inputs)
    assert torch.equal(stream, whole["tts_speech"])


def test_a_chunk_computes_only_new_tokens(voice: CosyVoice2, monkeypatch: pytest.MonkeyPatch) -> None:
    step, frames = voice.model.flow.decoder.step, []
    monkeypatch.setattr(
        voice.model.flow.decoder, "step", lambda mu, *rest: (frames.append(mu.shape[2]), step(mu, *rest))[1]
    )
    list(streamed(voice, **given(300)))
    assert frames == [50, 100, 200, 200, 50]


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_raises(voice: CosyVoice2, stream: bool) -> None:
    def failing(*_: Any) -> Iterator[int]:
        yield 5
        raise RuntimeError("out of memory")

    voice.model.llm.inference = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        list(voice.inference_sft(TEXT, "voice", stream=stream))
    voice.model.llm.inference = lambda *_: iter(())
    with pytest.raises(InputError, match="no speech tokens"):
        list(voice.inference_sft(TEXT, "voice", stream=stream))
    if stream:
        with pytest.raises(InputError, match="cannot be streamed"):
            list(voice.inference_sft(TEXT, "voice", stream=True, speed=1.5))


def test_more_than_300_seconds_are_refused(voice: CosyVoice2) -> None:
    with pytest.raises(InputError, match="15018 mel frames, and the flow has noise for 15000"):
        list(voice.model.tts(**given(7500, 9)))


def test_a_prompt_that_does_not_fit_is_refused(voice: CosyVoice2) -> None:
    inputs = given(30, 9) | {"flow_prompt_speech_token": tokens(10)}
    for stream in (False, True):
        with pytest.raises(InputError, match="10 tokens need 20 frames of mel, not 18"):
            list(voice.model.tts(**inputs, stream=stream))


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_may_arrive_in_pieces(voice: CosyVoice2, prompt: str, stream: bool) -> None:
    words = ["hello there, ", "this is ", "a test of ", "the small voice, ", "which goes on ", "for a while"]
    torch.manual_seed(1)
    spoken = list(voice.inference_zero_shot(iter(words), "the prompt of this voice.", prompt, stream=stream))
    samples = sum(piece["tts_speech"].shape[1] for piece in spoken)
    assert samples > 0 and samples % 960 == 0


def test_text_that_arrives_is_spoken_before_its_end(voice: CosyVoice2) -> None:
    read = []

    def arriving() -> Iterator[str]:
        for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"] * 20:
            read.append(word)
            yield f"{word} "

    voice.model.llm.sampling = lambda log_p, tokens, sampling: len(tokens) % 100  # never a special token
    stream = voice.inference_sft(arriving(), "voice", stream=True)
    assert next(stream)["tts_speech"].shape[1] == HOP_SAMPLES - FADE_SAMPLES
    assert 0 < len(read) < 30
    stream.close()


def test_the_first_generation_needs_the_whole_text(tmp_path: Path) -> None:
    torch.save({"anna": {"embedding": torch.randn(1, 192)}}, tiny_model_dir(tmp_path) / "spk2info.pt")
    voice = AutoModel(tmp_path, device="cpu")
    assert type(voice) is CosyVoice
    with pytest.raises(InputError, match="still arriving; give it whole, or use CosyVoice2"):
        list(voice.inference_sft(iter(["hello"]), "anna"))


def test_instructions_end_with_their_mark(voice: CosyVoice2, prompt: str) -> None:
    end = voice.frontend.encode("<|endofprompt|>")
    for instruction in ("speak slowly", "speak slowly<|endofprompt|>"):
        inputs = voice.frontend.frontend_instruct2(TEXT, instruction, prompt)
        assert inputs["prompt_text"][0].tolist() == voice.frontend.encode("speak slowly") + end
        assert inputs["prompt_text_len"].item() == inputs["prompt_text"].shape[1]
        assert "llm_prompt_speech_token" not in inputs
    assert list(voice.inference_instruct2(TEXT, "speak slowly", prompt))
    with pytest.raises(InputError, match="use inference_instruct2"):
        voice.inference_instruct(TEXT, "voice", "speak slowly")


def test_several_texts_are_spoken_together(voice: CosyVoice2) -> None:
    pieces = ["hello there.", TEXT]
    together = list(voice.speak_together(pieces, "voice", [Draws(1), Draws(2)]))
    for seed, piece, speech in zip((1, 2), pieces, together, strict=True):
        with Draws(seed):
            [alone] = voice.inference_sft(piece, "voice")
        torch.testing.assert_close(speech, alone["tts_speech"], atol=2e-3, rtol=0)


def test_stored_prompts_are_saved(voice: CosyVoice2, prompt: str, tmp_path: Path) -> None:
    voice.model_dir = str(tmp_path)
    (tmp_path / "cosyvoice2.yaml").touch()
    assert voice.add_zero_shot_spk("the prompt of this voice.", prompt, "kept")
    voice.save_spkinfo()
    stored = torch.load(tmp_path / "spk2info.pt", weights_only=True)
    assert list(stored) == ["voice", "kept"] and stored["kept"]["prompt_speech_feat"].shape == (1, 100, 80)


def test_new_weights_speak(voice: CosyVoice2, model_dir: Path) -> None:
    def speak(voice: CosyVoice2) -> Tensor:
        with Draws(3):
            return torch.cat([piece["tts_speech"] for piece in voice.inference_sft(TEXT, "voice")], dim=1)

    before = speak(voice)
    states = {part: torch.load(model_dir / f"{part}.pt", weights_only=True) for part in ("llm", "flow", "hift")}
    others = {part: {name: 1.01 * value for name, value in state.items()} for part, state in states.items()}
    for part, state in others.items():
        getattr(voice.model, part).load_state_dict(state)
    assert torch.equal(speak(voice), speak(CosyVoice2(model_dir, device="cpu", weights=others)))
    voice.model.load(*(str(model_dir / f"{part}.pt") for part in states))
    assert torch.equal(speak(voice), before)


def test_each_class_opens_its_own_folders(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a CosyVoice2-0.5B folder. Open it with AutoModel"):
        CosyVoice(model_dir)
    with pytest.raises(ValueError, match="cosyvoice2.yaml does not exist"):
        CosyVoice2(tmp_path)
    (tmp_path / "cosyvoice.yaml").touch()
    with pytest.raises(InputError, match="is a CosyVoice-300M folder"):
        CosyVoice2(tmp_path)
    with pytest.raises(InputError, match="cannot speak here yet: its flow"):
        CosyVoice3(tmp_path, load_trt=True)
    with pytest.raises(InputError, match="nowhere"):
        AutoModel(model_dir=tmp_path / "nowhere")


def test_a_flow_without_chunks_speaks_in_one_piece_only(model_dir: Path, tmp_path: Path) -> None:
    folder = tiny2_model_dir(tmp_path)
    yaml = (folder / "cosyvoice2.yaml").read_text(encoding="utf-8")
    assert "chunk_size: 25 #" in yaml
    (folder / "cosyvoice2.yaml").write_text(yaml.replace("chunk_size: 25 #", "chunk_size: 0 #"), encoding="utf-8")
    voice = CosyVoice2(folder, device="cpu")
    assert list(voice.model.tts(**given(10)))
    with pytest.raises(InputError, match="has no chunks"):
        list(voice.model.tts(**given(10), stream=True))


def test_what_programs_look_at(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    voice = CosyVoice2(model_dir, True, True, True, True, 4, device="cpu")
    assert all(f"{name} is" in caplog.text for name in ("load_jit", "load_trt", "load_vllm", "fp16"))
    assert voice.model_dir + "/llm.pt" == str(model_dir / "llm.pt")
    assert voice.fp16 is False and voice.sample_rate == 24000
    assert voice.frontend.device == torch.device("cpu")
    assert voice.frontend.campplus_session.get_inputs()[0].name
    assert len(voice.frontend.speech_tokenizer_session.get_inputs()) == 2


def test_lists_of_files_are_read(tmp_path: Path) -> None:
    for name, content in {"a.json": '{"one": [1]}', "b.json": '{"two": {"x": 2}}'}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "list").write_text(f" {tmp_path}/a.json \n\n{tmp_path}/b.json\n", encoding="utf-8")
    assert read_lists(tmp_path / "list") == [f"{tmp_path}/a.json", f"{tmp_path}/b.json"]
    assert read_json_lists(str(tmp_path / "list")) == {"one": [1], "two": {"x": 2}}
    (tmp_path / "b.json").write_text("[", encoding="utf-8")
    with pytest.raises(InputError, match=r"b.json is not JSON"):
        read_json_lists(tmp_path / "list")
    with pytest.raises(InputError, match="absent does not exist"):
        read_lists(tmp_path / "absent")
