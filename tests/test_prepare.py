"""prepare_joint_data.py: recordings and texts in, parquet files and a report out."""

import csv
import gzip
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from onnxruntime.capi import onnxruntime_pybind11_state
from parity import PARITY_DIR

from clips import store
from clips.checks import Outcome, compare, find_warnings, silence_share
from clips.maker import ClipMaker
from clips.recordings import find_recordings
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError
from cosyvoice.speech_encoders.encoders import SpeechTokenizer
from cosyvoice.tokenizer.phones import get_phone_tokenizer
from cosyvoice.utils.audio import load_wav
from dataset import load_clips
from prepare_joint_data import main
from tools.random_onnx import write_speaker_encoder, write_speech_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of a model folder as preparing reads."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(PARITY_DIR / "tiny.yaml", folder / "cosyvoice.yaml")
    random = np.random.default_rng(0)
    write_speech_tokenizer(folder / "speech_tokenizer_v1.onnx", random, token_rate=50, speech_tokens=4096)
    write_speaker_encoder(folder / "campplus.onnx", random)
    return folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def tone(seconds: float, rate: int = 16000, hertz: float = 220) -> np.ndarray:
    """A tone of changing loudness, in the same shape for any rate."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * hertz * time) * (0.55 + 0.45 * np.sin(9 * time))).astype(np.float32)


def add(folder: Path, name: str, wav: np.ndarray, rate: int = 16000, text: str | bytes = "A tone.") -> Path:
    path = folder / name
    soundfile.write(path, wav, rate, **({"subtype": "FLOAT"} if path.suffix == ".wav" else {}))
    content = text.encode() if isinstance(text, str) else text
    path.with_suffix(".txt").write_bytes(content)
    return path


def prepare(model_dir: Path, raw: Path, *options: str) -> Path:
    """Run the command beside the recordings; the data folder."""
    data = raw.parent / "data"
    folders = ["--model-dir", str(model_dir), "--input-dir", str(raw), "--data-dir", str(data)]
    assert main([*folders, "--workers", "2", "--device", "cpu", *options]) == 0
    return data


def report(data: Path) -> dict[str, dict[str, str]]:
    with (data / "report.csv").open(encoding="utf-8", newline="") as file:
        return {line["utt"]: line for line in csv.DictReader(file)}


def rows(data: Path) -> list[dict]:
    return [row for file in sorted(data.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_formats_rates_and_channels(model_dir: Path, raw: Path) -> None:
    add(raw, "1.wav", np.stack([tone(1.5, 44100), tone(1.5, 44100)], axis=1), 44100, b"\xef\xbb\xbfWith a mark.")
    add(raw, "2.flac", tone(1.0, 8000), 8000, "你好，\n世界。")
    add(raw, "3.ogg", tone(2.0, 48000), 48000)
    add(raw, "4.mp3", tone(2.0, 22050), 22050, "Not this one.")
    (raw / "4.normalized.txt").write_text("But this one.", encoding="utf-8")
    data = prepare(model_dir, raw, "--speaker", "anna")

    lines = report(data)
    assert [line["kept"] for line in lines.values()] == ["yes"] * 4
    assert [row["text"] for row in rows(data)] == ["With a mark.", "你好， 世界。", "A tone.", "But this one."]
    for row, seconds in zip(rows(data), (1.5, 1.0, 2.0, 2.0), strict=True):
        assert row["seconds"] == pytest.approx(seconds, abs=0.06)
        assert len(row["speech_token"]) == pytest.approx(50 * row["seconds"], abs=1)
        assert row["speech_feat_shape"] == [len(row["speech_feat"]) // 80, 80]
        assert row["speech_feat_shape"][0] == pytest.approx(row["seconds"] * 22050 / 256, abs=1)
        assert row["spk"] == "anna"
        assert row["audio_data"] == Path(row["wav"]).read_bytes()
        assert len(row["speech_token"]) == int(lines[row["utt"]]["speech_tokens"])


def test_features_are_the_models_own(model_dir: Path, raw: Path) -> None:
    path = add(raw, "1.wav", tone(1.5, 44100), 44100, "It costs 5 dollars.")
    add(raw, "2.wav", tone(1.0, hertz=3000))
    data = prepare(model_dir, raw)
    frontend = ClipMaker(ModelFolder(model_dir), "cpu", {}).frontend
    row = rows(data)[0]

    mel = torch.tensor(row["speech_feat"]).view(*row["speech_feat_shape"])
    assert torch.equal(mel, frontend.feat_extractor(load_wav(path, 22050))[0].T)
    assert row["text_token"] == frontend.encode("It costs five dollars.")
    wav_16k = load_wav(path, 16000)
    assert row["speech_token"] == frontend.speech_tokenizer(wav_16k)[0].tolist()
    vectors = np.array([row["utt_embedding"] for row in rows(data)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    direction = frontend.speaker_encoder(wav_16k)[0].numpy()
    np.testing.assert_allclose(vectors[0], direction / np.linalg.norm(direction), atol=1e-6)
    mean = vectors.mean(axis=0)
    for row in rows(data):
        np.testing.assert_allclose(row["spk_embedding"], mean / np.linalg.norm(mean), atol=1e-6)


def test_overshoot_is_brought_back_to_full_scale(model_dir: Path, raw: Path) -> None:
    """Decoders of lossy formats give samples beyond 1, of which the encoders know nothing."""
    loud = 3 * tone(1.5)
    add(raw, "1.wav", loud)
    add(raw, "2.wav", loud / np.abs(loud).max())
    found, expected = rows(prepare(model_dir, raw))
    for name in ("speech_token", "speech_feat", "utt_embedding"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_training_reads_the_data(model_dir: Path, raw: Path) -> None:
    add(raw, "1.wav", tone(1.5))
    clip = load_clips(prepare(model_dir, raw), ModelFolder(model_dir))[0]
    assert clip.mel.shape[1] == 80 and len(clip.speech_token) == pytest.approx(75, abs=2)


def test_data_of_another_model_is_refused(model_dir: Path, raw: Path, tmp_path: Path) -> None:
    """Its tokens would be numbers that this model reads as other sounds, without a word."""
    add(raw, "1.wav", tone(1.5))
    data = prepare(model_dir, raw)
    for name in ("speech_tokenizer_v1.onnx", "campplus.onnx"):
        other = shutil.copytree(model_dir, tmp_path / f"without {name}")
        (other / name).write_bytes((model_dir / name).read_bytes() + b"0")
        with pytest.raises(InputError, match="prepared with another model"):
            load_clips(data, ModelFolder(other))
    other = shutil.copytree(model_dir, tmp_path / "other text ids")
    config = other / "cosyvoice.yaml"
    text_ids = "!name:cosyvoice.tokenizer.tokenizer.get_byte_tokenizer"
    written = config.read_text(encoding="utf-8")
    config.write_text(re.sub(r"get_tokenizer: !name:.*\n(    .*\n)*", f"get_tokenizer: {text_ids}\n", written))
    with pytest.raises(InputError, match="prepared with another model"):
        load_clips(data, ModelFolder(other))


def test_a_lexicon_belongs_to_the_model(model_dir: Path, raw: Path, tmp_path: Path) -> None:
    """Data keep to its content, wherever the folder lies."""
    phones = shutil.copytree(model_dir, tmp_path / "phones")
    config, lexicon = phones / "cosyvoice.yaml", phones / "lexicon.txt.gz"
    text_ids = "!name:cosyvoice.tokenizer.phones.get_phone_tokenizer\n    lexicon: !file lexicon.txt.gz\n"
    written = config.read_text(encoding="utf-8")
    config.write_text(re.sub(r"get_tokenizer: !name:.*\n(    .*\n)*", f"get_tokenizer: {text_ids}", written))
    add(raw, "1.wav", tone(1.5))
    with pytest.raises(InputError, match="lexicon.txt.gz does not exist"):
        prepare(phones, raw)
    lexicon.write_bytes(gzip.compress(b"a ax0\n"))
    data = prepare(phones, raw)
    assert rows(data)[0]["text_token"] == get_phone_tokenizer(lexicon).encode("A tone.")
    moved = phones.rename(tmp_path / "moved")
    assert len(load_clips(data, ModelFolder(moved))) == 1
    (moved / "lexicon.txt.gz").write_bytes(gzip.compress(b"a ey1\n"))
    with pytest.raises(InputError, match="prepared with another model"):
        load_clips(data, ModelFolder(moved))


def test_a_bad_clip_is_reported_and_the_rest_goes_on(
    model_dir: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(raw, "good.wav", tone(1.0))
    add(raw, "good.mp3", tone(1.0))  # of the same name: which of them does the text belong to?
    add(raw, "empty-text.wav", tone(1.0), text=" \n")
    add(raw, "punctuation.wav", tone(1.0), text="?!")
    add(raw, "gbk.wav", tone(1.0), text="你好".encode("gbk"))
    add(raw, "long.wav", tone(30.5))
    add(raw, "short.wav", tone(0.4))
    add(raw, "silent.wav", np.zeros(16000, dtype=np.float32))
    add(raw, "constant.wav", np.full(16000, 0.5, dtype=np.float32))
    add(raw, "nan.wav", np.where(np.arange(16000) == 99, np.nan, tone(1.0)))
    add(raw, "nothing.wav", np.zeros(0, dtype=np.float32))
    add(raw, "tokenless.wav", tone(1.25))
    add(raw, "no-bytes.wav", tone(1.0)).write_bytes(b"")
    add(raw, "no-audio.mp3", tone(1.0)).write_bytes(b"this is no recording" * 100)
    add(raw, "no-text.wav", tone(1.0)).with_suffix(".txt").unlink()
    (raw / "no-recording.txt").write_text("Hello.")

    encode = SpeechTokenizer.run

    def none_for_tokenless(self: SpeechTokenizer, *inputs: np.ndarray) -> torch.Tensor:
        frames = inputs[0].shape[-1]
        return torch.zeros(1, 0, dtype=torch.int32) if frames == 125 else encode(self, *inputs)

    monkeypatch.setattr(SpeechTokenizer, "run", none_for_tokenless)
    data = prepare(model_dir, raw)
    reasons = {utt: line["reason"] for utt, line in report(data).items()}
    expected = {
        "empty-text": "text is empty",
        "punctuation": "nothing to speak",
        "gbk": "not UTF-8",
        "long": "at most 30 s",
        "short": "at least 0.5 s",
        "silent": "silent",
        "constant": "silent",
        "nan": "not numbers",
        "nothing": "no samples",
        "tokenless": "no token",
        "no-bytes": "cannot be decoded",
        "no-audio": "cannot be decoded",
        "no-text": "no text",
        "no-recording": "no recording",
        "good.mp3": "no text",
        "good": "",
    }
    assert reasons.keys() == expected.keys()
    for utt, words in expected.items():
        assert words in reasons[utt], utt
        assert report(data)[utt]["kept"] == ("no" if words else "yes")
    assert report(data)["gbk"]["seconds"] == "1.00"
    assert [row["utt"] for row in rows(data)] == ["good"]


def test_a_second_run_redoes_only_what_changed(
    model_dir: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in "abc":
        add(raw, f"{name}.wav", tone(1.0, hertz=200 + ord(name)), text=f"Tone {name}.")
    data = prepare(model_dir, raw)
    first, lines = rows(data), report(data)

    prepare(model_dir, raw)
    assert "(3 unchanged)" in capsys.readouterr().out
    assert rows(data) == first and report(data) == lines

    (raw / "b.txt").write_text("Another tone.")
    (raw / "c.wav").rename(raw / "d.wav")
    (raw / "c.txt").rename(raw / "d.txt")
    prepare(model_dir, raw, "--speaker", "bob")
    assert "(2 unchanged)" in capsys.readouterr().out
    assert [(row["utt"], row["text"], row["spk"]) for row in rows(data)] == [
        ("a", "Tone a.", "bob"),
        ("b", "Another tone.", "bob"),
        ("d", "Tone c.", "bob"),
    ]
    assert rows(data)[2]["wav"].endswith("d.wav")

    other = shutil.copytree(model_dir, tmp_path / "other")
    write_speaker_encoder(other / "campplus.onnx", np.random.default_rng(1))
    prepare(other, raw)
    assert "(0 unchanged)" in capsys.readouterr().out


def test_at_most_so_many_clips_a_file(model_dir: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.CLIPS_PER_FILE == 100
    monkeypatch.setattr(store, "CLIPS_PER_FILE", 2)
    for number in range(5):
        add(raw, f"{number}.wav", tone(0.6, hertz=300 + number))
    data = prepare(model_dir, raw)
    files = sorted(data.glob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [2, 2, 1]

    for number in range(1, 5):
        (raw / f"{number}.wav").unlink()
    prepare(model_dir, raw)
    assert [path.name for path in data.glob("*.parquet")] == ["clips-00000.parquet"]
    assert [row["utt"] for row in rows(data)] == ["0"]
    assert sorted(path.name for path in data.iterdir()) == ["clips-00000.parquet", "report.csv"]


def test_an_interrupted_run_is_taken_up_again(
    model_dir: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    add(raw, "old.wav", tone(1.0))
    data = prepare(model_dir, raw)
    before = rows(data)
    for number in range(3):
        add(raw, f"{number}.wav", tone(0.6, hertz=300 + number))

    make = ClipMaker.make

    def interrupted(self: ClipMaker, recording: object) -> object:
        if recording.utt == "2":
            raise KeyboardInterrupt
        return make(self, recording)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClipMaker, "make", interrupted)
        prepare(model_dir, raw, "--workers", "1")
    assert rows(data) == before

    unfinished = {pq.read_table(path)["utt"][0].as_py(): path for path in (data / store.UNFINISHED).iterdir()}
    unfinished["0"].write_bytes(b"cut short")
    (data / ".clips-00000.1.parquet").write_bytes(b"killed while writing")
    capsys.readouterr()
    prepare(model_dir, raw)
    assert "(2 unchanged)" in capsys.readouterr().out
    assert len(rows(data)) == 4
    assert sorted(path.name for path in data.iterdir()) == ["clips-00000.parquet", "report.csv"]


def test_what_cannot_be_read_is_left_out_and_told(model_dir: Path, raw: Path, capsys) -> None:
    add(raw, "1.wav", tone(1.0))
    flac = add(raw, "2.flac", tone(1.0))
    content = bytearray(flac.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # its number of samples, as a program writes it that does not know when it will end
    flac.write_bytes(content)
    (raw / "3.amr").write_bytes(b"of a telephone")
    (raw / "3.txt").write_text("Hello there.", encoding="utf-8")
    data = prepare(model_dir, raw)
    printed = capsys.readouterr().out
    assert len(rows(data)) == 1
    assert "left out 2: " in printed and "2.flac cannot be decoded as audio; convert it to wav" in printed
    assert "left out 3: it has no recording. Convert its audio to wav, flac, mp3," in printed


def test_mistakes_are_named(model_dir: Path, raw: Path) -> None:
    with pytest.raises(InputError, match="has no recording"):
        prepare(model_dir, raw)
    path = add(raw, "1.wav", tone(1.0))
    path.with_suffix(".txt").rename(raw / "2.txt")
    with pytest.raises(InputError, match="001.txt beside 001.wav"):
        prepare(model_dir, raw)
    with pytest.raises(InputError, match="--workers 0"):
        prepare(model_dir, raw, "--workers", "0")
    with pytest.raises(InputError, match="--speaker"):
        prepare(model_dir, raw, "--speaker", " ")


def test_where_no_clip_can_be_used_the_old_data_stays(model_dir: Path, raw: Path) -> None:
    path = add(raw, "1.wav", tone(1.0))
    data = prepare(model_dir, raw)
    before = rows(data)
    path.with_suffix(".txt").write_text("")
    with pytest.raises(InputError, match="none of 1 clips.*text is empty"):
        prepare(model_dir, raw)
    assert report(data)["1"]["kept"] == "no"
    assert rows(data) == before


def test_a_folder_that_does_not_serve_is_named_before_any_work(
    model_dir: Path, raw: Path, tmp_path: Path
) -> None:
    add(raw, "1.wav", tone(1.0))
    folder = shutil.copytree(model_dir, tmp_path / "unfit")
    (folder / "campplus.onnx").unlink()
    with pytest.raises(InputError, match="campplus.onnx does not exist"):
        prepare(folder, raw)
    config = (folder / "cosyvoice.yaml").read_text(encoding="utf-8")
    foreign = config.replace("whisper.tokenizer.", "cosyvoice.tokenizer.tokenizer.").replace("s: 100", "s: 107")
    (folder / "cosyvoice.yaml").write_text(foreign, encoding="utf-8")
    with pytest.raises(InputError, match="25 Hz"):
        prepare(folder, raw)
    assert not (tmp_path / "data" / "report.csv").exists()


def test_a_tokenizer_of_another_rate_is_refused(
    model_dir: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(raw, "1.wav", tone(2.0))
    run = SpeechTokenizer.run
    monkeypatch.setattr(SpeechTokenizer, "run", lambda self, *inputs: run(self, *inputs)[:, ::2])
    with pytest.raises(InputError, match="50 tokens for 2.0 s"):
        prepare(model_dir, raw)


def test_a_full_graphics_card_is_no_reason_to_leave_out_a_clip(
    model_dir: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullCard:
        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name=name) for name in ("feats", "feats_length")]

        def run(self, *request: object) -> None:
            raise onnxruntime_pybind11_state.RuntimeException("Failed to allocate memory for requested buffer")

    add(raw, "1.wav", tone(1.0))
    monkeypatch.setattr(SpeechTokenizer, "open", lambda self: FullCard())
    with pytest.raises(RuntimeError, match="Failed to allocate memory"):
        prepare(model_dir, raw)


def test_hidden_files_and_folders_are_no_recordings(raw: Path) -> None:
    add(raw, "1.WAV", tone(1.0))
    shutil.copy(raw / "1.WAV", raw / "._1.wav")
    (raw / "folder.wav").mkdir()
    assert [recording.utt for recording in find_recordings(raw)] == ["1"]


def test_one_name_may_be_written_in_two_ways(raw: Path) -> None:
    names = {form: unicodedata.normalize(form, "grüße") for form in ("NFC", "NFD")}
    add(raw, f"{names['NFC']}.wav", tone(1.0)).with_suffix(".txt").rename(raw / f"{names['NFD']}.txt")
    (found,) = find_recordings(raw)
    assert found.audio.name == f"{names['NFC']}.wav" and found.text.name == f"{names['NFD']}.txt"


def test_silence_share_counts_frames_40_db_below_the_loudest() -> None:
    loud, quiet = torch.full((1, 3200), 0.5), torch.full((1, 1600), 0.5 * 10 ** (-41 / 20))
    assert silence_share(torch.cat([loud, quiet, loud], dim=1), 16000) == pytest.approx(1600 / 8000)
    assert silence_share(torch.cat([loud, quiet * 1.3], dim=1), 16000) == 0  # 38.7 dB below


def run_script(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "prepare_joint_data.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_help_needs_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "prepare_joint_data.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--speaker" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "config" in imported and not {"torch", "pyarrow", "numpy", "soundfile"} & imported


def test_a_mistake_is_one_line_and_exit_code_2(raw: Path) -> None:
    done = run_script("--model-dir", str(raw), "--input-dir", str(raw))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "no model folder" in done.stderr


# What is measured and doubted


def test_pauses_at_the_ends_are_cut_for_all_features_and_said(model_dir: Path, raw: Path, capsys) -> None:
    noise = np.random.default_rng(0).normal(0, 0.003, 24000).astype(np.float32)  # 1.5 s of a room
    speech = tone(1.0) + noise[:16000]
    add(raw, "room.wav", np.concatenate([noise, speech, noise]))
    add(raw, "tight.wav", np.concatenate([noise[:3200], speech, noise[:3200]]))
    data = prepare(model_dir, raw)
    room, tight = (report(data)[name] for name in ("room", "tight"))
    assert float(room["seconds"]) == pytest.approx(1.4, abs=0.05) and float(room["cut_seconds"]) > 2.5
    assert float(tight["cut_seconds"]) < 0.05
    assert room["warnings"].endswith("s of pause were cut off its ends") and not tight["warnings"]
    assert "kept room, but 2.6 s of pause" in capsys.readouterr().out
    found = {row["utt"]: row for row in rows(data)}
    assert len(found["room"]["speech_token"]) == pytest.approx(70, abs=3)
    assert found["room"]["speech_feat_shape"][0] == pytest.approx(1.4 * 86.13, abs=5)
    whole = rows(prepare(model_dir, raw, "--edges", "-1"))
    assert len(whole[0]["speech_token"]) == pytest.approx(200, abs=3)


@pytest.mark.parametrize(
    ("text", "seconds", "reason"),
    [
        ("word " * 200, 2.0, "400.0 characters a second of audio"),
        ("Hi.", 5.0, "0.6 characters a second of audio"),
        ("7" * 100_000, 2.0, "characters a second of audio"),
        ("你好" * 20, 2.0, "20.0 characters a second of audio"),
        ("你好", 3.0, ""),
        ("Hi.", 1.5, ""),
    ],
)
def test_a_text_that_nobody_can_speak_in_the_time_is_refused(
    model_dir: Path, raw: Path, text: str, seconds: float, reason: str
) -> None:
    add(raw, "good.wav", tone(1.0))
    add(raw, "odd.wav", tone(seconds), text=text)
    found = report(prepare(model_dir, raw))["odd"]
    assert reason in found["reason"] and bool(found["reason"]) == bool(reason)


def test_what_is_wrong_with_a_waveform_is_said() -> None:
    good = torch.from_numpy(tone(1.0)).unsqueeze(0)
    assert find_warnings(good, 16000) == []
    assert find_warnings(good * 0.02, 16000) == ["it is quiet (-42 dB below full scale)"]
    assert find_warnings((good * 4).clamp(-1, 1), 16000) == ["it is clipped"]
    assert find_warnings(good + 0.1, 16000) == ["it has a DC offset"]
    assert find_warnings(good, 8000) == ["it has only 8000 samples a second, so the voice will sound dull"]


def test_clips_unlike_the_others_are_named() -> None:
    random = np.random.default_rng(0)
    voice, other = np.eye(192)[0], np.eye(192)[1]

    def outcome(name: str, pace: float, direction: np.ndarray) -> Outcome:
        vector = direction + random.normal(0, 0.03, 192)
        row = pa.table({"utt_embedding": [(vector / np.linalg.norm(vector)).tolist()]})
        return Outcome(name, seconds=3.0, characters_per_second=pace, row=row)

    outcomes = [outcome(str(i), 14 + i % 3, voice) for i in range(6)]
    outcomes += [outcome("fast", 30, voice), outcome("other", 15, other), Outcome("bad", reason="silent")]
    compare(outcomes)
    found = {outcome.utt: outcome.warnings for outcome in outcomes if outcome.warnings}
    assert found == {
        "fast": ["30 characters a second, where the others have about 15: check its text"],
        "other": ["it sounds like another voice"],
    }


def test_no_cell_of_the_report_is_a_formula(model_dir: Path, raw: Path) -> None:
    add(raw, "=1+1.wav", tone(1.0))
    add(raw, "quiet.wav", tone(1.0) * 0.05)
    found = report(prepare(model_dir, raw))
    assert found.keys() == {"'=1+1", "quiet"} and float(found["quiet"]["peak_dbfs"]) < 0
