"""Stages -1 to 3 of the recipe: from a corpus of recordings to parquet files and their lists."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from recipe import copy_of_the_project

from cosyvoice.dataset.processor import parquet_opener, parse_embedding
from cosyvoice.runtime.errors import InputError
from cosyvoice.speech_encoders.encoders import SpeakerEncoder, SpeechTokenizer
from cosyvoice.utils.audio import load_wav
from tools import extract_embedding, extract_speech_token, extraction, make_parquet_list
from tools.kaldi_folder import read_numbers, read_table, write_table
from tools.random_onnx import write_speaker_encoder, write_speech_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "libritts" / "cosyvoice"
RECORDINGS = ROOT / "examples" / "raw_audio"
COLUMNS = ["utt", "wav", "audio_data", "text", "spk", "utt_embedding", "spk_embedding", "speech_token"]


def load_prepare_data() -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location("prepare_data", RECIPE / "local" / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


prepare_data = load_prepare_data()


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    random = np.random.default_rng(0)
    write_speech_tokenizer(folder / "speech_tokenizer_v1.onnx", random, token_rate=50, speech_tokens=4096)
    write_speaker_encoder(folder / "campplus.onnx", random)
    return folder


def add_recording(wav: Path, number: int, seconds: float = 0.5) -> None:
    """The beginning of a real recording, and its text beside it."""
    samples, rate = soundfile.read(RECORDINGS / f"{number:03d}.wav")
    wav.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(wav, samples[rate : rate + int(seconds * rate)], rate)
    shutil.copy(RECORDINGS / f"{number:03d}.txt", wav.with_name(f"{wav.stem}.normalized.txt"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A Kaldi-style folder made by hand: five utterances of two speakers, in a folder with a blank."""
    wavs = {f"u{number}": tmp_path / "my corpus" / f"{number}.wav" for number in range(5)}
    for number, wav in enumerate(wavs.values(), start=1):
        add_recording(wav, number)
    folder = tmp_path / "data"
    write_table({utt: str(wav) for utt, wav in wavs.items()}, folder / "wav.scp")
    write_table({utt: f"This is {utt}." for utt in wavs}, folder / "text")
    write_table({utt: "anna" if utt < "u3" else "bert" for utt in wavs}, folder / "utt2spk")
    return folder


def extract(data: Path, networks: Path, workers: int = 2) -> None:
    options = ["--dir", str(data), "--num_thread", str(workers)]
    extract_embedding.main([*options, "--onnx_path", str(networks / "campplus.onnx")])
    extract_speech_token.main([*options, "--onnx_path", str(networks / "speech_tokenizer_v1.onnx")])


def make_parquet(data: Path, size: int = 2) -> Path:
    numbers = ["--num_utts_per_parquet", str(size), "--num_processes", "2"]
    make_parquet_list.main([*numbers, "--src_dir", str(data), "--des_dir", str(data / "parquet")])
    return data / "parquet"


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def opened(parquet: Path) -> list[dict]:
    """The rows of all listed files, as training reads them."""
    return list(parquet_opener({"src": name} for name in lines(parquet / "data.list")))


class CallCounter:
    """Counts what the networks are asked, and may do something at a certain call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.at_call, self.act = 0, 0, lambda: None
        original = SpeakerEncoder.__call__

        def counting(encoder: SpeakerEncoder, wav: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == self.at_call:
                self.act()
            return original(encoder, wav)

        monkeypatch.setattr(SpeakerEncoder, "__call__", counting)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CallCounter:
    return CallCounter(monkeypatch)


def embed(data: Path, networks: Path) -> dict[str, list[float]]:
    extract_embedding.main(["--dir", str(data), "--onnx_path", str(networks / "campplus.onnx"), "--num_thread", "1"])
    return read_numbers(data / "utt2embedding.pt")


def test_run_sh_turns_libritts_into_what_training_reads(tmp_path: Path, networks: Path) -> None:
    chapter = tmp_path / "a corpus" / "LibriTTS" / "tiny" / "84" / "121123"
    for number in (1, 2):
        add_recording(chapter / f"84_121123_{number}.wav", number)
    add_recording(chapter / "84_121123_3.wav", 3)
    (chapter / "84_121123_3.normalized.txt").unlink()
    recipe = copy_of_the_project(tmp_path / "project") / "cosyvoice"
    settings = {"stage": "0", "data_dir": str(tmp_path / "a corpus"), "pretrained_model_dir": str(networks)}
    sets = {"train_sets": "tiny", "dev_sets": "", "test_sets": ""}
    python = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(recipe / "run.sh")]
    result = subprocess.run(command, env=settings | sets | python, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1 of 3 utterances failed (84_121123_3:" in result.stderr

    data = recipe / "data" / "tiny"
    assert read_table(data / "spk2utt") == {"84": "84_121123_1 84_121123_2"}
    assert lines(data / "parquet" / "data.list") == ["data/tiny/parquet/parquet_000000000.tar"]
    rows = list(parquet_opener([{"src": recipe / lines(data / "parquet" / "data.list")[0]}]))
    assert [row["utt"] for row in rows] == ["84_121123_1", "84_121123_2"]
    tokenizer = SpeechTokenizer(networks / "speech_tokenizer_v1.onnx")
    for row in rows:
        wav = chapter / f"{row['utt']}.wav"
        assert row["wav"] == str(wav) and row["audio_data"] == wav.read_bytes() and row["spk"] == "84"
        assert row["text"] == wav.with_name(f"{wav.stem}.normalized.txt").read_text(encoding="utf-8").strip()
        assert row["speech_token"].tolist() == tokenizer(load_wav(wav, 16000))[0].tolist()
        np.testing.assert_allclose(row["spk_embedding"], np.mean([row["utt_embedding"] for row in rows], axis=0))


def test_an_own_folder_becomes_exchangeable_files(data: Path, networks: Path) -> None:
    extract(data, networks)
    vectors, speakers = read_numbers(data / "utt2embedding.pt"), read_numbers(data / "spk2embedding.pt")
    tokens = read_numbers(data / "utt2speech_token.pt")
    assert list(vectors) == list(tokens) == ["u0", "u1", "u2", "u3", "u4"] and list(speakers) == ["anna", "bert"]
    assert {type(value) for vector in vectors.values() for value in vector} == {float}
    assert {type(value) for ids in tokens.values() for value in ids} == {int}
    assert {len(vector) for vector in [*vectors.values(), *speakers.values()]} == {192}
    np.testing.assert_allclose(speakers["bert"], (np.array(vectors["u3"]) + vectors["u4"]) / 2)

    parquet = make_parquet(data)
    files = [str(parquet / f"parquet_{number:09d}.tar") for number in range(3)]
    assert lines(parquet / "data.list") == files
    columns = pq.read_schema(files[0])
    assert columns.names == COLUMNS
    lists = ("utt_embedding", "spk_embedding", "speech_token")
    assert [columns.field(name).type.value_type for name in lists] == [pa.float64(), pa.float64(), pa.int64()]
    rows = opened(parquet)
    assert [row["utt"] for row in rows] == list(vectors) and rows[0]["text"] == "This is u0."
    assert all(row["speech_token"].tolist() == tokens[row["utt"]] for row in rows)
    normalised = next(parse_embedding(rows, normalize=True))["utt_embedding"]
    torch.testing.assert_close(normalised, torch.nn.functional.normalize(torch.tensor(vectors["u0"]), dim=0))


def test_the_lists_tell_where_an_utterance_and_a_speaker_are(data: Path, networks: Path) -> None:
    extract(data, networks)
    parquet = make_parquet(data)

    def merged(name: str) -> dict[str, set[str]]:
        places: dict[str, set[str]] = {}
        for file in lines(parquet / name):
            for key, place in json.loads(Path(file).read_text(encoding="utf-8")).items():
                places.setdefault(key, set()).add(Path(place).name)
        return places

    first, second, third = (f"parquet_{number:09d}.tar" for number in range(3))
    of_utterances = {"u0": {first}, "u1": {first}, "u2": {second}, "u3": {second}, "u4": {third}}
    assert merged("utt2data.list") == of_utterances
    assert merged("spk2data.list") == {"anna": {first, second}, "bert": {second, third}}


@pytest.mark.parametrize("at_call, left", [(4, 3), (5, 1)])
def test_a_killed_extraction_goes_on_after_its_last_part(
    data: Path, networks: Path, counter: CallCounter, monkeypatch: pytest.MonkeyPatch, at_call: int, left: int
) -> None:
    monkeypatch.setattr(extraction, "PART_UTTERANCES", 2)
    killed, parts = data.with_name("killed"), data / ".utt2embedding.parts"

    def kill() -> None:
        deadline = time.monotonic() + 30
        while len(list(parts.glob("part-*"))) < (at_call - 1) // 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # the part before may still be on its way to the disk
        shutil.copytree(data, killed)

    counter.at_call, counter.act = at_call, kill
    whole = embed(data, networks)
    assert not (killed / "utt2embedding.pt").exists()

    counter.calls, counter.act = 0, lambda: None
    assert embed(killed, networks) == whole
    assert counter.calls == left
    assert {path.name for path in killed.glob(".*")} == {".utt2embedding.stamps"}


def test_an_interrupted_extraction_keeps_all_that_was_done(data: Path, networks: Path, counter: CallCounter) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    counter.at_call, counter.act = 4, interrupt
    with pytest.raises(KeyboardInterrupt):
        embed(data, networks)
    counter.calls, counter.at_call = 0, 0
    assert len(embed(data, networks)) == 5
    assert counter.calls == 2  # those before the interruption are not asked for again


def test_an_extraction_stopped_while_it_writes_keeps_all_that_was_done(
    data: Path, networks: Path, counter: CallCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(data, networks)
    add_recording(Path(read_table(data / "wav.scp")["u1"]), 6)

    def interrupt(content: object, path: Path) -> None:
        if path.name == "utt2embedding.pt":
            raise KeyboardInterrupt
        save_tensors(content, path)

    save_tensors = extraction.save_tensors
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extraction, "save_tensors", interrupt)
        embed(data, networks)
    counter.calls = 0
    kept = embed(data, networks)
    assert counter.calls == 0
    anew = data.with_name("anew")
    anew.mkdir()
    shutil.copy(data / "wav.scp", anew)
    shutil.copy(data / "utt2spk", anew)
    assert embed(anew, networks) == kept


def test_wav_scp_and_its_files_decide_what_is_done_again(data: Path, networks: Path, counter: CallCounter) -> None:
    before = embed(data, networks)
    wavs = read_table(data / "wav.scp")
    add_recording(Path(wavs["u1"]), 6)  # another recording under the same name
    new = Path(wavs["u1"]).with_name("new.wav")
    add_recording(new, 7)
    del wavs["u4"]
    write_table({"new": str(new)} | wavs, data / "wav.scp")
    counter.calls = 0
    after = embed(data, networks)
    assert counter.calls == 2
    assert list(after) == ["new", "u0", "u1", "u2", "u3"]
    assert {utt for utt in before.keys() & after.keys() if before[utt] == after[utt]} == {"u0", "u2", "u3"}


def test_another_network_makes_all_anew(data: Path, networks: Path, counter: CallCounter, tmp_path: Path) -> None:
    before = embed(data, networks)
    write_speaker_encoder(tmp_path / "campplus.onnx", np.random.default_rng(1))
    counter.calls = 0
    after = embed(data, tmp_path)
    assert counter.calls == 5 and not any(before[utt] == after[utt] for utt in before)


def test_failed_utterances_are_left_out_and_reported(
    data: Path, networks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wavs = {utt: Path(wav) for utt, wav in read_table(data / "wav.scp").items()}
    wavs["u1"].write_bytes(b"RIFF, and then nothing")
    soundfile.write(wavs["u2"], np.random.default_rng(0).uniform(-0.1, 0.1, 31 * 16000), 16000)
    wavs["u4"].unlink()
    extract(data, networks)
    for name in ("extract_embedding", "extract_speech_token"):
        failed = read_table(data / f"{name}.failed")
        assert list(failed) == ["u1", "u2", "u4"]
        assert "decoded" in failed["u1"] and "31.00 s" in failed["u2"] and "does not exist" in failed["u4"]
    assert list(read_numbers(data / "utt2speech_token.pt")) == ["u0", "u3"]
    assert capsys.readouterr().err.count("3 of 5 utterances failed (u1:") == 2

    assert [row["utt"] for row in opened(make_parquet(data))] == ["u0", "u3"]
    assert "no utt_embedding" in read_table(data / "make_parquet_list.failed")["u1"]
    add_recording(wavs["u1"], 1)  # mended
    extract(data, networks)
    assert [row["utt"] for row in opened(make_parquet(data))] == ["u0", "u1", "u3"]


def test_a_vector_of_zeros_is_a_failure(data: Path, tmp_path: Path) -> None:
    class Zeros:
        def standard_normal(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
            return np.zeros(shape, dtype)

    write_speaker_encoder(tmp_path / "campplus.onnx", Zeros())
    with pytest.raises(InputError, match="no usable vector"):
        embed(data, tmp_path)


def test_it_is_an_error_when_no_utterance_works(data: Path, networks: Path) -> None:
    for wav in read_table(data / "wav.scp").values():
        Path(wav).write_bytes(b"")
    with pytest.raises(InputError, match="none of 5 utterances.*u0.*extract_embedding.failed"):
        embed(data, networks)
    assert len(read_table(data / "extract_embedding.failed")) == 5
    assert not (data / "utt2embedding.pt").exists()


def test_parquet_files_are_rewritten_only_where_something_changed(data: Path, networks: Path) -> None:
    extract(data, networks)
    parquet = make_parquet(data)
    files = sorted(parquet.glob("parquet_*.tar"))

    def change(act: Callable[[], object]) -> list[int]:
        """Numbers of the files that a run after `act` writes."""
        before = {path: path.stat().st_ino for path in files}
        act()
        make_parquet(data)
        return [number for number, path in enumerate(files) if path.exists() and path.stat().st_ino != before[path]]

    assert change(lambda: None) == []
    assert change(lambda: write_table(read_table(data / "text") | {"u2": "Other words."}, data / "text")) == [1]
    assert change(lambda: files[2].write_bytes(b"torn")) == [2]

    def add_one() -> None:
        new = Path(read_table(data / "wav.scp")["u0"]).with_name("5.wav")
        add_recording(new, 6)
        for name, value in {"wav.scp": str(new), "text": "This is u5.", "utt2spk": "carl"}.items():
            write_table(read_table(data / name) | {"u5": value}, data / name)
        extract(data, networks)

    assert change(add_one) == [2]
    assert [row["utt"] for row in opened(parquet)] == ["u0", "u1", "u2", "u3", "u4", "u5"]


def test_files_of_a_larger_run_go_away(data: Path, networks: Path) -> None:
    extract(data, networks)
    make_parquet(data, size=1)
    parquet = make_parquet(data, size=3)
    assert len(list(parquet.glob("*.tar"))) == 2 and len(list(parquet.glob("*.json"))) == 4
    assert len(opened(parquet)) == 5


def test_parquet_needs_the_stages_before(data: Path) -> None:
    with pytest.raises(InputError, match="utt2embedding.pt does not exist; run the stage before"):
        make_parquet(data)


def test_a_flat_folder_of_names_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, tables = tmp_path / "test", tmp_path / "data"
    for number, name in enumerate(["1_1", "1_2", "2_1", "2_2", "solo"], start=1):
        add_recording(source / f"{name}.wav", number)
    (source / "1_2.normalized.txt").write_bytes("\ufeffzwei\r\nZeilen\n".encode())
    (source / "2_1.normalized.txt").write_text(" \n")
    (source / "2_2.normalized.txt").write_text('"..."\n')
    prepare_data(["--src_dir", str(source), "--des_dir", str(tables)])
    assert read_table(tables / "utt2spk") == {"1_1": "1", "1_2": "1", "solo": "test"}
    assert read_table(tables / "spk2utt") == {"1": "1_1 1_2", "test": "solo"}
    assert read_table(tables / "wav.scp")["1_2"] == str(source / "1_2.wav")
    assert read_table(tables / "text")["1_2"] == "zwei Zeilen"
    failed = read_table(tables / "prepare_data.failed")
    assert "is empty" in failed["2_1"] and failed["2_2"].endswith("""has nothing to speak: '"..."'""")
    assert "2 of 5 utterances failed" in capsys.readouterr().err


def test_names_that_tables_cannot_hold_are_refused(tmp_path: Path) -> None:
    command = ["--src_dir", str(tmp_path / "raw"), "--des_dir", str(tmp_path / "data")]
    with pytest.raises(InputError, match="holds no recording"):
        prepare_data(command)
    add_recording(tmp_path / "raw" / "a b.wav", 1)
    with pytest.raises(InputError, match="blank or an unreadable letter"):
        prepare_data(command)
    not_utf8 = os.fsencode(tmp_path / "raw") + b"/\xff.wav"
    os.rename(tmp_path / "raw" / "a b.wav", not_utf8)
    with pytest.raises(InputError, match="blank or an unreadable letter"):
        prepare_data(command)
    os.rename(not_utf8, tmp_path / "raw" / "a.wav")
    add_recording(tmp_path / "raw" / "x" / "y" / "a.wav", 1)
    with pytest.raises(InputError, match="the same name"):
        prepare_data(command)


@pytest.mark.parametrize(
    "content, message",
    [(b"u1 a\nu1 b\n", "line 2: u1 is listed twice"), (b"u1 \xff\n", "not UTF-8"), (b"\n", "is empty")],
)
def test_tables_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "text")


class Site:
    """A local stand-in for the site: one archive, and its md5 sum where wanted."""

    def __init__(self, folder: Path) -> None:
        content = folder / "LibriTTS" / "tiny" / "1.wav"
        content.parent.mkdir(parents=True)
        content.write_bytes(bytes(range(256)) * 100)
        self.folder, self.data = folder, folder / "down load"
        self.archive = folder / "tiny.tar.gz"
        with tarfile.open(self.archive, "w:gz") as file:
            file.add(folder / "LibriTTS", "LibriTTS")
        self.md5 = hashlib.md5(self.archive.read_bytes()).hexdigest()

    def publish(self, md5: str) -> None:
        (self.folder / "md5sum.txt").write_text(f"{'0' * 32}  other.tar.gz\n{md5}  tiny.tar.gz\n")

    def download(self) -> subprocess.CompletedProcess:
        script = RECIPE / "local" / "download_and_untar.sh"
        command = ["bash", str(script), str(self.data), self.folder.as_uri(), "tiny"]
        return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    return Site(tmp_path)


def test_a_download_is_checked_and_not_repeated(site: Site) -> None:
    site.publish(site.md5)
    assert site.download().returncode == 0
    assert (site.data / "LibriTTS" / "tiny" / "1.wav").stat().st_size == 25600
    site.archive.unlink()
    (site.data / "tiny.tar.gz").unlink()
    again = site.download()
    assert again.returncode == 0 and "is complete" in again.stdout


def test_a_download_goes_on_where_it_stopped(site: Site) -> None:
    site.publish(site.md5)
    site.data.mkdir()
    whole = site.archive.read_bytes()
    (site.data / "tiny.tar.gz.part").write_bytes(whole[:50])
    site.archive.write_bytes(b"?" * 50 + whole[50:])  # only what is missing is taken from the site
    assert site.download().returncode == 0
    assert (site.data / "tiny.tar.gz").read_bytes() == whole


def test_a_damaged_download_is_deleted(site: Site) -> None:
    site.publish("1" * 32)
    result = site.download()
    assert result.returncode == 2 and "was damaged on its way" in result.stderr
    assert not (site.data / "tiny.tar.gz").exists() and not (site.data / "LibriTTS").exists()
    site.publish(site.md5)
    assert site.download().returncode == 0


def test_a_site_without_sums_is_told(site: Site) -> None:
    result = site.download()
    assert result.returncode == 0 and "it is not checked" in result.stderr


def test_a_download_goes_to_folders_whose_names_look_like_something_else(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("host:folder", "-C", tmp_path / "a:b"):
        site.data = name
        result = site.download()
        assert result.returncode == 0, result.stderr
        assert (tmp_path / name / "LibriTTS" / "tiny" / "1.wav").is_file()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "hostile",
    [
        member("../outside"),
        member("/outside"),
        member("outside"),
        member("LibriTTS/other/1.wav"),
        member("LibriTTS/tiny/../../../outside"),
        member("LibriTTS/tiny/link", tarfile.SYMTYPE, "/etc"),
        member("LibriTTS/tiny/link", tarfile.SYMTYPE, "../../../.."),
        member("LibriTTS/link", tarfile.SYMTYPE, "tiny"),
        member("LibriTTS/tiny/hard", tarfile.LNKTYPE, "/etc/passwd"),
        member("LibriTTS/tiny/null", tarfile.CHRTYPE),
        member("LibriTTS/tiny/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_an_archive_can_write_only_its_own_part(site: Site, hostile: tarfile.TarInfo) -> None:
    with tarfile.open(site.archive, "w:gz") as file:
        file.addfile(hostile)
        file.add(site.folder / "LibriTTS", "LibriTTS")
    result = site.download()
    assert result.returncode == 2 and "cannot be unpacked" in result.stderr and "Traceback" not in result.stderr
    made = [path for path in site.data.rglob("*") if path.name != "tiny.tar.gz"]
    assert not made and not (site.folder / "outside").exists()


def test_what_lies_beside_the_parts_is_unpacked_too(site: Site) -> None:
    (site.folder / "LibriTTS" / "LICENSE.txt").write_text("free")
    with tarfile.open(site.archive, "w:gz") as file:
        file.add(site.folder / "LibriTTS", "./LibriTTS")
    assert site.download().returncode == 0
    assert (site.data / "LibriTTS" / "LICENSE.txt").read_text() == "free"


@pytest.mark.parametrize("script", [RECIPE / "run.sh", ROOT / "examples" / "mini" / "run.sh"], ids=str)
@pytest.mark.parametrize("variable", ["stage", "stop_stage"])
def test_a_stage_that_is_no_number_is_named(script: Path, variable: str, tmp_path: Path) -> None:
    for value in ("two", "1.5", " ", "-"):
        given = {**os.environ, variable: value, "work_dir": str(tmp_path / "work")}
        result = subprocess.run(["bash", str(script)], env=given, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and f"the stage '{value}' is not a whole number" in result.stderr
    assert not (tmp_path / "work").exists()
