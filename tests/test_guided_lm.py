"""Training of CosyVoice2's language model with attention that is shown its way through the text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosyvoice.dataset import processor
from cosyvoice.llm.guided import GuidedQwen2LM, guide_loss, guided_places
from cosyvoice.llm.qwen2_encoder import Qwen2Encoder
from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.qwen import get_qwen_tokenizer
from examples.mini2.make_text_model import PIECES, learn_merges
from tools.blank_en import write_blank_en

SIZES = {
    "vocab_size": 544,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
}
CODES = 81
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "CosyVoice-BlankEN"
    write_blank_en(folder, SIZES)
    return folder


def make(kind: type[Qwen2LM], text_model: Path, **options: Any) -> Qwen2LM:
    torch.manual_seed(1)
    return kind(32, 32, CODES, Qwen2Encoder(str(text_model)), sampling=None, **options)


def batch() -> dict[str, Tensor]:
    """Three clips; the text token that is said advances evenly."""
    torch.manual_seed(2)
    texts, spoken = torch.tensor([6, 9, 4]), torch.tensor([12, 20, 7])
    place = torch.zeros(3, 20, dtype=torch.long)
    for item, (count, length) in enumerate(zip(texts, spoken, strict=True)):
        place[item, :length] = torch.arange(length) * count // length
    return {
        "text_token": torch.randint(0, 256, (3, 9)),
        "text_token_len": texts,
        "speech_token": torch.randint(0, CODES, (3, 20)),
        "speech_token_len": spoken,
        "text_place": place,
        "embedding": torch.randn(3, 192),
    }


def test_its_weights_and_its_evaluation_are_those_of_the_model_that_speaks(text_model: Path) -> None:
    guided = make(GuidedQwen2LM, text_model, guided_layers=[1], input_corruption=0.3).eval()
    plain = make(Qwen2LM, text_model).eval()
    plain.load_state_dict(guided.state_dict())
    whole = batch() | {"bistream": torch.tensor([False, True, False])}
    assert guided(whole, CPU).keys() == {"loss", "acc"}
    assert torch.equal(guided(whole, CPU)["loss"], plain(whole, CPU)["loss"])


def test_the_scores_are_those_of_the_head_itself(text_model: Path) -> None:
    """Compared with the attention that transformers computes."""
    lm = make(GuidedQwen2LM, text_model, guided_layers=[0, 2])
    lm.llm.model.set_attn_implementation("eager")
    frames = torch.randn(2, 11, 32)
    with lm.listening() as scores:
        found = lm.llm.model.model(inputs_embeds=frames, output_attentions=True).attentions
    assert len(scores) == 2
    for score, layer in zip(scores, (0, 2), strict=True):
        torch.testing.assert_close(score.softmax(dim=-1), found[layer][:, 0])


def test_places_are_where_the_text_lies() -> None:
    """Row 1 + texts follows the task mark, which the first speech token follows; columns count the start mark."""
    given = batch() | {"bistream": torch.tensor([False, True, False])}
    (items, rows), columns = guided_places(given, CPU)
    assert items.tolist() == [0] * 12 + [2] * 7
    assert rows.tolist() == [*range(7, 19), *range(5, 12)]
    assert columns[0].tolist() == [1, 1, 2] and columns[11].tolist() == [5, 6, 6] and columns[12].tolist() == [1, 1, 2]


def test_attention_learns_the_way(text_model: Path) -> None:
    lm = make(GuidedQwen2LM, text_model, guided_layers=[1, 2], bistream_share=0.0).train()
    optimiser, losses = torch.optim.Adam(lm.parameters(), lr=3e-3), []
    for _ in range(40):
        found = lm(batch(), CPU)
        losses.append(float(found["loss_aligner"]))
        optimiser.zero_grad()
        found["loss_aligner"].backward()
        optimiser.step()
    assert losses[-1] < 0.3 < 1 < losses[0]


def test_the_loss_is_minus_the_log_of_what_the_right_columns_get() -> None:
    scores = torch.tensor([[[0.0, -torch.inf, -torch.inf], [0.0, 1.0, -torch.inf], [1.0, 2.0, 3.0]]])
    rows = torch.tensor([0, 0]), torch.tensor([1, 2])
    weights = scores.softmax(dim=-1)[0]
    expected = -(weights[1, 0].log() + (weights[2, 0] + weights[2, 1]).log()) / 2
    torch.testing.assert_close(guide_loss(scores, rows, torch.tensor([[0, 0], [0, 1]])), expected)
    assert guide_loss(scores, (rows[0][:0], rows[1][:0]), torch.zeros(0, 2, dtype=torch.long)) == 0


def test_what_is_read_is_corrupted_in_training_only(text_model: Path) -> None:
    lm = make(GuidedQwen2LM, text_model, guided_layers=[0], input_corruption=0.25)
    speech = torch.randint(0, CODES, (4, 500))
    assert torch.equal(lm.eval().heard(speech), speech)
    assert 0.2 < (lm.train().heard(speech) != speech).float().mean() < 0.3


@pytest.mark.parametrize("layers", [[], [3], [-1]])
def test_impossible_settings_are_refused(text_model: Path, layers: list[int]) -> None:
    with pytest.raises(InputError, match="must be some of the 3 layers"):
        make(GuidedQwen2LM, text_model, guided_layers=layers)
    with pytest.raises(InputError, match="input_corruption is a share"):
        make(GuidedQwen2LM, text_model, guided_layers=[0], input_corruption=1)


# The text


def test_pieces_belong_to_the_words_they_end_in(text_model: Path) -> None:
    tokenizer = get_qwen_tokenizer(str(text_model), skip_special_tokens=True)
    for text in ("Now the day is over.", " It's  naïve, isn't it? ", "the\nway", "x", "日本 の"):
        words = tokenizer.encode_words(text)
        assert sum(words, []) == tokenizer.encode(text)
        assert len(words) == len(text.split())
    assert [tokenizer.decode(word).strip() for word in tokenizer.encode_words("Now the day")] == ["Now", "the", "day"]


def test_places_of_a_higher_rate_are_read_in_their_middle(tmp_path: Path) -> None:
    (tmp_path / "a.places").write_text("0 0.25 0.5 0.75 1 1.25 1.5")
    sample = {"wav": str(tmp_path / "a.wav"), "word_token_counts": [4, 4], "speech_token": [1, 2, 3, 4]}
    (found,) = processor.read_places([sample], places_a_token=2)
    assert found["text_place"].tolist() == [1, 3, 5, 6]


@pytest.mark.parametrize(("tokens", "places_a_token"), [(20, 1), (40, 2), (80, 1)])
def test_places_of_another_token_rate_are_refused(tokens: int, places_a_token: int, tmp_path: Path) -> None:
    (tmp_path / "a.places").write_text("0.5 " * 40)
    sample = {"wav": str(tmp_path / "a.wav"), "word_token_counts": [4], "speech_token": list(range(tokens))}
    message = f"a.places has 40 numbers, but with places_a_token {places_a_token} it needs {tokens * places_a_token}"
    with pytest.raises(InputError, match=message):
        list(processor.read_places([sample], places_a_token=places_a_token))


def test_merges_shorten_the_texts(tmp_path: Path) -> None:
    words = Path(__file__).read_text(encoding="utf-8").splitlines()
    merges = learn_merges(words)
    assert len(merges) == PIECES == len({"".join(pair) for pair in merges})
    write_blank_en(tmp_path, SIZES, merges)
    tokenizer = get_qwen_tokenizer(str(tmp_path), skip_special_tokens=True)
    text = words[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < 0.6 * len(text)
