"""Which recordings a folder holds and what they say; audio that only ffmpeg reads."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from clips.recordings import AUDIO_SUFFIXES, LIBSNDFILE_SUFFIXES, find_recordings
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import FFMPEG_SUFFIXES, read_wav
from cosyvoice.utils.text_files import decode_lines
from tools.kaldi_folder import read_table

TONE = 0.5 * np.sin(np.arange(8000) / 7).astype(np.float32)


def add_files(folder: Path, *names: str, content: str = "Words.") -> None:
    for path in (folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def add_list(path: Path, *lines: str) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())


def texts_of(folder: Path, speaker: str | None = None) -> dict[str, str | None]:
    return {found.utt: found.text for found in find_recordings(folder, speaker)}


# Names


@pytest.mark.parametrize(
    ("audio", "text"),
    [("001.wav", "001.wav.txt"), ("4.wav", "04.txt"), ("A5.WAV", "a5.txt"), ("take_007.m4a", "Take_7.m4a.txt")],
)
def test_a_text_with_nearly_the_name_is_suggested(tmp_path: Path, audio: str, text: str) -> None:
    add_files(tmp_path, audio, text, "good.wav", "good.txt", "other.wav", "none.txt")
    found = {recording.utt: recording for recording in find_recordings(tmp_path)}
    assert found[Path(audio).stem].similar == tmp_path / text
    assert [utt for utt, recording in found.items() if recording.similar] == [Path(audio).stem]
    (tmp_path / "good.txt").unlink()
    with pytest.raises(InputError, match=f"Rename {text} to {Path(audio).stem}.txt"):
        find_recordings(tmp_path)


def test_recordings_in_a_subfolder_are_pointed_at(tmp_path: Path) -> None:
    add_files(tmp_path, "session/1.wav", "session/1.txt")
    with pytest.raises(InputError, match=f"subfolder session has some: give {tmp_path / 'session'}"):
        find_recordings(tmp_path)


def test_every_suffix_is_found(tmp_path: Path) -> None:
    add_files(tmp_path, *(f"{suffix[1:]}{suffix}" for suffix in AUDIO_SUFFIXES))
    add_files(tmp_path, *(f"{suffix[1:]}.txt" for suffix in AUDIO_SUFFIXES))
    assert len(find_recordings(tmp_path)) == len(AUDIO_SUFFIXES)


# Lists


@pytest.mark.parametrize("place", ["wavs/", "", "clips/"])
def test_a_list_like_ljspeechs_tells_the_texts(tmp_path: Path, place: str) -> None:
    add_files(tmp_path, f"{place}LJ001-0001.wav", f"{place}LJ001-0002.flac", f"{place}extra.wav")
    lines = ["LJ001-0001|In 1900 | In nineteen hundred", "LJ001-0002.flac|only one column", "", "gone|no recording"]
    add_list(tmp_path / "metadata.csv", *lines)
    expected = {"LJ001-0001": "In nineteen hundred", "LJ001-0002": "only one column", "extra": None}
    assert texts_of(tmp_path) == expected | {"gone": "no recording"}
    found = {recording.utt: recording for recording in find_recordings(tmp_path)}
    assert found["LJ001-0001"].text_bytes() == b"In nineteen hundred" and found["gone"].audio is None


def test_a_list_like_gpt_sovitss_tells_the_texts_of_one_speaker(tmp_path: Path) -> None:
    add_files(tmp_path, "1.wav", "2.wav")
    add_list(tmp_path / "voice.list", r"D:\work\1.wav|anna|en|Hello there.", "/data/2.wav|anna|zh|你好。")
    assert texts_of(tmp_path) == texts_of(tmp_path, "somebody") == {"1": "Hello there.", "2": "你好。"}
    add_list(tmp_path / "voice.list", "1.wav|anna|en|Hello there.", "2.wav|bob|en|Goodbye.")
    assert texts_of(tmp_path, "bob") == {"1": None, "2": "Goodbye."}
    with pytest.raises(InputError, match="lists the speakers anna, bob. Choose one with --speaker"):
        find_recordings(tmp_path, "speaker")


def test_texts_beside_the_recordings_count_more_than_a_list(tmp_path: Path) -> None:
    add_files(tmp_path, "1.wav", "1.txt")
    add_list(tmp_path / "metadata.csv", "1|Other words.")
    assert texts_of(tmp_path) == {"1": tmp_path / "1.txt"}


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("metadata.csv", ["1|a", "2,b"], "line 2, is not of the form name|text. Correct"),
        ("metadata.csv", ["1|a", "1.wav|b"], "line 2: 1 is listed twice"),
        ("a.list", ["1.wav|anna|hello"], "line 1, is not of the form path|speaker|language|text"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path: Path, name: str, lines: list[str], message: str) -> None:
    add_files(tmp_path, "1.wav", "2.wav")
    add_list(tmp_path / name, *lines)
    with pytest.raises(InputError) as error:
        find_recordings(tmp_path)
    assert message in str(error.value)


def test_two_lists_are_one_too_many(tmp_path: Path) -> None:
    add_files(tmp_path, "1.wav", "a.list", "metadata.csv", content="1|a")
    with pytest.raises(InputError, match="both lists"):
        find_recordings(tmp_path)


# Encodings


def test_text_of_another_encoding_is_named_wherever_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-16", "latin-1"):
        path.write_bytes("u1 Grüße.\n".encode(encoding))
        with pytest.raises(InputError, match="is not UTF-8"):
            decode_lines(path.read_bytes(), "it")
        with pytest.raises(InputError, match="text is not UTF-8"):
            read_table(path)
    add_list(path, "u1 Grüße.", "u2 Hello.")
    assert read_table(path) == {"u1": "Grüße.", "u2": "Hello."}


# Formats


@pytest.mark.parametrize("suffix", [suffix for suffix in LIBSNDFILE_SUFFIXES if suffix not in (".oga", ".aif")])
def test_what_libsndfile_reads_is_read(tmp_path: Path, suffix: str) -> None:
    path, is_opus = tmp_path / f"tone{suffix}", suffix == ".opus"
    kind = {"format": "OGG", "subtype": "OPUS"} if is_opus else {}
    soundfile.write(path, TONE, 16000, **kind)
    wav, rate = read_wav(path)
    assert rate == (48000 if is_opus and rate == 48000 else 16000)
    assert wav.shape[1] / rate == pytest.approx(0.5, abs=0.08) and wav.abs().max() > 0.3


@pytest.fixture
def needs_ffmpeg(tmp_path: Path) -> Path:
    path = tmp_path / "tone.m4a"
    path.write_bytes(b"\0\0\0 ftypM4A " + bytes(100))
    return path


def add_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a stand-in for ffmpeg on the PATH."""
    (folder / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_ffmpeg_reads_what_libsndfile_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_ffmpeg: Path
) -> None:
    soundfile.write(tmp_path / "decoded.wav", TONE, 16000, subtype="FLOAT")
    content = bytearray((tmp_path / "decoded.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff" * 4  # as ffmpeg writes into a pipe
    (tmp_path / "decoded.wav").write_bytes(content)
    add_ffmpeg(tmp_path, monkeypatch, f"cat {tmp_path}/decoded.wav; echo $* > {tmp_path}/options")
    for source in (needs_ffmpeg, io.BytesIO(needs_ffmpeg.read_bytes())):
        wav, rate = read_wav(source)
        assert rate == 16000 and torch.equal(wav[0], torch.from_numpy(TONE))
    assert "-protocol_whitelist file,pipe -i file:/" in (tmp_path / "options").read_text()


def test_without_ffmpeg_its_files_are_named_with_the_command_that_converts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_ffmpeg: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"needs ffmpeg.*ffmpeg -i \S+tone.m4a \S+tone.wav"):
        read_wav(needs_ffmpeg)


@pytest.mark.parametrize("script", ["exit 1", "true", "echo no wav"])
def test_what_ffmpeg_cannot_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_ffmpeg: Path, script: str
) -> None:
    add_ffmpeg(tmp_path, monkeypatch, script)
    with pytest.raises(InputError, match="tone.m4a cannot be decoded"):
        read_wav(needs_ffmpeg)


def test_no_suffix_is_in_both_lists() -> None:
    assert not set(LIBSNDFILE_SUFFIXES) & set(FFMPEG_SUFFIXES)
