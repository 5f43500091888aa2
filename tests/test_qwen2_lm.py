"""CosyVoice2's language model beyond the recorded numbers: its steps, its limits, and what it does better."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import tiny2
from parity import V2, table
from torch import Tensor

from cosyvoice.llm import qwen2_config
from cosyvoice.llm.qwen2_encoder import Qwen2Encoder
from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.model_folder.weights import NoRandomInit
from cosyvoice.runtime.command import seed_all
from cosyvoice.runtime.draws import Draws
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.cache import join_caches
from cosyvoice.transformer.decoding import LEAST_CAPTURED_FRAMES, MOST_CAPTURED_FRAMES, CapturedSteps, CapturedStepsPool
from cosyvoice.utils.common import ras_sampling
from lora import adapters, inject

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = torch.device("cpu")
BLANK = V2.folder / "tiny2_blanken"
END, UNUSED, FILL = 6561, 6562, 6563
FRAMES = 300  # more than a cache holds at first
NONE, EMPTY = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0])
SPEAKER = torch.zeros(1, 192)
TEXT = torch.arange(17).unsqueeze(0)
TOLERANCE = {"float16": 2e-3, "int8": 3e-2}  # error's norm over the spread of the scores


@pytest.fixture(scope="module")
def plain() -> Qwen2LM:
    return tiny2("llm")


@pytest.fixture(scope="module")
def frames(plain: Qwen2LM) -> Tensor:
    return 0.5 * torch.randn(2, FRAMES, plain.llm.output_size(), generator=torch.Generator().manual_seed(0))


def prepared(llm: Qwen2LM, precision: str = "float32") -> Qwen2LM:
    llm = copy.deepcopy(llm)
    llm.prepare_decoding(precision)
    return llm


def with_captured_steps(llm: Qwen2LM) -> Qwen2LM:
    """What `prepare_decoding` makes on a GPU; on a CPU the steps are computed instead of replayed."""
    llm = prepared(llm)
    llm.captured = CapturedStepsPool(llm.llm, llm.speech_embedding, llm.llm_decoder)
    return llm


# The stack


@pytest.mark.parametrize("make", [lambda llm: llm, prepared], ids=["plain", "prepared"])
@torch.inference_mode()
def test_steps_are_one_pass_through_transformers(plain: Qwen2LM, frames: Tensor, make: Callable) -> None:
    """Two sequences at once: many frames at first, then few, then one after the other."""
    expected = plain.llm.model.model(inputs_embeds=frames, use_cache=False).last_hidden_state
    stack = make(plain).llm
    cache = [type(layer)(layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)) for layer in stack.new_cache()]
    parts = [frames[:, :20], frames[:, 20:25], *frames[:, 25:].split(1, dim=1)]
    found = torch.cat([stack.forward_chunk(part, cache) for part in parts], dim=1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_sequences_of_different_lengths_go_on_together(plain: Qwen2LM, frames: Tensor) -> None:
    stack = prepared(plain).llm
    expected = plain.llm(frames[:1, :40])
    lengths, caches = (31, 7, 20), []
    for length in lengths:
        caches.append(stack.new_cache())
        stack.forward_chunk(frames[:1, :length], caches[-1])
    cache, starts = join_caches(caches)
    for step in range(9):
        places = [length + step for length in lengths]
        found = stack.forward_chunk(frames[0, places].unsqueeze(1), cache, starts)
        torch.testing.assert_close(found[:, 0], expected[0, places], atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_steps_for_a_graph_are_the_same_mathematics(plain: Qwen2LM, frames: Tensor) -> None:
    """Also in a cache that another sequence has filled before, and with frames between the tokens."""
    llm, ordinary = with_captured_steps(plain), prepared(plain)
    for begin in (0, 30):
        found, expected = (model.following(frames[:1, begin : begin + 20], FRAMES) for model in (llm, ordinary))
        torch.testing.assert_close(next(found), next(expected), atol=1e-5, rtol=1e-5)
        for sent in (3, 4000, frames[:1, 60:65], *range(40)):
            torch.testing.assert_close(found.send(sent), expected.send(sent), atol=1e-5, rtol=1e-5)
        found.close()


@torch.inference_mode()
def test_a_sequence_that_outgrows_its_graph_goes_on_without(plain: Qwen2LM, frames: Tensor) -> None:
    llm, ordinary = with_captured_steps(plain), prepared(plain)
    found, expected = (model.following(frames[:1, :20], 10) for model in (llm, ordinary))
    next(found), next(expected)
    long = frames[:1].repeat(1, 4, 1)[:, : LEAST_CAPTURED_FRAMES - 22]
    for sent in (long, 5, 6, 7, 8, frames[:1, :3]):
        torch.testing.assert_close(found.send(sent), expected.send(sent), atol=1e-5, rtol=1e-5)
    assert [steps.cache[0].length for steps in llm.captured.idle] == [LEAST_CAPTURED_FRAMES]


@pytest.mark.parametrize("precision", TOLERANCE)
@torch.inference_mode()
def test_fewer_bits_stay_close(plain: Qwen2LM, frames: Tensor, precision: str) -> None:
    def scores(llm: Qwen2LM) -> Tensor:
        cache = llm.llm.new_cache()
        parts = [frames[:1, :20], *frames[:1, 20:120].split(1, dim=1)]
        return torch.stack([llm.next_log_probabilities(part, cache) for part in parts])

    found, expected = (scores(llm) for llm in (prepared(plain, precision), plain))
    spread = (expected - expected.mean(dim=1, keepdim=True)).norm()
    assert 0 < (found - expected).norm() < TOLERANCE[precision] * spread


def test_texts_written_together_get_the_tokens_that_each_gets_alone(plain: Qwen2LM) -> None:
    llm, alone = prepared(plain), []
    texts = [torch.arange(length).unsqueeze(0) for length in (5, 2, 9)]
    for number, text in enumerate(texts):
        seed_all(number)
        alone.append(list(llm.inference(text, torch.tensor([text.size(1)]), NONE, EMPTY, NONE, EMPTY, SPEAKER)))
    assert llm.inference_together(texts, SPEAKER, [Draws(number) for number in range(3)]) == alone
    assert len({len(tokens) for tokens in alone}) == 3


# Sampling


def test_no_special_token_ends_a_speech_too_early(plain: Qwen2LM) -> None:
    """However likely it is: the public model forbids the end alone."""
    llm = copy.deepcopy(plain)
    llm.llm_decoder.bias.data[END:] += 100
    for special in (END, UNUSED, FILL):
        llm.sampling = lambda log_p, *_, special=special: special if log_p[special].isfinite() else int(log_p.argmax())
        tokens = list(llm.inference(TEXT, torch.tensor([17]), NONE, EMPTY, NONE, EMPTY, SPEAKER))
        assert len(tokens) == 2 * 17 and max(tokens) < END


# Training


@pytest.fixture
def pairs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "text_token": torch.randint(0, 900, (3, 6), generator=generator),
        "text_token_len": torch.tensor([6, 5, 4]),
        "speech_token": torch.randint(0, END, (3, 40), generator=generator),
        "speech_token_len": torch.tensor([40, 33, 12]),
        "reject_speech_token": torch.randint(0, END, (3, 30), generator=generator),
        "reject_speech_token_len": torch.tensor([30, 15, 30]),
        "embedding": torch.zeros(3, 192),
    }


def test_both_versions_of_a_clip_and_the_reference_have_one_layout(
    plain: Qwen2LM, pairs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text and speech take turns in both or in neither, so each clip costs one draw and needs enough of both."""
    draws, seen = [], []
    monkeypatch.setattr(random, "random", lambda: draws.append(0.0) or 0.0)
    assert plain.drawn_layouts(pairs).tolist() == [True, False, False] and len(draws) == 3
    laid_out = plain.join
    monkeypatch.setattr(plain, "join", lambda batch, device: seen.append(batch["bistream"]) or laid_out(batch, device))
    drawn = pairs | {"bistream": plain.drawn_layouts(pairs)}
    with torch.no_grad():
        policy, reference = (plain.forward_dpo(drawn, CPU) for _ in range(2))
        itself = plain.forward_dpo(pairs, CPU)
    assert [layouts.tolist() for layouts in seen] == [[True, False, False] * 2] * 3 and len(draws) == 9
    for result in (reference, itself):
        assert all(torch.equal(policy[name], result[name]) for name in ("chosen_logps", "rejected_logps"))


def test_preference_tells_chosen_from_rejected(plain: Qwen2LM, pairs: dict[str, Tensor]) -> None:
    """The public model compares places that both versions share; here the gradient raises what is chosen."""
    llm = copy.deepcopy(plain)
    llm.bistream_share = 0.0
    before = llm.forward_dpo(pairs, CPU)
    (before["chosen_logps"] - before["rejected_logps"]).sum().backward()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter += 0 if parameter.grad is None else 0.05 * parameter.grad
        after = llm.forward_dpo(pairs, CPU)
    assert (after["chosen_logps"] > before["chosen_logps"]).all()
    assert (after["rejected_logps"] < before["rejected_logps"]).all()


@torch.no_grad()
def test_the_share_of_clips_in_turns_is_a_setting(plain: Qwen2LM, pairs: dict[str, Tensor]) -> None:
    llm, batch = copy.deepcopy(plain), {name: pairs[name] for name in pairs if "reject" not in name}
    losses = {}
    for share, layouts in ((0.0, [False] * 3), (1.0, [True, True, False])):
        llm.bistream_share = share
        assert llm.drawn_layouts(batch).tolist() == layouts
        losses[share] = llm.forward(batch, CPU)["loss"]
    assert losses[0.0] != losses[1.0]


def test_adapters_take_part_in_training_and_in_speaking(plain: Qwen2LM, pairs: dict[str, Tensor]) -> None:
    """Training runs transformers' modules and speaking our own steps, over the same layers."""
    llm = copy.deepcopy(plain)
    names = inject(llm, TARGETS, rank=2, alpha=2.0, dropout=0.0)
    assert len(names) == len(TARGETS) * 2 and not any("lm_head" in name for name in names)
    batch = pairs | {"bistream": torch.tensor([True, False, False])}
    torch.testing.assert_close(llm.forward(batch, CPU)["loss"], plain.forward(batch, CPU)["loss"])
    for adapter in adapters(llm):
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    llm.forward(batch, CPU)["loss"].backward()
    assert all(adapter.lora_A.grad.abs().sum() > 0 for adapter in adapters(llm))
    with torch.inference_mode():
        lm_input = llm.inference_prefix(TEXT, NONE, TEXT, SPEAKER)
        found = llm.llm.forward_chunk(lm_input, llm.llm.new_cache())
        torch.testing.assert_close(found, llm.llm(lm_input), atol=2e-5, rtol=1e-5)
        assert (found - plain.llm(lm_input)).abs().max() > 0.1


# Text that arrives


def bistream(
    llm: Qwen2LM, text: Tensor, prompt_text: Tensor = NONE, prompt: Tensor = NONE, piece: int = 1
) -> list[int]:
    pieces = iter(text.split(piece, dim=1))
    return list(llm.inference_bistream(pieces, prompt_text, EMPTY, prompt, EMPTY, SPEAKER))


@pytest.mark.parametrize("special", [END, UNUSED, FILL])
def test_no_special_token_is_spoken_while_text_arrives(plain: Qwen2LM, special: int) -> None:
    """However likely it is: the public model ends in an error. Nor does the speech go on for ever."""
    llm = copy.deepcopy(plain)
    llm.llm_decoder.bias.data[END:] -= 100
    llm.llm_decoder.bias.data[special] += 200
    torch.manual_seed(0)
    tokens = bistream(llm, TEXT)
    assert all(token < END for token in tokens)
    # three pieces of text and the rest: the end comes at once in the rest, a fill token in each piece
    assert len(tokens) == {END: 3 * 15, UNUSED: 20 * 17, FILL: 20 * 17}[special]


@torch.inference_mode()
def test_all_of_the_prompt_is_read_although_there_is_little_text(plain: Qwen2LM) -> None:
    """The public model drops the speech that no text has come for."""
    prompt, scores = torch.arange(34).unsqueeze(0), []
    llm = copy.deepcopy(plain)
    llm.sampling = lambda log_p, *_: scores.append(log_p.clone()) or END
    assert bistream(llm, TEXT[:, :5], TEXT[:, 5:7], prompt, piece=2) == []
    text, said = plain.embed_text(torch.cat((TEXT[:, 5:7], TEXT[:, :5]), dim=1)), plain.speech_embedding(prompt)
    sos, task = plain.llm_embedding.weight.view(2, 1, 1, -1)
    read = torch.cat((sos, text[:, :5], said[:, :15], text[:, 5:], task, said[:, 15:]), dim=1)
    expected = plain.llm_decoder(plain.llm(read)[0, -1]).log_softmax(dim=-1)
    torch.testing.assert_close(scores[0][: END + 1], expected[: END + 1], atol=1e-5, rtol=1e-5)


def test_arriving_text_is_spoken_with_captured_steps(plain: Qwen2LM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, ordinary, taken, after = with_captured_steps(plain), prepared(plain), [], CapturedSteps.after
    monkeypatch.setattr(CapturedSteps, "after", lambda steps, token: taken.append(token) or after(steps, token))
    for seed in range(3):
        seed_all(seed)
        expected = bistream(ordinary, TEXT, TEXT[:, :4], TEXT[:, :11])
        assert not taken
        seed_all(seed)
        assert bistream(llm, TEXT, TEXT[:, :4], TEXT[:, :11]) == expected
        assert len(taken) > 15
        taken.clear()
    assert [steps.capacity for steps in llm.captured.idle] == [MOST_CAPTURED_FRAMES]


def test_no_text_is_told(plain: Qwen2LM) -> None:
    with pytest.raises(InputError, match="there is no text to speak"):
        list(plain.inference_bistream(iter(()), NONE, EMPTY, NONE, EMPTY, SPEAKER))
    with pytest.raises(InputError, match="there is no text to speak"):
        list(plain.inference(NONE, EMPTY, NONE, EMPTY, NONE, EMPTY, SPEAKER))


# The configuration


def test_full_size_state_dict_is_that_of_the_manifest(tmp_path: Path) -> None:
    manifest = table("manifest_cosyvoice2_05b")
    config = manifest["qwen2_config"] | {"model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):  # shapes without memory
        llm = Qwen2LM(896, 896, 6561, Qwen2Encoder(str(tmp_path)), ras_sampling)
    found = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in llm.state_dict().items()
    }
    assert found == manifest["llm"]["keys"]
    assert sum(parameter.numel() for parameter in llm.parameters()) == manifest["llm"]["num_parameters"]


def test_only_the_configuration_is_read(tmp_path: Path) -> None:
    shutil.copy(BLANK / "config.json", tmp_path)
    assert Qwen2Encoder(str(tmp_path)).output_size() == 64


def test_weights_that_a_file_fills_are_not_drawn() -> None:
    before = torch.get_rng_state()
    with NoRandomInit():
        Qwen2Encoder(str(BLANK))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "config.json does not exist"),
        ("{", "config.json cannot be read"),
        ("[1]", "config.json has no named values"),
        ({"hidden_size": "64"}, "hidden_size is '64', and should be a whole number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_attention_heads": 5}, "64 channels do not divide into 5 heads that share 2"),
        ({"num_key_value_heads": 3}, "64 channels do not divide into 4 heads that share 3"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, and should be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is neither true nor false"),
        ({"attention_dropout": 1}, "attention_dropout is 1, and should be a share"),
        ({"model_type": "llama"}, "model_type 'llama' is not implemented, only 'qwen2'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling .* is not implemented, only None"),
        ({"use_sliding_window": True}, "use_sliding_window True is not implemented, only False"),
    ],
)
def test_a_broken_configuration_is_one_line(tmp_path: Path, changes: dict | str | None, message: str) -> None:
    if isinstance(changes, dict):
        changes = json.dumps(json.loads((BLANK / "config.json").read_text(encoding="utf-8")) | changes)
    if changes is not None:
        (tmp_path / "config.json").write_text(changes, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        Qwen2Encoder(str(tmp_path))
    assert "\n" not in str(error.value) and "copy the folder CosyVoice-BlankEN again" in str(error.value)


def test_an_untested_release_of_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen2_config.metadata, "version", lambda _: "6.0.1")
    with pytest.raises(InputError, match=r"transformers 6.0.1 was not tested .* pip install 'transformers==5.24.\*'"):
        Qwen2Encoder(str(BLANK))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((896, 64, [5, 15]), "llm_input_size 896 and llm_output_size 64 must be the hidden_size .* 64"),
        ((64, 64, [5]), r"mix_ratio is two sizes of at least 1, of text and of speech, not \[5\]"),
        ((64, 64, [0, 15]), "mix_ratio is two sizes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(plain: Qwen2LM, sizes: tuple, message: str) -> None:
    width_in, width_out, mix_ratio = sizes
    with pytest.raises(InputError, match=message):
        Qwen2LM(width_in, width_out, 6561, plain.llm, ras_sampling, mix_ratio=mix_ratio)


def test_no_folder_is_told() -> None:
    with pytest.raises(InputError, match="name the model's folder CosyVoice-BlankEN"):
        Qwen2Encoder("")
