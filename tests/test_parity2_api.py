"""CosyVoice2's API and front end on the recorded tiny folder, entered through AutoModel."""

import zipfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from parity import V2, assert_close
from text_parity import right_numbers, right_pieces
from tiny2 import tiny2_model_dir
from torch import Tensor

from cosyvoice.cli.cosyvoice import AutoModel, CosyVoice2
from cosyvoice.cli.cosyvoice2_frontend import CosyVoice2FrontEnd
from cosyvoice.tokenizer.qwen import QwenTokenizer, get_qwen_tokenizer
from cosyvoice.utils import frontend_utils

MEL = {"atol": 2e-3}
SPEAKER = {"atol": 1e-4}
WAVE = {"atol": 2e-3}
RECORDED = V2.cases("api")

pytestmark = pytest.mark.usefixtures("as_recorded")


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> CosyVoice2:
    voice = AutoModel(model_dir=str(tiny2_model_dir(tmp_path_factory.mktemp("model"))), device="cpu")
    assert isinstance(voice, CosyVoice2)
    if RECORDED:
        assert voice.add_zero_shot_spk(texts()["prompt"], prompt_wav(), "kept")
    return voice


def texts() -> dict[str, str]:
    return V2.meta("api")["texts"]


def prompt_wav() -> str:
    return str(V2.folder / V2.meta("api")["prompt_wav"])


def source_wav() -> str:
    return str(V2.folder / V2.meta("api")["source_wav"])


def in_mode(voice: CosyVoice2, mode: str, **options: Any) -> Iterator[dict[str, Tensor]]:
    text, prompt, wav = texts()["tts"], texts()["prompt"], prompt_wav()
    calls = {
        "zero_shot": partial(voice.inference_zero_shot, text, prompt, wav),
        "zero_shot_kept": partial(voice.inference_zero_shot, text, "", "", "kept"),
        "cross_lingual": partial(voice.inference_cross_lingual, text, wav),
        "instruct2": partial(voice.inference_instruct2, text, texts()["instruct"], wav),
        "instruct2_kept": partial(voice.inference_instruct2, text, texts()["instruct"], "", "kept"),
        "sft": partial(voice.inference_sft, text, "voice"),
    }
    if mode == "vc":
        return voice.inference_vc(source_wav(), wav)
    return calls[mode](text_frontend=False, **options)


def speech_of(voice: CosyVoice2, mode: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.cat([piece["tts_speech"] for piece in in_mode(voice, mode)], dim=1)


def inputs_of(voice: CosyVoice2, mode: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the front end hands to the model."""
    handed: list[dict[str, Tensor]] = []

    def tts(stream: bool, speed: float, **inputs: Tensor) -> list[dict[str, Tensor]]:
        handed.append(inputs)
        return []

    monkeypatch.setattr(voice.model, "tts", tts)
    list(in_mode(voice, mode))
    [inputs] = handed
    return inputs


def modes(*without: str) -> list[str]:
    keys = [key for name in RECORDED for key in V2.meta(name) if key.endswith("/keys")]
    return [mode for mode in (key.removesuffix("/keys") for key in keys) if mode not in without]


def assert_inputs(inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected.keys() <= inputs.keys()
    assert inputs.keys() - expected.keys() <= {"embedding"}  # of a stored voice, for inference_sft
    for key, value in expected.items():
        tolerance = SPEAKER if "embedding" in key else MEL if key == "prompt_speech_feat" else {}
        assert inputs[key].dtype == value.dtype and inputs[key].shape == value.shape, key
        assert_close(inputs[key], value, **tolerance)


def recorded_inputs(mode: str) -> dict[str, Tensor]:
    case, prefix = V2.arrays("api"), f"{mode}/in/"
    return {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}


@pytest.mark.parametrize("mode", modes("instruct2_kept", "vc"))
def test_parity2_front_end(voice: CosyVoice2, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(voice, mode, monkeypatch)
    assert_inputs(inputs, recorded_inputs(mode))


@pytest.mark.parametrize("mode", modes("instruct2_kept", "vc"))
def test_parity2_modes(voice: CosyVoice2, mode: str) -> None:
    run = V2.meta("api")["runs"][mode]
    speech = speech_of(voice, mode, run["seed"])
    assert speech.shape == (1, run["samples"])
    assert_close(speech, V2.arrays("api")[f"{mode.removesuffix('_kept')}/wav"], **WAVE)  # stored, it is the same voice


@pytest.mark.parametrize("mode", [mode for mode in modes() if mode == "instruct2_kept"])
def test_parity2_a_stored_voice_follows_the_instruction(
    voice: CosyVoice2, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public code takes the stored voice's own text in place of the instruction."""
    expected = recorded_inputs(mode)
    instruction = recorded_inputs("instruct2")
    assert not torch.equal(expected["prompt_text"], instruction["prompt_text"])
    expected |= {key: value for key, value in instruction.items() if key.startswith("prompt_text")}
    assert_inputs(inputs_of(voice, mode, monkeypatch), expected)


@pytest.mark.parametrize("mode", [mode for mode in modes() if mode == "vc"])
def test_parity2_the_prompt_of_a_conversion_has_two_frames_a_token(
    voice: CosyVoice2, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public code keeps a surplus token, whose two frames of the prompt come out ahead of the speech."""
    seed, samples = (V2.meta("api")["runs"][mode][key] for key in ("seed", "samples"))
    expected = recorded_inputs(mode)
    surplus = expected["flow_prompt_speech_token"].shape[1] - expected["prompt_speech_feat"].shape[1] // 2
    assert surplus == 1
    speech = speech_of(voice, mode, seed)
    assert speech.shape == (1, samples - 960 * surplus) == (1, 960 * expected["source_speech_token"].shape[1])
    expected["flow_prompt_speech_token"] = expected["flow_prompt_speech_token"][:, :-surplus]
    expected["flow_prompt_speech_token_len"] = expected["flow_prompt_speech_token_len"] - surplus
    assert_inputs(inputs_of(voice, mode, monkeypatch), expected)


@pytest.mark.parametrize("name", RECORDED)
def test_parity2_folder(voice: CosyVoice2, name: str) -> None:
    numbers = V2.meta(name)
    assert voice.list_available_spks() == numbers["list_available_spks"]
    assert voice.sample_rate == numbers["sample_rate"]
    before = numbers["before_trimming"]
    assert voice.frontend._extract_speech_feat(prompt_wav())[0].shape[1] == before["prompt_feat_frames"]
    assert voice.frontend._extract_speech_token(prompt_wav())[0].shape[1] == before["prompt_speech_tokens"]


def tables() -> dict[str, Any]:
    return V2.table("frontend") if (V2.folder / "frontend.json").is_file() else {}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> QwenTokenizer:
    folder = tmp_path_factory.mktemp("qwen")
    with zipfile.ZipFile(V2.folder / "qwen_tokenizer.zip") as archive:
        archive.extractall(folder)
    (found,) = folder.rglob("vocab.json")
    return get_qwen_tokenizer(str(found.parent), skip_special_tokens=True)


@pytest.fixture(scope="module")
def frontend(tokenizer: QwenTokenizer) -> CosyVoice2FrontEnd:
    """With no external normaliser, as the strings were recorded, and no network to open."""
    return CosyVoice2FrontEnd(lambda: tokenizer, abs, "", "", normalizer=None)


@pytest.mark.parametrize("case", tables().get("split_paragraph", []))
def test_parity2_split_paragraph(case: dict[str, Any], tokenizer: QwenTokenizer) -> None:
    options = {key: case[key] for key in ("lang", "token_max_n", "token_min_n", "merge_len", "comma_split")}
    pieces = frontend_utils.split_paragraph(case["in"], tokenizer.encode, **options)
    assert pieces == right_pieces(case["out"], case["comma_split"])


@pytest.mark.parametrize("case", tables().get("text_normalize", []))
def test_parity2_text_normalize(case: dict[str, Any], frontend: CosyVoice2FrontEnd) -> None:
    text, normalize = case["in"], frontend.text_normalize
    whole, pieces = case["nosplit"], case["split"]
    if not frontend_utils.contains_chinese(text):
        whole = right_numbers(text, whole, lambda words: normalize(words, split=False))
        pieces = right_numbers(text, pieces, normalize)
    if pieces != [text]:  # text with special tokens is passed on without a full stop
        pieces = right_pieces(pieces, comma_split=False)
    assert normalize(text, split=False) == whole
    assert normalize(text) == pieces


@pytest.mark.parametrize("name", ["generator"] if "generator" in tables() else [])
def test_parity2_text_that_arrives(name: str, frontend: CosyVoice2FrontEnd) -> None:
    case, read = tables()[name], []

    def arriving() -> Iterator[str]:
        for piece in case["pieces"]:
            read.append(piece)
            yield piece

    text = arriving()
    [same] = frontend.text_normalize(text)
    assert same is text
    ids, length = frontend._extract_text_token(text)
    assert not read, "the text is read as it arrives"
    assert [x.tolist() for x in ids] == case["yields_shape_1_1"]
    assert length.tolist() == case["text_len"]
