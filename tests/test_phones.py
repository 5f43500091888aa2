"""Phones as text units: what a text becomes, what a lexicon may hold, and how a training sample comes to them."""

import gzip
import pickle
import random
from pathlib import Path

import pytest

from cosyvoice.cli.text_normalizer import TextNormalizer, TextSplit
from cosyvoice.dataset import processor
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.phones import PHONES, PhoneTokenizer, get_phone_tokenizer
from cosyvoice.tokenizer.tokenizer import BYTE_IDS, get_byte_tokenizer

LEXICON = """the dh ax0
a ax0
cat k ae1 t
bus b ah1 s
mary m eh1 r iy0
don't d ow1 n t
us ah0 s
US y uw1 eh1 s
a. ey1
b. b iy1
f. eh1 f
i. ay1
s. eh1 s
u. y uw1
"""
YAML = """get_tokenizer: !name:cosyvoice.tokenizer.phones.get_phone_tokenizer
    lexicon: !file lexicon.txt.gz
"""


def write_lexicon(folder: Path, text: str = LEXICON) -> Path:
    path = folder / "lexicon.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> PhoneTokenizer:
    return get_phone_tokenizer(write_lexicon(tmp_path))


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("The cat.", "/dh ax0/ /k ae1 t/."),
        ("Don’t  \n“THE” cat!?", '/d ow1 n t/ "/dh ax0/" /k ae1 t/!?'),
        ("Mary's cats' bus's buses", "/m eh1 r iy0 z/ /k ae1 t s/' /b ah1 s ax0 z/ buses"),
        ("cat-bus cat—bus cat/zzyx", "/k ae1 t/-/b ah1 s/ /k ae1 t/,/b ah1 s/ /k ae1 t//zzyx"),
        ("FBI, FBI's FBIs US us F.B. b.f", "/eh1 f b iy1 ay1/, " + "/eh1 f b iy1 ay1 z/ " * 2
         + "/y uw1 eh1 s/ /ah0 s/ /eh1 f b iy1/. /b iy1 eh1 f/"),
        ("FBX FBIFBI", "fbx fbifbi"),  # x has no name here, and the other is too long for an abbreviation
        ("cät naïve Straße 你好 😀", "/k ae1 t/ naive straße 你好 😀"),
        ("cat3 3 cat_", "/k ae1 t/3 3 /k ae1 t/_"),
        ("Zzyx's", "zzyx's"),
        ("  ", ""),
    ],
)  # fmt: skip
def test_known_words_are_phones_and_all_else_letters(tokenizer: PhoneTokenizer, text: str, units: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == units


def test_phones_follow_the_bytes(tokenizer: PhoneTokenizer) -> None:
    assert len(set(PHONES)) == 55
    assert tokenizer.encode("a?") == [256, BYTE_IDS[ord("?")]]
    assert tokenizer.decode(range(256, 311)) == f"/{' '.join(PHONES)}/"
    assert tokenizer.encode("zx!") == get_byte_tokenizer().encode("zx!")


@pytest.mark.parametrize("kind", ["bytes", "phones"])
def test_any_text_has_units_word_by_word(tokenizer: PhoneTokenizer, kind: str) -> None:
    any_kind = get_byte_tokenizer() if kind == "bytes" else tokenizer
    draw = random.Random(0)
    signs = "aAbsS'’.-, \n\t\x00\x1c\u0301\u00a0\u2003´éÅßİςΣ你1²_😀\u200d\u202e\ufeff\U0010ffff"
    texts = ["".join(draw.choices(signs, k=draw.randrange(40))) for _ in range(1000)]
    for text in [*texts, "x" * 350, "s" * 5000, "'s", "?!…", "\u0301 a", "U.S.'s"]:
        words = any_kind.encode_words(text)
        assert [number for word in words for number in word] == any_kind.encode(text, allowed_special="all")
        if text.strip():
            assert len(words) == len(text.split()) and all(words)
        assert all(0 <= number < 311 for word in words for number in word)
        any_kind.decode([number for word in words for number in word][::-1])


def test_a_word_may_be_spelled_in_letters(tokenizer: PhoneTokenizer) -> None:
    turns = iter([True, False, True, True])
    words = tokenizer.encode_words("Don't, cat Mary's FBI", lambda: next(turns))
    assert [tokenizer.decode(word) for word in words] == ["don't, ", "/k ae1 t/ ", "mary's ", "/eh1 f b iy1 ay1/"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LEXICON.encode(), "not a gzip file of lines"),
        (gzip.compress(LEXICON.encode())[:-20], "not a gzip file of lines"),
        (gzip.compress(b"caf\xe9 k"), "not a gzip file of lines"),
        (gzip.compress(b"the\ncat k ae1 t\n"), "not a gzip file of lines"),
        (gzip.compress(b" k ae1 t\n"), "a line without a word"),
        (gzip.compress(b"cat \n"), "without phones"),
        (gzip.compress(b"cat  \n"), "without phones"),
        (gzip.compress(b""), "has no words"),
    ],
)
def test_a_damaged_lexicon_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "lexicon.txt.gz").write_bytes(content)
    with pytest.raises(InputError, match=f"lexicon.txt.gz.*{message}.*Copy it again") as caught:
        get_phone_tokenizer(tmp_path / "lexicon.txt.gz")
    assert "\n" not in str(caught.value)


def test_letters_of_other_scripts_are_unknown(tokenizer: PhoneTokenizer) -> None:
    assert tokenizer.unknown_letters("Über café, naïve, zzyx: 7 x² …“é”") == []
    assert tokenizer.unknown_letters("The 猫 and мы, 猫") == ["猫", "м", "ы"]


def test_an_unknown_phone_is_told_where_it_is_met(tmp_path: Path) -> None:
    tokenizer = get_phone_tokenizer(write_lexicon(tmp_path, "the dh ax0\ncat k ae2 t\n"))
    assert tokenizer.encode("the")
    with pytest.raises(InputError, match="lexicon.txt.gz: 'cat' has the unknown phone 'ae2'. Use those of ax0 aa0"):
        tokenizer.encode("cat")


def test_the_yaml_names_the_lexicon_beside_it(tmp_path: Path) -> None:
    write_lexicon(tmp_path)
    (tmp_path / "cosyvoice.yaml").write_text(YAML)
    make = load_model_yaml(tmp_path / "cosyvoice.yaml")["get_tokenizer"]
    tokenizer = pickle.loads(pickle.dumps(make))()
    assert tokenizer.decode(tokenizer.encode("The cat")) == "/dh ax0/ /k ae1 t/"


def test_pieces_of_a_text_are_counted_in_phones(tokenizer: PhoneTokenizer) -> None:
    normalizer = TextNormalizer(tokenizer.encode, None, TextSplit(25, 10, 5, 30))
    three_and_one = ["The cat. The cat. The cat.", " The cat."]  # 23 units are the first, but 26 bytes
    assert normalizer.split(" ".join(["The cat."] * 4)) == three_and_one
    nonsense = normalizer.split("zzyx" * 90)
    assert "".join(nonsense) == "zzyx" * 90 + "." and max(map(len, nonsense)) <= 25
    for odd in ("?!", "😀", "你好，世界。", "…"):
        assert "".join(normalizer.split(odd)) in (odd, "")


# In the data pipeline


def tokenized(tokenizer: object, text: str, mode: str = "train", **options: float) -> dict:
    sample = {"text": text, "speech_token": [5, 6, 7, 8], "wav": "u.wav"}
    (sample,) = processor.tokenize([sample], lambda: tokenizer, "all", mode=mode, **options)
    return sample


def test_a_share_of_the_words_is_spelled_in_training(tokenizer: PhoneTokenizer) -> None:
    text = "cat " * 1000
    plain = tokenized(tokenizer, text)
    assert plain["text_token"] == tokenizer.encode(text) and plain["word_token_counts"] == [4] * 999 + [3]
    random.seed(0)
    spelled = tokenized(tokenizer, text, spelled_share=0.3)["text_token"].count(BYTE_IDS[ord("c")])
    assert 250 < spelled < 350
    random.seed(0)
    assert tokenized(tokenizer, text, spelled_share=0.3)["text_token"].count(BYTE_IDS[ord("c")]) == spelled
    state = random.getstate()
    assert tokenized(tokenizer, text, mode="dev", spelled_share=0.3) == plain
    assert random.getstate() == state


def test_a_share_that_cannot_be_is_refused(tokenizer: PhoneTokenizer) -> None:
    with pytest.raises(InputError, match="from 0 to 1"):
        tokenized(tokenizer, "cat", spelled_share=1.5)
    with pytest.raises(InputError, match="works only with get_phone_tokenizer"):
        tokenized(get_byte_tokenizer(), "cat", spelled_share=0.1)


def test_places_are_words_and_shares_of_them(tokenizer: PhoneTokenizer, tmp_path: Path) -> None:
    (tmp_path / "u.places").write_text("0 0.5 1.99\n")
    for any_kind, expected in ((get_byte_tokenizer(), [0, 2, 7, 7]), (tokenizer, [0, 1, 6, 6])):
        sample = {**tokenized(any_kind, "the cat."), "wav": str(tmp_path / "u.wav")}
        (found,) = processor.read_places([sample])
        assert found["text_place"].tolist() == expected  # the last of a token that rounding has added
    for content in ("zero", "", "0 2.0", "-0.1", "nan"):
        (tmp_path / "u.places").write_text(content)
        with pytest.raises(InputError, match="u.places .*again"):
            list(processor.read_places([sample]))
    (tmp_path / "u.places").write_text("0.5 " * 40)
    for tokens in (20, 80):
        with pytest.raises(InputError, match=f"40 numbers for {tokens} speech tokens. Make it for their rate"):
            list(processor.read_places([{**sample, "speech_token": [1] * tokens}]))
    del sample["word_token_counts"]
    with pytest.raises(InputError, match="works word by word"):
        list(processor.read_places([sample]))
