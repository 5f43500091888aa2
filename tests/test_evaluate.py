"""The arithmetic of an evaluation, and the whole of it with judges that are made up: none need be installed."""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
from torch import Tensor

from cosyvoice.utils.errors import InputError
from tools import evaluate, evaluation_report, judges, listening
from tools.bigram import END, START, Bigram
from tools.evaluation_report import Evaluation, table
from tools.measures import (
    STOPS_EARLY_RATIO,
    TALKS_ON_RATIO,
    Clip,
    ClipVoice,
    Words,
    centroid,
    clip_voices,
    figures,
    pace,
    similarities_to_others,
    unit,
    voice_figures,
    word_error_rate,
    word_errors,
    words_of,
    wrong_text_error_rate,
)
from tools.random_model import make_random_model

ROOT = Path(__file__).parents[1]
RECORDINGS = ROOT / "examples" / "raw_audio"
SENTENCES = ROOT / "examples" / "mini" / "eval_sentences.txt"


@pytest.mark.parametrize(
    ("heard", "said", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a x c", "a b c", 1),
        ("a c", "a b c", 1),
        ("a b b c", "a b c", 1),
        ("", "a b c", 3),
        ("b c d e", "a b c", 3),
        ("a b c a b c", "a b c", 3),
    ],
)
def test_word_errors(heard: str, said: str, errors: int) -> None:
    assert word_errors(heard.split(), said.split()) == errors
    assert word_errors(said.split(), heard.split()) == errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It’s here, isn't it?", ["it's", "here", "isn't", "it"]),
        ("'Twas 21 cats - no: 3!", ["twas", "twenty", "one", "cats", "no", "three"]),
        ("Größe", ["größe"]),
        ("你好 3 OK", ["你", "好", "三", "ok"]),
        ("50% of $3.50", ["fifty", "percent", "of", "three", "point", "five", "dollars"]),
        ("?!", []),
    ],
)
def test_words(text: str, words: Words) -> None:
    assert words_of(text) == words


def test_word_error_rate_counts_words_not_sentences() -> None:
    assert word_error_rate([["a"], list("bcdefghi")], [["x"], list("bcdefghi")]) == 1 / 9


def test_the_control_finds_nothing_right_in_other_texts() -> None:
    sentences = [list("abc"), list("def"), list("ghi")]
    assert wrong_text_error_rate(sentences, sentences) == 1
    alike = [list("abc")] * 3
    assert wrong_text_error_rate(alike, alike) == 0  # such sentences cannot show what a judge hears
    assert wrong_text_error_rate([list("abc")], [list("abc")]) is None


def test_pace_is_seconds_by_character() -> None:
    assert pace([1.0, 2.0], [["abc", "de"], ["fghij"]]) == 3 / 10


BIGRAM = Bigram([list("abab"), list("bc"), list("a")])


def test_bigram_probabilities_sum_to_one() -> None:
    for history in BIGRAM.after:
        assert sum(BIGRAM.probability(word, history) for word in BIGRAM.unigrams) == pytest.approx(1)
    assert sum(BIGRAM.unigrams.values()) == pytest.approx(1)
    assert BIGRAM.probability("b", "a") > BIGRAM.probability("c", "a") > 0


def test_the_arpa_text_is_the_bigram() -> None:
    """A reader of ARPA takes a listed bigram, or else the first word's weight and the second's unigram."""
    lines = [line.split() for line in BIGRAM.arpa().splitlines()]
    unigrams = {line[1]: line for line in lines[lines.index(["\\1-grams:"]) + 1 : lines.index(["\\2-grams:"])] if line}
    bigrams = {(line[1], line[2]): float(line[0]) for line in lines if len(line) == 3 and line[2] in BIGRAM.unigrams}
    assert ["ngram", f"1={len(unigrams)}"] in lines and ["ngram", f"2={len(bigrams)}"] in lines
    for history in [START, *"abc"]:
        for word in [*"abc", END]:
            backed_off = float(unigrams[history][2]) + float(unigrams[word][0])
            expected = math.log10(BIGRAM.probability(word, history))
            assert bigrams.get((history, word), backed_off) == pytest.approx(expected, abs=2e-6)


def clip(duration_ratio: float = 1.0, errors: int = 0, voice: ClipVoice | None = None, text: str = "one two") -> Clip:
    """Two words that should take two seconds."""
    heard = " ".join(words_of(text)[errors:])
    return Clip("001", text, heard, 2, errors, 2 * duration_ratio, duration_ratio, {"ear": voice})


def test_figures_of_durations_and_errors() -> None:
    ratios = [1.0, TALKS_ON_RATIO, TALKS_ON_RATIO + 0.1, STOPS_EARLY_RATIO, STOPS_EARLY_RATIO - 0.1]
    found = figures([clip(ratio, errors=1) for ratio in ratios])
    assert (found.sentences, found.talk_on, found.stop_early) == (5, 1, 1)
    assert found.word_error == 0.5
    assert found.duration_ratio == pytest.approx(sum(ratios) / 5)
    assert found.duration_ratio_range == (min(ratios), max(ratios))


def test_the_margin_is_over_the_base_voice_that_is_nearest_on_average() -> None:
    near, far = ClipVoice(0.9, {"anna": 0.8, "bert": 0.2}), ClipVoice(0.5, {"anna": 0.4, "bert": 0.6})
    found = voice_figures([near, None, far])
    assert (found.nearest_base, found.nearer_to_a_base, found.without_voice) == ("anna", 1, 1)
    assert found.similarity == pytest.approx(0.7)
    assert found.nearest_base_similarity == pytest.approx(0.6)
    assert found.margin == pytest.approx(0.1)


def test_what_is_not_measured_stays_open() -> None:
    silent, alone = voice_figures([None, None]), voice_figures([ClipVoice(0.9, {})])
    assert (silent.similarity, silent.margin, silent.without_voice) == (None, None, 2)
    assert (alone.similarity, alone.nearest_base, alone.margin) == (0.9, None, None)


def test_similarity_is_the_cosine() -> None:
    target, base = unit(np.array([1.0, 0.0])), unit(np.array([1.0, 1.0]))
    (voice, none) = clip_voices([target, None], [float(target @ target), None], {"anna": base})
    assert none is None
    assert (voice.target, voice.bases["anna"]) == (1, pytest.approx(math.sqrt(0.5)))
    assert centroid([target, np.array([0.0, 1.0])]) == pytest.approx(base)


def test_an_original_is_not_compared_with_itself() -> None:
    right, up = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert similarities_to_others([up, right, None, right]) == pytest.approx([0, math.sqrt(0.5), None, math.sqrt(0.5)])


def test_the_table_shows_both_sets_and_what_to_know() -> None:
    voice = ClipVoice(0.875, {"anna": 0.5})
    texts = ["one two", "red blue"]
    spoken = [clip(1.25, voice=voice, text=text) for text in texts]
    originals = [clip(1.0, voice=voice) for _ in texts]  # the same text twice: the control must fail
    lines = table(Evaluation({}, 0.1, ["zyx"], spoken, originals, 0.25)).splitlines()
    ends = {line[:40].strip(): line.split()[-2:] for line in lines}
    assert lines[0].split() == ["spoken", "originals"]
    assert ends["duration ratio"] == ["1.250", "1.000"]
    assert ends["margin over it (ear)"] == ["0.375", "0.375"]
    assert ends["real-time factor"] == ["0.250", "–"]
    notes = [line for line in lines if line.startswith("note:")]
    assert len(notes) == 2 and "originals" in notes[0] and "zyx" in notes[1]


@pytest.mark.parametrize(
    ("package", "open_it"), [("pocketsphinx", judges.PocketsphinxJudge), ("resemblyzer", judges.ResemblyzerJudge)]
)
def test_a_missing_judge_names_the_remedy(package: str, open_it: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(InputError, match=f"{package}.*make eval"):
        open_it()


def test_whisper_is_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for weights in (None, Path("tiny")):
        with pytest.raises(InputError, match="--whisper-weights"):
            judges.WhisperJudge(weights, "cpu")
    Path("tiny").write_bytes(b"no model")  # tiny is also the name of a model that whisper would fetch
    with pytest.raises(InputError, match="no Whisper model"):
        judges.WhisperJudge(Path("tiny"), "cpu")


class PerfectJudge:
    """Hears every sentence as it should be, but one word that it does not know."""

    def transcribe(self, wavs_16k: Sequence[Tensor], sentences: Sequence[Words]) -> list[str]:
        assert len(wavs_16k) == len(sentences)
        return [" ".join(word for word in sentence if word != "morning") for sentence in sentences]

    def unknown_words(self, sentences: Sequence[Words]) -> list[str]:
        return ["morning"]


class LoudnessJudge:
    """Takes loudness for voice."""

    name = "loudness"

    def embed(self, wav_16k: Tensor) -> np.ndarray:
        return unit(np.array([1.0, 10 * wav_16k.abs().mean().item()]))


@pytest.fixture
def no_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "open_judge", lambda *_: PerfectJudge())
    monkeypatch.setattr(judges, "open_speaker_judges", lambda _: [LoudnessJudge()])
    monkeypatch.setattr(evaluation_report, "draw", lambda _, path: path.touch())
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture
def folders(tmp_path: Path, model_dir: Path) -> list[str]:
    """Three originals, which are one of the base voices, too; the other whispers."""
    for voice, gain in (("rms", 1.0), ("whisperer", 0.01)):
        (tmp_path / "voices" / voice).mkdir(parents=True)
        for number in ("001", "002", "003"):
            samples, rate = soundfile.read(RECORDINGS / f"{number}.wav")
            soundfile.write(tmp_path / "voices" / voice / f"{number}.wav", gain * samples, rate)
            shutil.copy(RECORDINGS / f"{number}.txt", tmp_path / "voices" / voice)
    voices = ["--reference", str(tmp_path / "voices" / "rms"), "--base-voices", str(tmp_path / "voices")]
    return [*voices, "--model-dir", str(model_dir), "--results", str(tmp_path / "results"), "--device", "cpu"]


@pytest.mark.usefixtures("no_judges")
def test_recordings_are_judged(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([*folders, "--wavs", str(tmp_path / "voices" / "rms")]) == 0
    content = json.loads((tmp_path / "results" / "evaluation.json").read_text(encoding="utf-8"))
    spoken, originals = content["figures"]["spoken"], content["figures"]["originals"]
    assert spoken["word_error"] == originals["word_error"] == pytest.approx(1 / 39)  # "Good morning, everyone, ..."
    assert spoken["wrong_text_word_error"] > 0.7
    assert spoken["duration_ratio"] == originals["duration_ratio"] == pytest.approx(1)
    assert spoken["voices"]["loudness"]["nearest_base"] == "whisperer"  # not rms itself
    assert spoken["voices"]["loudness"]["margin"] > 0.01 and spoken["voices"]["loudness"]["nearer_to_a_base"] == 0
    # of the same recordings; but as originals, each is compared with the others alone
    assert originals["voices"]["loudness"]["similarity"] < spoken["voices"]["loudness"]["similarity"]
    assert [clip["name"] for clip in content["clips"]["spoken"]] == ["001", "002", "003"]
    printed = capsys.readouterr().out
    assert "does not know morning" in printed and "evaluation.png" in printed


@pytest.mark.usefixtures("no_judges")
def test_a_voice_speaks_and_is_judged(folders: list[str], model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("One two.\n\nThree four.\n", encoding="utf-8")
    base = ["--llm", str(model_dir / "llm.pt"), "--flow", str(model_dir / "flow.pt"), "--embedding", "zero"]
    assert evaluate.main([*folders, "--text-file", str(tmp_path / "texts.txt"), *base, "--seed", "4"]) == 0
    content = json.loads((tmp_path / "results" / "evaluation.json").read_text(encoding="utf-8"))
    assert content["voice"]["speaker"] == "zero vector" and content["options"]["seed"] == "4"
    assert content["figures"]["spoken"]["real_time_factor"] > 0
    judged = {clip["name"]: clip["text"] for clip in content["clips"]["spoken"]}
    assert judged == {"spoken_001": "One two.", "spoken_003": "Three four."}
    assert listening.read_sayings(tmp_path / "results")[1].text == "Three four."  # they can be judged again


@pytest.mark.usefixtures("no_judges")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wavs", "nowhere"], "nowhere"),
        (["--text-file", "nowhere.txt"], "nowhere.txt"),
        (["--wavs", str(RECORDINGS), "--reference", "nowhere"], "nowhere"),
        (["--wavs", str(RECORDINGS), "--base-voices", "nowhere"], "nowhere"),
        (["--wavs", str(RECORDINGS), "--base-voices", str(RECORDINGS)], "base voices"),
        (["--wavs", str(RECORDINGS), "--model-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(folders: list[str], options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate.main([*folders, *options])


@pytest.mark.parametrize(("change", "message"), [("texts", "002 has no text"), ("words", "002.wav has no words")])
def test_a_recording_without_words_is_refused(folders: list[str], tmp_path: Path, change: str, message: str) -> None:
    text = tmp_path / "voices" / "rms" / "002.txt"
    if change == "texts":
        text.unlink()
    else:
        text.write_text("...", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        listening.read_sayings(text.parent)


@pytest.mark.usefixtures("no_judges")
def test_originals_of_which_too_few_can_be_used_are_refused_before_any_work(folders: list[str], tmp_path: Path) -> None:
    originals = tmp_path / "voices" / "rms"
    for text in sorted(originals.glob("*.txt"))[1:]:
        text.write_bytes("Grüße".encode("utf-16"))
    with pytest.raises(InputError, match="002.txt: the text is not UTF-8"):
        listening.read_sayings(originals)
    with pytest.raises(InputError, match="rms holds 1 recordings with texts; at least 2 are needed"):
        evaluate.main([*folders, "--wavs", str(RECORDINGS), "--reference", str(originals)])


def test_originals_may_be_incomplete_and_of_a_low_rate(folders: list[str], tmp_path: Path, capsys) -> None:
    originals = tmp_path / "voices" / "rms"
    (originals / "002.txt").unlink()
    samples, rate = soundfile.read(originals / "003.wav")
    soundfile.write(originals / "003.wav", samples[:: rate // 8000], 8000)
    sayings = listening.read_sayings(originals, all_needed=False)
    assert [saying.audio.stem for saying in sayings[:2]] == ["001", "003"]
    assert abs(sayings[1].seconds - len(samples) / rate) < 0.01
    assert "left out: " in capsys.readouterr().err


def test_evaluation_sentences_are_unseen_and_of_usual_length() -> None:
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    assert len(set(sentences)) == len(sentences) == 40
    assert all(6 <= len(words_of(sentence)) <= 14 for sentence in sentences)
    trained_on = {path.read_text(encoding="utf-8").strip() for path in RECORDINGS.glob("*.txt")}
    assert not trained_on & set(sentences)
