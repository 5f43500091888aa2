"""CosyVoice2-mini: its text model's pieces and spelling lessons, and its language model in training."""

import gzip
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from cosyvoice.bin.text_model import start_from_text_model
from cosyvoice.llm.corrupted_qwen2_lm import CorruptedQwen2LM
from cosyvoice.llm.qwen2_encoder import Qwen2Encoder
from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.phones import PHONES, PhoneTokenizer
from cosyvoice.tokenizer.qwen import QwenTokenizer, get_qwen_tokenizer
from examples.mini import encoder_training
from examples.mini2 import train_text_model
from examples.mini2.make_text_model import PIECES, learn_merges
from examples.mini2.spelling import BATCH, SILENCE, Speller, next_phones_right
from tools.blank_en import write_blank_en

SIZES = {
    "vocab_size": 544,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
}
CODES = 81
CONFIG = """
qwen_pretrain_path: ''
llm_training: !new:cosyvoice.llm.corrupted_qwen2_lm.CorruptedQwen2LM
    llm_input_size: 32
    llm_output_size: 32
    speech_token_size: 81
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: !ref <qwen_pretrain_path>
    sampling: !name:cosyvoice.utils.common.ras_sampling
    input_corruption: 0.05
"""
TEXT = "Cat is, day."


@pytest.fixture
def text_model(tmp_path: Path) -> Path:
    write_blank_en(tmp_path / "CosyVoice-BlankEN", SIZES)
    return tmp_path / "CosyVoice-BlankEN"


@pytest.fixture
def letters(text_model: Path) -> QwenTokenizer:
    return get_qwen_tokenizer(str(text_model), skip_special_tokens=True)


def lexicon_of(folder: Path, *lines: str) -> Path:
    path = folder / "lexicon.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture
def speller(letters: QwenTokenizer, tmp_path: Path) -> Speller:
    lexicon = PhoneTokenizer(lexicon_of(tmp_path, "cat k ae1 t", "is ih1 z", "day d ey1"))
    return Speller(letters, lexicon, ["cat", "is", "day"], [])


def test_the_phones_follow_the_text(speller: Speller, letters: QwenTokenizer) -> None:
    text, phones = speller.lesson(TEXT)
    runs = [(phone, len(list(run))) for phone, run in groupby(phones)]
    told = [PHONES[phone] if phone != SILENCE else "-" for phone, _ in runs]
    assert told == ["-", "k", "ae1", "t", "ih1", "z", "-", "d", "ey1", "-"]
    assert all(1 <= frames <= (5 if phone == SILENCE else 3) for phone, frames in runs)
    assert text == letters.encode(TEXT)


def test_the_share_of_right_phones_is_counted_where_a_phone_begins(speller: Speller) -> None:
    """A model that knows the answer gets all right, one that always says the same class few."""
    batch = speller.draw_batch()

    class Told:
        training = False

        def __init__(self, scores: torch.Tensor) -> None:
            self.scores = scores

        def eval(self) -> None: ...

        def predictions(self, told: dict[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
            lengths = told["speech_token_len"] + 1  # with the end
            return self.scores, torch.tensor([]), torch.arange(BATCH).repeat_interleave(lengths)

    pairs = list(zip(batch["speech_token"], batch["speech_token_len"], strict=True))
    asked = torch.cat([torch.cat((phones[:length], torch.tensor([81]))) for phones, length in pairs])
    assert next_phones_right(Told(torch.eye(84)[asked]), batch) == 1
    assert next_phones_right(Told(torch.eye(84)[torch.zeros_like(asked)]), batch) < 0.5


def test_a_killed_training_ends_as_an_undisturbed_one(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the training on speech starts from what it wrote."""
    lexicon = lexicon_of(tmp_path, *(f"{a}{b} {a} {b}" for a in "bdfgk" for b in "lmnprszv"))
    (tmp_path / "text").write_text("utt bl dm fn\n")
    config = tmp_path / "cosyvoice2.yaml"
    config.write_text(CONFIG)
    monkeypatch.setattr(encoder_training, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(train_text_model, "HELD_OUT", 15)
    step = encoder_training.Training._step

    def killed(self: encoder_training.Training, number: int, *arguments: object) -> float:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, *arguments)

    def train(folder: Path) -> None:
        paths = {"--config": config, "--text_model": folder, "--lexicon": lexicon, "--texts": tmp_path / "text"}
        options = [str(part) for pair in paths.items() for part in pair]
        train_text_model.main([*options, "--steps", "4", "--seed", "7"])

    whole, stopped = (Path(shutil.copytree(text_model, tmp_path / name)) for name in ("whole", "stopped"))
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoder_training.Training, "_step", killed)
        train(stopped)
    train(stopped)
    assert "continuing after step 2" in capsys.readouterr().out
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert weights[0] == weights[1]

    overrides = {"qwen_pretrain_path": str(whole)}
    model = load_model_yaml(config, ("llm_training",), overrides=overrides)["llm_training"]
    before = model.llm.embed_tokens.weight.clone()
    start_from_text_model(model, whole)
    assert not torch.equal(before, model.llm.embed_tokens.weight)


def test_merges_shorten_the_texts(tmp_path: Path) -> None:
    words = Path(__file__).read_text(encoding="utf-8").splitlines()
    merges = learn_merges(words)
    assert len(merges) == PIECES == len({"".join(pair) for pair in merges})
    write_blank_en(tmp_path, SIZES, merges)
    tokenizer = get_qwen_tokenizer(str(tmp_path), skip_special_tokens=True)
    text = words[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < 0.6 * len(text)


# The language model


def language_model(kind: type[Qwen2LM], text_model: Path, **options: Any) -> Qwen2LM:
    torch.manual_seed(1)
    return kind(32, 32, CODES, Qwen2Encoder(str(text_model)), sampling=None, **options)


def test_its_weights_and_its_evaluation_are_those_of_the_model_that_speaks(text_model: Path, speller: Speller) -> None:
    trained = language_model(CorruptedQwen2LM, text_model, input_corruption=0.3).eval()
    plain = language_model(Qwen2LM, text_model).eval()
    plain.load_state_dict(trained.state_dict())
    batch = speller.draw_batch() | {"bistream": torch.arange(BATCH) % 2 == 0}
    for name, value in plain(batch, torch.device("cpu")).items():
        assert torch.equal(trained(batch, torch.device("cpu"))[name], value)


def test_what_is_read_is_corrupted_in_training_only(text_model: Path) -> None:
    lm = language_model(CorruptedQwen2LM, text_model, input_corruption=0.25)
    speech = torch.randint(0, CODES, (4, 500))
    assert torch.equal(lm.eval().heard(speech), speech)
    assert 0.2 < (lm.train().heard(speech) != speech).float().mean() < 0.3


def test_an_impossible_share_is_refused(text_model: Path) -> None:
    with pytest.raises(InputError, match="input_corruption is a share"):
        language_model(CorruptedQwen2LM, text_model, input_corruption=1)
