"""The sentences of CosyVoice-mini: distinct, repeatable, none that the model is judged by; no held-out voice."""

from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest

from cosyvoice.dataset import processor
from cosyvoice.tokenizer.phones import get_phone_tokenizer
from cosyvoice.tokenizer.tokenizer import get_byte_tokenizer
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.frames import TOKEN_RATE_HZ
from examples.mini import align_text, make_lexicon
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
from tools.kaldi_folder import write_table


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


def test_phones_find_their_letters(tmp_path: Path) -> None:
    """Spelling with silent letters and double ones, learnt from a few words in many orders."""
    words = {"the": "dh ax", "knot": "n aa t", "bell": "b eh l", "tree": "t r iy", "cat": "k ae t"}
    random = Random(0)
    folders = [tmp_path / "simple", tmp_path / "more"]  # which have names of utterances in common
    spoken = {}
    for folder in folders:
        wavs, texts = {}, {}
        for number in range(30):
            chosen = random.sample(list(words), 4)
            sounds = ["pau", *" ".join(words[word] for word in chosen).split(), "pau"]
            wav = folder / f"u{number:02d}.wav"
            wav.parent.mkdir(exist_ok=True)
            wav.with_suffix(".phones").write_text("".join(f"{0.1 * (i + 1):.3f} {p}\n" for i, p in enumerate(sounds)))
            wavs[wav.stem], texts[wav.stem] = str(wav), " ".join(chosen).capitalize() + "."
            spoken[wav] = texts[wav.stem]
        write_table(wavs, folder / "wav.scp")
        write_table(texts, folder / "text")
    align_text.main(["--dirs", *map(str, folders)])
    before = {wav: wav.with_suffix(".places").stat().st_mtime_ns for wav in spoken}
    align_text.main(["--dirs", *map(str, folders)])  # which finds them
    assert before == {wav: wav.with_suffix(".places").stat().st_mtime_ns for wav in spoken}
    right = total = 0
    for wav, text in spoken.items():
        tokens = round(0.1 * len(wav.with_suffix(".phones").read_text().splitlines()) * TOKEN_RATE_HZ)
        sample = {"wav": str(wav), "text": text, "speech_token": [0] * tokens}
        (sample,) = processor.read_places(processor.tokenize([sample], get_byte_tokenizer, "all"))
        places = sample["text_place"].tolist()
        assert places == sorted(places) and places[-1] < len(text)
        said = [text.lower()[place] for place in places[2::5]]  # the middle of each phone: 0.1 s are five tokens
        consonants = {"n": "n", "t": "t", "b": "b", "l": "l", "r": "r", "k": "c"}
        phones = " ".join(words[word] for word in text.lower().rstrip(".").split()).split()
        pairs = [
            (consonants[phone], letter) for phone, letter in zip(phones, said[1:-1], strict=True) if phone in consonants
        ]
        right, total = right + sum(a == b for a, b in pairs), total + len(pairs)
    assert right > 0.95 * total


def test_a_text_of_many_silent_letters_is_aligned() -> None:
    """An acronym that is read as a word, say: ten letters a phone."""
    letters, phones = np.arange(20), np.array([1, 2])
    [path] = align_text.align([(letters, phones)], lambda passes: passes)
    assert 0 <= path[0] < path[1] < 20


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
