"""The public API on a tiny model folder, with small stand-ins for the two ONNX sessions."""

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from models import tiny_model_dir
from torch import Tensor

from cosyvoice.cli.cosyvoice import AutoModel, CosyVoice
from cosyvoice.cli.model import CosyVoiceModel
from cosyvoice.cli.prefetch import prefetch
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils import file_utils
from cosyvoice.utils.common import set_all_random_seed
from cosyvoice.utils.rates_300m import MEL_HOP_SAMPLES, SAMPLE_RATE_HZ

TEXT = "Hello there."


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model_dir(tmp_path_factory.mktemp("model"))
    torch.save({"anna": {"embedding": torch.randn(1, 192)}}, folder / "spk2info.pt")
    return folder


@pytest.fixture
def voice(model_dir: Path) -> CosyVoice:
    """Its prompts have half a second of speech tokens and one fixed speaker vector."""
    cosyvoice = CosyVoice(model_dir, device="cpu")
    cosyvoice.frontend.speech_tokenizer = lambda wav: torch.arange(25, dtype=torch.int32)[None]
    cosyvoice.frontend.speaker_encoder = lambda wav: torch.ones(1, 192)
    return cosyvoice


@pytest.fixture
def prompt() -> Tensor:
    """Half a second of a tone at 16 kHz."""
    return 0.1 * torch.sin(torch.arange(8000) * 0.1)[None]


def speak_tokens(count: int) -> Callable[..., Iterator[int]]:
    """In place of the language model's `inference`, which may fall silent at once or talk for long."""
    return lambda *args: iter(range(count))


MODES: dict[str, Callable[..., Iterator[dict[str, Tensor]]]] = {
    "sft": lambda voice, prompt, **options: voice.inference_sft(TEXT, "anna", **options),
    "zero_shot": lambda voice, prompt, **options: voice.inference_zero_shot(TEXT, "Hi.", prompt, **options),
    "cross_lingual": lambda voice, prompt, **options: voice.inference_cross_lingual(TEXT, prompt, **options),
    "instruct": lambda voice, prompt, **options: voice.inference_instruct(TEXT, "anna", "Be calm.", **options),
    "vc": lambda voice, prompt, **options: voice.inference_vc(prompt, prompt, **options),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_speaks(voice: CosyVoice, prompt: Tensor, mode: str) -> None:
    before = prompt.clone()
    pieces = list(MODES[mode](voice, prompt))
    assert pieces
    for piece in pieces:
        speech = piece["tts_speech"]
        assert speech.dtype == torch.float32 and speech.shape[0] == 1 and speech.shape[1] > 0
        assert speech.shape[1] % MEL_HOP_SAMPLES == 0
        assert speech.isfinite().all() and speech.abs().max() <= 1
        speech *= 0.5  # the caller owns it
    assert torch.equal(prompt, before)
    assert voice.sample_rate == SAMPLE_RATE_HZ


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "vc"])
def test_a_stream_comes_in_chunks(voice: CosyVoice, prompt: Tensor, mode: str) -> None:
    voice.model.llm.inference = speak_tokens(260)
    sizes = [piece["tts_speech"].shape[1] for piece in MODES[mode](voice, prompt, stream=True)]
    assert len(sizes) == 3 and all(size % MEL_HOP_SAMPLES == 0 for size in sizes)


def test_speed_changes_the_duration(voice: CosyVoice) -> None:
    voice.model.llm.inference = speak_tokens(50)
    frames = {}
    for speed in (0.5, 1.0, 2.0):
        [piece] = voice.inference_sft(TEXT, "anna", speed=speed)
        frames[speed] = piece["tts_speech"].shape[1] // MEL_HOP_SAMPLES
    assert frames[0.5] == 2 * frames[1.0] and frames[2.0] == frames[1.0] // 2


def test_one_seed_one_waveform(voice: CosyVoice) -> None:
    def speak(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([piece["tts_speech"] for piece in voice.inference_sft(TEXT, "anna")], dim=1)

    assert torch.equal(speak(1), speak(1))
    assert not torch.equal(speak(1)[:, :256], speak(2)[:, :256])


def test_a_stored_prompt_speaks_like_the_prompt(voice: CosyVoice, prompt: Tensor, model_dir: Path) -> None:
    assert voice.add_zero_shot_spk("Hi.", prompt, "bert") is True
    voice.save_spkinfo()
    again = CosyVoice(model_dir, device="cpu")
    assert again.list_available_spks() == ["anna", "bert"]
    stored, given = again.frontend.spk2info["bert"], voice.frontend.spk2info["bert"]
    assert stored.keys() == given.keys()
    assert all(torch.equal(value, given[key]) for key, value in stored.items())

    torch.manual_seed(3)
    [from_prompt] = voice.inference_zero_shot(TEXT, "Hi.", prompt)
    torch.manual_seed(3)
    [from_store] = again.inference_zero_shot(TEXT, "", "", zero_shot_spk_id="bert")
    assert torch.equal(from_prompt["tts_speech"], from_store["tts_speech"])
    assert list(again.inference_sft(TEXT, "bert"))
    with pytest.raises(InputError, match="'anna' is stored without a prompt; use inference_sft"):
        list(again.inference_zero_shot(TEXT, "", "", zero_shot_spk_id="anna"))


def test_a_failed_save_keeps_the_old_voices(
    voice: CosyVoice, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (model_dir / "spk2info.pt").read_bytes()

    def half_a_file(content: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half_a_file)
    with pytest.raises(OSError):
        voice.save_spkinfo()
    assert (model_dir / "spk2info.pt").read_bytes() == before
    assert not list(model_dir.glob(".*"))


def failing_tokens(*args: Any) -> Iterator[int]:
    yield from range(5)
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_language_model_raises(voice: CosyVoice, stream: bool) -> None:
    voice.model.llm.inference = failing_tokens
    with pytest.raises(RuntimeError, match="out of memory"):
        list(voice.inference_sft(TEXT, "anna", stream=stream))


def endless(stopped: threading.Event, *_: Any) -> Iterator[int]:
    """Tokens without end; `stopped` tells that nobody asks for more."""
    try:
        while True:
            time.sleep(0.001)
            yield 7
    finally:
        stopped.set()


def test_leaving_a_stream_stops_the_language_model(voice: CosyVoice) -> None:
    stopped = threading.Event()
    voice.model.llm.inference = partial(endless, stopped)
    stream = voice.inference_sft(TEXT, "anna", stream=True)
    next(stream)
    stream.close()
    assert stopped.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("stream", [False, True])
def test_no_speech_tokens_is_an_error(voice: CosyVoice, stream: bool) -> None:
    voice.model.llm.inference = speak_tokens(0)
    with pytest.raises(InputError, match="no speech tokens"):
        list(voice.inference_sft(TEXT, "anna", stream=stream))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 0.4}, "speed 0.4"),
        ({"speed": 2.5}, "speed 2.5"),
        ({"speed": 1.5, "stream": True}, "cannot be streamed"),
        ({"tts_text": ""}, "nothing to speak"),
        ({"tts_text": "  \n"}, "nothing to speak"),
        ({"spk_id": "nobody"}, "nobody"),
    ],
)
def test_bad_calls(voice: CosyVoice, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(voice.inference_sft(**({"tts_text": TEXT, "spk_id": "anna"} | options)))


def test_signs_alone_are_passed_over_with_a_warning(voice: CosyVoice, caplog: pytest.LogCaptureFixture) -> None:
    assert list(voice.inference_sft("?!...", "anna")) == []
    assert "nothing to speak in the text '?!...'" in caplog.text
    with pytest.raises(InputError, match="nothing to speak"):
        voice.split("?!...")


def test_a_prompt_of_another_kind_is_refused(voice: CosyVoice) -> None:
    with pytest.raises(InputError, match="a prompt must be a path, .* not NoneType"):
        list(voice.inference_zero_shot(TEXT, "Hi.", None))


def test_bad_folders(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        CosyVoice(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cosyvoice.yaml"):
        CosyVoice(tmp_path)
    (tmp_path / "cosyvoice2.yaml").touch()
    with pytest.raises(InputError, match="CosyVoice2"):
        CosyVoice(tmp_path)


def test_what_only_accelerates_is_left_out_with_a_warning(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    voice = CosyVoice(model_dir, load_jit=True, load_trt=True, load_vllm=True, fp16=True, device="cpu")
    for name in ("load_jit", "load_trt", "load_vllm", "fp16"):
        assert f"{name} is" in caplog.text
    assert voice.fp16 is False


def test_another_token_rate_is_refused(tmp_path: Path, model_dir: Path) -> None:
    settings = (model_dir / "cosyvoice.yaml").read_text(encoding="utf-8")
    settings = settings.replace("input_frame_rate: 50", "input_frame_rate: 25")
    (tmp_path / "cosyvoice.yaml").write_text(settings, encoding="utf-8")
    with pytest.raises(InputError, match="25 speech tokens a second, but the model has 50. Use one"):
        CosyVoice(tmp_path)


def test_a_model_says_how_long_its_pieces_are(tmp_path: Path, model_dir: Path, voice: CosyVoice) -> None:
    for path in model_dir.glob("[!.]*"):
        shutil.copy(path, tmp_path)
    with (tmp_path / "cosyvoice.yaml").open("a") as settings:
        settings.write("text_split: {max_tokens: 10, min_tokens: 5, merge_tokens: 2}\n")
    text = "One short sentence. Another one. And a third one."
    other = CosyVoice(tmp_path, device="cpu")
    assert voice.frontend.text_normalize(text) == [text]
    assert other.frontend.text_normalize(text) == ["One short sentence. Another one.", " And a third one."]


def test_weights_of_another_model_are_refused(tmp_path: Path, model_dir: Path) -> None:
    for path in model_dir.glob("[!.]*"):
        shutil.copy(path, tmp_path)
    shutil.copy(model_dir / "flow.pt", tmp_path / "llm.pt")
    with pytest.raises(InputError, match="llm.pt"):
        CosyVoice(tmp_path, device="cpu")


def speech_of(voice: CosyVoice, text: str = TEXT) -> Tensor:
    torch.manual_seed(5)
    return torch.cat([piece["tts_speech"] for piece in voice.inference_sft(text, "anna")], dim=1)


def changed(path: Path) -> dict[str, Tensor]:
    return {name: tensor * 1.01 for name, tensor in torch.load(path, weights_only=True).items()}


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_weights_can_be_loaded_again(model_dir: Path, precision: str) -> None:
    files = {name: model_dir / f"{name}.pt" for name in ("llm", "flow", "hift")}
    others = {name: changed(path) for name, path in files.items()}
    fresh = speech_of(CosyVoice(model_dir, device="cpu", weights=others, precision=precision))
    voice = CosyVoice(model_dir, device="cpu", precision=precision)
    first = speech_of(voice)
    for name, weights in others.items():
        keys = getattr(voice.model, name).load_state_dict(weights | {"epoch": 3})
        assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert torch.equal(speech_of(voice), fresh)
    voice.model.load(*map(str, files.values()))
    assert torch.equal(speech_of(voice), first) and not torch.equal(first, fresh)


def test_weights_that_do_not_fit_leave_those_in_use(model_dir: Path, voice: CosyVoice) -> None:
    before, weights = speech_of(voice), torch.load(model_dir / "llm.pt", weights_only=True)
    lost = weights.pop("llm_decoder.bias")
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"llm's weights does not fit this model: 1 missing \(llm_decoder.bias"):
            voice.model.llm.load_state_dict(weights, strict=strict)
    weights |= {"llm_decoder.bias": lost, "other.bias": lost}
    with pytest.raises(InputError, match="1 unexpected"):
        voice.model.llm.load_state_dict(weights)
    assert torch.equal(speech_of(voice), before)
    assert voice.model.llm.load_state_dict(weights, strict=False) == ([], ["other.bias"])
    assert torch.equal(speech_of(voice), before)


def test_what_servers_import(model_dir: Path) -> None:
    assert AutoModel(model_dir=str(model_dir)).list_available_spks()[0] == "anna"
    draws = []
    for _ in range(2):
        set_all_random_seed(3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert draws[0][2] == torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    assert file_utils.logging is logging


def test_prefetch_runs_ahead_and_keeps_order() -> None:
    made_all = threading.Event()

    def items() -> Iterator[int]:
        yield from range(100)
        made_all.set()

    ahead = prefetch(items())
    assert next(ahead) == 0
    assert made_all.wait(timeout=10)  # with one item consumed
    assert list(ahead) == list(range(1, 100))


def test_leaving_what_is_prefetched_stops_its_thread() -> None:
    stopped = threading.Event()
    ahead = prefetch(endless(stopped))
    assert next(ahead) == 7
    assert [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    ahead.close()
    assert stopped.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_model_chooses_a_device_that_exists(voice: CosyVoice) -> None:
    parts = (voice.model.llm, voice.model.flow, voice.model.hift)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert CosyVoiceModel(*parts).device.type == expected
