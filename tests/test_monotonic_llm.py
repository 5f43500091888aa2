"""The language model that walks through the text, and the aligner that finds where recorded speech is in it."""

import gzip
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipe import write_config, write_corpus
from torch import Tensor

from config import JOINT_TRAINING_CONFIG
from cosyvoice.bin import export_jit, train
from cosyvoice.bin.recipe_models import SpeechModel
from cosyvoice.llm.aligner import monotonic_path
from cosyvoice.llm.corruption import corrupted
from cosyvoice.llm.monotonic import LARGEST_STEP, MonotonicLM
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.model_folder.weights import load_strict, read_state_dict
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.encoder import ConformerEncoder, TransformerEncoder
from cosyvoice.utils.common import ras_sampling
from dataset import Clip, collate, find_places
from llm_flow_model import JointModel

CPU = torch.device("cpu")
WIDTH, UNITS, CODES = 32, 8, 16
NONE = torch.zeros(1, 0, dtype=torch.long)
SAMPLING = partial(ras_sampling, top_p=0.5, tau_r=1.1)  # repetitions are right here


def small(**options: Any) -> MonotonicLM:
    torch.manual_seed(0)
    sizes = {"input_size": WIDTH, "output_size": WIDTH, "attention_heads": 2, "linear_units": 64, "num_blocks": 2}
    rates = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0}
    text_encoder = ConformerEncoder(**sizes, **rates, use_cnn_module=True, cnn_module_kernel=3)
    llm = TransformerEncoder(**sizes, **rates, static_chunk_size=1, input_layer="linear_legacy")
    return MonotonicLM(WIDTH, WIDTH, WIDTH, UNITS, CODES, text_encoder, llm, SAMPLING, **options).eval()


def sentences(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Text, tokens and places: unit u is said by 2 + u % 3 tokens 2u and 2u + 1 in turn."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        count = int(torch.randint(3, 8, (), generator=generator))
        text = torch.randint(1, UNITS, (count,), generator=generator).cumsum(0) % UNITS  # no unit twice in a row
        lengths = 2 + text % 3
        places = torch.arange(len(text)).repeat_interleave(lengths)
        numbers = torch.cat([torch.arange(int(length)) for length in lengths])
        found.append((text, 2 * text[places] + numbers % 2, places))
    return found


def batch_of(items: list[tuple[Tensor, Tensor, Tensor]], places: bool = True) -> dict[str, Tensor]:
    def padded(column: int, value: int = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([item[column] for item in items], True, value)

    batch = {
        "text_token": padded(0),
        "text_token_len": torch.tensor([len(item[0]) for item in items], dtype=torch.int32),
        "speech_token": padded(1),
        "speech_token_len": torch.tensor([len(item[1]) for item in items], dtype=torch.int32),
        "embedding": torch.zeros(len(items), 192),
    }
    return batch | ({"text_place": padded(2)} if places else {})


@pytest.fixture(scope="module")
def trained() -> MonotonicLM:
    llm = small().train()
    optimizer = torch.optim.Adam(llm.parameters(), lr=3e-3)
    for step in range(150):
        losses = llm(batch_of(sentences(8, step)), CPU)
        optimizer.zero_grad()
        (losses["loss"] + losses["loss_aligner"]).backward()
        optimizer.step()
    return llm.eval()


def test_it_reads_what_it_has_learned(trained: MonotonicLM) -> None:
    for text, tokens, _ in sentences(6, seed=1000):
        prefix = (NONE, NONE, torch.zeros(1, 192))
        assert trained.best_take(text.unsqueeze(0), *prefix) == tokens.tolist()


def test_places_that_are_found_once_give_the_same_losses(trained: MonotonicLM) -> None:
    mel, vector = torch.zeros(1, 80), torch.zeros(192)
    clips = [Clip("", "", text, speech, mel, vector) for text, speech, _ in sentences(5, seed=3)]
    expected, _ = trained.clip_losses(collate(clips), CPU)
    find_places(clips, trained)
    assert all(clip.text_place.shape == clip.speech_token.shape for clip in clips)
    found, _ = trained.clip_losses(collate(clips), CPU)
    torch.testing.assert_close(found, expected)


def test_the_aligner_finds_the_places(trained: MonotonicLM) -> None:
    items = sentences(8, seed=1000)
    batch = batch_of(items)
    lengths = batch["speech_token_len"], batch["text_token"], batch["text_token_len"]
    found = trained.aligner.places(batch["speech_token"], *lengths)
    assert torch.equal(found, batch["text_place"])
    assert trained(batch_of(items, places=False), CPU) == trained(batch, CPU)


def test_steps_of_decoding_are_those_of_training(trained: MonotonicLM) -> None:
    """The probabilities of tokens that are sent one by one are those of the whole sequence at once."""
    text, tokens, places = sentences(1, seed=5)[0]
    embedding = torch.randn(1, 192)
    batch = batch_of([(text, tokens, places)]) | {"embedding": embedding}
    seen = {}
    handle = trained.llm_decoder.register_forward_hook(lambda layer, inputs, scores: seen.update(scores=scores))
    with torch.inference_mode():
        trained(batch, CPU)
        handle.remove()
        expected = seen["scores"]
        following = trained.following(trained.inference_prefix(text.unsqueeze(0), NONE, NONE, embedding), 100)
        steps = [next(following).clone(), *(following.send(token).clone() for token in tokens.tolist())]
    found = torch.stack(steps)
    torch.testing.assert_close(found[:, :CODES], expected.log_softmax(dim=-1)[:, :CODES], rtol=1e-3, atol=1e-3)
    last = places == len(text) - 1
    assert torch.equal(found[: len(tokens), CODES].isfinite(), last)  # it does not end before the text does


def test_texts_side_by_side_and_alone_get_the_same_tokens(trained: MonotonicLM) -> None:
    texts = [text.unsqueeze(0) for text, _, _ in sentences(3, seed=7)]
    torch.manual_seed(0)
    together = trained.inference_together(texts, torch.zeros(1, 192), [nullcontext()] * 3)
    for text, tokens in zip(texts, together, strict=True):
        length, none = torch.tensor([text.size(1)]), torch.tensor([0])
        assert list(trained.inference(text, length, NONE, none, NONE, none, torch.zeros(1, 192))) == tokens


def test_a_text_that_it_cannot_read_ends(trained: MonotonicLM) -> None:
    stuck = small()
    stuck.load_state_dict(trained.state_dict())
    stuck.step.bias.data[0] += 100.0  # no unit is ever over
    text = torch.arange(UNITS).repeat(5).unsqueeze(0)
    assert len(stuck.best_take(text, NONE, NONE, torch.zeros(1, 192))) == 6 * 5 * UNITS + 25


def test_a_prompt_is_aligned_and_not_said_again(trained: MonotonicLM) -> None:
    (prompt_text, prompt_tokens, _), (text, tokens, _) = sentences(2, seed=9)
    found = trained.best_take(
        text.unsqueeze(0), prompt_text.unsqueeze(0), prompt_tokens.unsqueeze(0), torch.zeros(1, 192)
    )
    assert found == tokens.tolist()
    without_text = trained.best_take(text.unsqueeze(0), NONE, prompt_tokens.unsqueeze(0), torch.zeros(0, 192))
    assert without_text


def test_the_loss_of_clips_is_the_loss_of_their_batch(trained: MonotonicLM) -> None:
    batch = batch_of(sentences(4, seed=3))
    losses, accuracy = trained.clip_losses(batch, CPU)
    counts = batch["speech_token_len"] + 1
    whole = trained(batch, CPU)
    torch.testing.assert_close((losses * counts).sum() / counts.sum(), whole["loss"])
    assert accuracy == whole["acc"] and whole.keys() == {"loss", "acc"}
    alone = [trained(batch_of([item]), CPU)["loss"] for item in sentences(4, seed=3)]
    torch.testing.assert_close(torch.stack(alone), losses, rtol=1e-4, atol=1e-5)


def test_the_recipe_adds_the_aligners_term(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SpeechModel(small(), {"grad_clip": 5}, seed=0).train()
    recorded = {}
    monkeypatch.setattr(model, "record", lambda losses, clips: recorded.update(losses))
    total = model.training_step(batch_of(sentences(2)) | {"utts": ["a", "b"]}, 0)
    torch.testing.assert_close(total.detach(), recorded["loss"] + recorded["loss_aligner"])


def test_few_shot_training_finds_places_itself_and_corrupts_nothing() -> None:
    losses = []
    for options in ({}, {"input_corruption": 0.5}):
        model = JointModel({"llm": small(**options)}, JOINT_TRAINING_CONFIG, 0, torch.zeros(192), {}).train()
        losses.append(model.losses(batch_of(sentences(4), places=False), ["llm"]))
    assert losses[0]["llm_loss"] == losses[1]["llm_loss"] > 0


def test_corruption_replaces_its_share_of_the_input() -> None:
    tokens = torch.full((100, 200), CODES - 1)
    changed = (corrupted(tokens, 0.2, CODES) != tokens).float().mean().item()
    assert changed == pytest.approx(0.2 * (1 - 1 / CODES), abs=0.01)  # some draws hit the same token


def test_corruption_changes_the_losses_of_training_only() -> None:
    llm, clean = small(input_corruption=0.5), small()
    batch = batch_of([(torch.arange(UNITS), torch.arange(3), torch.arange(3))])
    assert torch.equal(llm.eval()(batch, CPU)["loss"], clean.eval()(batch, CPU)["loss"])
    assert not torch.equal(llm.train()(batch, CPU)["loss"], clean.train()(batch, CPU)["loss"])


@pytest.mark.parametrize("share", [-0.1, 1.0, "much"])
def test_impossible_corruption_is_refused(share: object) -> None:
    with pytest.raises(InputError, match="input_corruption"):
        small(input_corruption=share)


def test_steps_longer_than_the_largest_are_cut() -> None:
    text, tokens = torch.arange(UNITS).repeat(3), torch.tensor([0, 1, 2])
    far = (text, tokens, torch.tensor([0, LARGEST_STEP + 5, 3 * UNITS - 1]))
    assert small()(batch_of([far]), CPU)["loss"].isfinite()


# The path


def test_the_path_follows_the_best_scores_and_never_goes_back() -> None:
    scores = torch.full((6, 3), -5.0)
    for token, unit in enumerate([0, 0, 1, 1, 2, 2]):
        scores[token, unit] = 0.0
    assert monotonic_path(scores).tolist() == [0, 0, 1, 1, 2, 2]
    scores[4] = torch.tensor([0.0, -1.0, -5.0])  # the best column lies behind
    assert monotonic_path(scores).tolist() == [0, 0, 1, 1, 1, 2]


def test_the_path_passes_over_what_nobody_said_only() -> None:
    scores = torch.full((4, 3), -20.0)
    scores[:2, 0] = scores[2:, 2] = 0.0
    assert monotonic_path(scores).tolist() == [0, 0, 2, 2]
    scores[1, 1] = -1.0
    assert monotonic_path(scores).tolist() == [0, 1, 2, 2]


def test_a_path_through_more_units_than_it_has_tokens() -> None:
    path = monotonic_path(torch.zeros(2, 9))
    assert len(path) == 2 and 0 <= path[0] <= path[1] < 9
    assert monotonic_path(torch.zeros(1, 1)).tolist() == [0]


# A small model by its YAML


LEXICON_YAML = """get_tokenizer: !name:cosyvoice.tokenizer.phones.get_phone_tokenizer
    lexicon: !file lexicon.txt.gz
"""
EXTRA = """    text_token_size: 311
    input_corruption: 0.05
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A recipe that uses all of it."""
    path = write_config(tmp_path, max_frames_in_batch=200)
    text = path.read_text(encoding="utf-8")
    for old, new in {
        r"cosyvoice.llm.llm.TransformerLM": "cosyvoice.llm.monotonic.MonotonicLM",
        r"    text_token_size: .*\n": EXTRA,
        r"(?<=        static_chunk_size: )1": "0",  # the text encoder's comes first
        r"use_cnn_module: False": "use_cnn_module: True\n        cnn_module_kernel: 7",
        r"get_tokenizer: !name.*\n(    .*\n)+": LEXICON_YAML,
        r"(?<=processor.tokenize\n)": "    spelled_share: 0.5\n",
        r"scheduler: warmuplr\n( +)scheduler_conf:": r"scheduler: cosine\n\1scheduler_conf:\n\1\1total_steps: 20",
    }.items():
        text, count = re.subn(old, new, text, count=1)
        assert count, old
    path.write_text(text, encoding="utf-8")
    (tmp_path / "lexicon.txt.gz").write_bytes(gzip.compress(b"a ax0\nthe dh ax0\n"))
    return path


def test_all_of_it_are_settings_of_the_recipes_yaml(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data, folder = write_corpus(config.parent), config.parent / "llm"
    paths = {"config": config, "train_data": data, "cv_data": data, "model_dir": folder, "tensorboard_dir": folder}
    options = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    assert train.main(["--model", "llm", *options, "--max_epoch", "2"]) == 0
    first, second = (yaml.safe_load((folder / f"epoch_{i}_whole.yaml").read_text())["loss_dict"] for i in range(2))
    assert second["loss"] < first["loss"] and second.keys() == {"loss", "acc"}
    llm = load_model_yaml(config, parts=("llm",))["llm"]
    load_strict(llm, read_state_dict(folder / "epoch_1_whole.pt"), "epoch_1_whole.pt")
    assert isinstance(llm, MonotonicLM) and llm.text_embedding.weight.size(0) == 311
    export_jit.export(llm.text_encoder.eval(), folder / "text_encoder.zip")
