"""What helps the language model where it is trained from scratch, and stays out of everything else."""

import gzip
import math
import re
from collections.abc import Callable
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
from cosyvoice.llm.guided_attention import AttentionGuide
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.transformer.encoder import ConformerEncoder, TransformerEncoder
from cosyvoice.utils.checkpoint import load_strict, read_state_dict
from cosyvoice.utils.common import ras_sampling
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.model_yaml import load_model_yaml
from llm_flow_model import JointModel

CPU = torch.device("cpu")
WIDTH, VOCABULARY = 16, 10
GUIDED = {"layers": [0, 1], "head": 1, "weight": 0.5, "width": 0.2}


def small(**options: Any) -> TransformerLM:
    torch.manual_seed(0)
    sizes = {"input_size": WIDTH, "output_size": WIDTH, "attention_heads": 2, "linear_units": 32, "num_blocks": 2}
    rates = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0}
    text_encoder = ConformerEncoder(**sizes, **rates, use_cnn_module=True)
    llm = TransformerEncoder(**sizes, **rates, static_chunk_size=1, input_layer="linear_legacy")
    return TransformerLM(WIDTH, WIDTH, WIDTH, 256, VOCABULARY, text_encoder, llm, ras_sampling, **options)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "text_token": torch.randint(0, 256, (2, 6), generator=generator),
        "text_token_len": torch.tensor([6, 4]),
        "speech_token": torch.randint(0, VOCABULARY, (2, 20), generator=generator),
        "speech_token_len": torch.tensor([20, 13]),
        "embedding": torch.randn(2, 192, generator=generator),
    }


# Corrupted input


def test_corruption_replaces_its_share_of_the_input_and_no_target() -> None:
    llm = small(input_corruption=0.2).train()
    tokens = torch.full((100, 200), VOCABULARY - 1)
    heard = llm.corrupted(tokens)
    changed = (heard != tokens).float().mean().item()
    assert changed == pytest.approx(0.2 * (1 - 1 / VOCABULARY), abs=0.01)  # a tenth of the draws hit the same token
    counts = heard.flatten().bincount(minlength=VOCABULARY)[:-1]
    assert len(counts) == VOCABULARY - 1 and counts.min() > 0.8 * counts.max()
    seen = {}
    llm.criterion_ce.register_forward_pre_hook(lambda module, inputs: seen.update(target=inputs[1]))
    llm(batch(), CPU)
    clips = zip(batch()["speech_token"], batch()["speech_token_len"], strict=True)
    expected = [token for tokens, length in clips for token in [*tokens[:length].tolist(), VOCABULARY]]
    assert seen["target"].flatten().tolist() == expected


def test_corruption_is_of_training_only() -> None:
    plain, corrupted = small(), small(input_corruption=0.5)
    assert torch.equal(corrupted.eval()(batch(), CPU)["loss"], plain.eval()(batch(), CPU)["loss"])
    assert not torch.equal(corrupted.train()(batch(), CPU)["loss"], plain.train()(batch(), CPU)["loss"])


@pytest.mark.parametrize("share", [-0.1, 1.0, "much"])
def test_impossible_corruption_is_refused(share: object) -> None:
    with pytest.raises(InputError, match="input_corruption"):
        small(input_corruption=share)


# Guided attention

TEXT, SPEECH = 4, 8
FRAMES = 2 + TEXT + SPEECH


def attending(where: Callable[[int], int]) -> Tensor:
    """(1, L, L) weights of speech positions that each attend to one position alone."""
    weights = torch.zeros(1, FRAMES, FRAMES)
    for n in range(SPEECH):
        weights[0, 2 + TEXT + n, where(n)] = 1
    return weights


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (lambda n: 2 + n * TEXT // SPEECH, lambda d: 1 - d),  # the diagonal, or half a letter beside it
        (lambda n: 0, lambda d: 1.0),  # the start
        (lambda n: 2 + TEXT + n, lambda d: 1.0),  # itself
    ],
)
def test_the_guides_loss_in_closed_form(where: Callable, expected: Callable) -> None:
    width = 0.1
    guide = AttentionGuide([0], weight=3.0, width=width)
    beside = math.exp(-((1 / SPEECH) ** 2) / (2 * width**2))  # every second position lies 1/8 beside the diagonal
    loss = guide.loss([attending(where)], torch.tensor([TEXT]), torch.tensor([SPEECH]))
    assert loss.item() == pytest.approx(3.0 * expected((1 + beside) / 2), rel=1e-6)


def test_known_places_take_the_diagonals_place() -> None:
    """Tokens say the letters 0 0 0 1 1 2 3 of four; the last position, which asks for the end, belongs to the last."""
    places = [0, 0, 0, 1, 1, 2, 3]
    guide = AttentionGuide([0], tokens=0.5)
    lengths, known = (torch.tensor([TEXT]), torch.tensor([SPEECH])), torch.tensor([places])
    at_place = attending(lambda n: 2 + [*places, TEXT - 1][n])
    assert guide.loss([at_place], *lengths, known).item() == pytest.approx(0, abs=1e-6)
    before = attending(lambda n: 1 + [*places, TEXT - 1][n])
    beside = math.exp(-(1**2) / (2 * 0.5**2))
    off_text = 3 / SPEECH  # before the first letter
    assert guide.loss([before], *lengths, known).item() == pytest.approx(1 - beside * (1 - off_text), rel=1e-5)


def test_the_guide_ignores_padding_and_other_rows() -> None:
    guide = AttentionGuide([0])
    lengths = torch.tensor([TEXT]), torch.tensor([SPEECH])
    weights = torch.rand(1, FRAMES, FRAMES)
    alone = guide.loss([weights], *lengths)
    weights[:, : 2 + TEXT] = 7.0
    padded = torch.nn.functional.pad(weights, (0, 3, 0, 3), value=7.0)
    torch.testing.assert_close(guide.loss([padded], *lengths), alone)


def test_the_guide_is_a_term_of_training_beside_the_cross_entropy() -> None:
    plain, guided = small(), small(guided_attention=GUIDED)
    assert guided.state_dict().keys() == plain.state_dict().keys()
    losses = guided.train()(batch(), CPU)
    assert torch.equal(losses["loss"], plain.train()(batch(), CPU)["loss"])
    assert 0 < losses["loss_guide"] < GUIDED["weight"]
    assert guided.eval()(batch(), CPU).keys() == {"loss", "acc"}


def test_guided_training_pulls_the_head_to_the_diagonal() -> None:
    llm = small(guided_attention=GUIDED | {"weight": 1.0}).train()
    optimizer = torch.optim.Adam(llm.parameters(), lr=0.01)
    terms = []
    for _ in range(40):
        losses = llm(batch(), CPU)
        optimizer.zero_grad()
        (losses["loss"] + losses["loss_guide"]).backward()
        optimizer.step()
        terms.append(losses["loss_guide"].item())
    assert terms[-1] < 0.5 * terms[0]


def test_the_recipe_minimises_both_and_logs_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SpeechModel(small(guided_attention=GUIDED), {"grad_clip": 5}, seed=0).train()
    recorded = {}
    monkeypatch.setattr(model, "record", lambda losses, clips: recorded.update(losses))
    total = model.training_step(batch() | {"utts": ["a", "b"]}, 0)
    torch.testing.assert_close(total.detach(), recorded["loss"] + recorded["loss_guide"])
    assert model.eval().validation_losses(batch()).keys() == {"loss", "acc"}


def test_few_shot_training_meets_neither() -> None:
    """Its loss, which has thresholds, stays the base model's cross entropy on the tokens as they are."""
    losses = []
    for options in ({}, {"guided_attention": GUIDED, "input_corruption": 0.5}):
        model = JointModel({"llm": small(**options)}, JOINT_TRAINING_CONFIG, 0, torch.zeros(192), {}).train()
        losses.append(model.losses(batch(), ["llm"]))
    assert losses[0].keys() == losses[1].keys() == {"llm_loss", "llm_acc"}
    assert torch.equal(losses[0]["llm_loss"], losses[1]["llm_loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [2]}, "blocks from 0 to 1, not"),
        ({"layers": [0, 0]}, "layers"),
        ({"layers": 1}, "layers"),
        ({"head": 2}, "head is one of 0 to 1, not 2"),
        ({"width": 0}, "width must be above 0"),
        ({"weight": "1"}, "weight must be above 0"),
        ({"heads": [0]}, "takes layers and maybe head"),
    ],
)
def test_impossible_guides_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(guided_attention=GUIDED | change)
    with pytest.raises(InputError, match="takes layers"):
        small(guided_attention={"head": 0})


# A small model by its YAML


UNITS = """get_tokenizer: !name:cosyvoice.tokenizer.phones.get_phone_tokenizer
    lexicon: !file lexicon.txt.gz
"""
EXTRA = """    text_token_size: 311
    input_corruption: 0.05
    guided_attention: {layers: [1], head: 0, weight: 1.0, width: 0.15}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A recipe that uses all of it."""
    path = write_config(tmp_path, max_frames_in_batch=200)
    text = path.read_text(encoding="utf-8")
    for old, new in {
        r"    text_token_size: .*\n": EXTRA,
        r"(?<=        static_chunk_size: )1": "0",  # the text encoder's comes first
        r"use_cnn_module: False": "use_cnn_module: True\n        cnn_module_kernel: 7",
        r"get_tokenizer: !name.*\n(    .*\n)+": UNITS,
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
    assert llm.guide.layers == [1] and llm.text_embedding.weight.size(0) == 311
    export_jit.export(llm.text_encoder.eval(), folder / "text_encoder.zip")
