"""`--engine ray` of the stages 1 to 3: on a cluster that loses a machine it makes the same files as the pool."""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recipe import RAW_AUDIO

from cosyvoice.runtime.errors import InputError
from cosyvoice.speech_encoders import encoders
from cosyvoice.speech_encoders.encoders import SpeakerEncoder
from tools import extract_embedding, extract_speech_token, make_parquet_list, ray_engine
from tools.engines import add_engine, opened
from tools.kaldi_folder import read_numbers, read_table, write_table
from tools.random_onnx import write_speaker_encoder, write_speech_tokenizer

ROOT = Path(__file__).resolve().parents[1]
UTTERANCES = 12
LOSES, LOST = "TEST_LOSES_MACHINE", "TEST_LOST"  # whether this machine is lost; a file that is there once it was

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (requirements-cluster.txt)")


class MortalEncoder(SpeakerEncoder):
    """One that at its second recording loses the machine it is on, while those elsewhere wait for that."""

    calls = 0

    def __call__(self, wav_16k: torch.Tensor) -> torch.Tensor:
        lost = Path(os.environ[LOST])
        self.calls += 1
        if os.environ.get(LOSES) and self.calls == 2:
            lost.touch()
            os.kill(os.getppid(), signal.SIGKILL)  # Ray's process for this machine
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 120
        while self.calls == 2 and not lost.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return super().__call__(wav_16k)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of two machines of one core each, with all that Ray writes in a folder of its own."""
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,  # sockets want short paths
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # it would leave a token in the home folder
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))  # for MortalEncoder
        patch.setenv(LOST, str(tmp_path_factory.mktemp("cluster") / "lost"))
        from ray.cluster_utils import Cluster

        cluster = Cluster(True, head_node_args={**small, "temp_dir": folder, "include_dashboard": False})
        try:
            cluster.add_node(**small, env_vars={LOSES: "1"})
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster.address
        finally:
            cluster.shutdown()


def write_corpus(folder: Path) -> None:
    """Networks and a Kaldi-style folder with relative paths; one recording is damaged."""
    (folder / "wavs").mkdir(parents=True)
    random = np.random.default_rng(0)
    write_speech_tokenizer(folder / "tokenizer.onnx", random, token_rate=50, speech_tokens=4096)
    write_speaker_encoder(folder / "campplus.onnx", random)
    wavs = {f"u{number:02d}": f"wavs/{number:03d}.wav" for number in range(1, UTTERANCES + 1)}
    for wav in wavs.values():
        shutil.copy(RAW_AUDIO / Path(wav).name, folder / wav)
    (folder / wavs["u05"]).write_bytes(b"RIFF, and then nothing")
    write_table(wavs, folder / "data" / "wav.scp")
    write_table({utt: f"This is {utt}." for utt in wavs}, folder / "data" / "text")
    write_table({utt: "anna" if utt < "u06" else "bert" for utt in wavs}, folder / "data" / "utt2spk")


def run_stages(engine: str) -> None:
    """Stages 1 to 3 in the current folder."""
    work = ["--dir", "data", "--num_thread", "2", "--engine", engine]
    extract_embedding.main([*work, "--onnx_path", "campplus.onnx"])
    extract_speech_token.main([*work, "--onnx_path", "tokenizer.onnx"])
    options = ["--num_utts_per_parquet", "4", "--num_processes", "2", "--engine", engine]
    make_parquet_list.main([*options, "--src_dir", "data", "--des_dir", "data/parquet"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@with_ray
def test_a_cluster_that_loses_a_machine_makes_the_same_files(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "pool")
    shutil.copytree(tmp_path / "pool", tmp_path / "ray")  # with the times of the files
    monkeypatch.chdir(tmp_path / "pool")
    run_stages("pool")
    monkeypatch.setattr(encoders, "SpeakerEncoder", MortalEncoder)
    monkeypatch.chdir(tmp_path / "ray")
    run_stages("ray")

    assert Path(os.environ[LOST]).exists()
    assert "ray: 2 cores on 2 machine(s)" in capsys.readouterr().err
    made = files(tmp_path / "ray")
    assert made == files(tmp_path / "pool")
    assert len(read_numbers(tmp_path / "ray/data/utt2embedding.pt")) == UTTERANCES - 1
    assert list(read_table(tmp_path / "ray/data/extract_embedding.failed")) == ["u05"]
    assert len([name for name in made if name.endswith(".tar")]) == 3


def refuse(item: int) -> None:
    raise InputError(f"{item} is wrong; give another")


@with_ray
def test_what_a_job_raises_arrives(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("ray", 1) as spread:
        with pytest.raises(InputError, match="^7 is wrong; give another$"):
            list(spread(refuse, [7]))
        monkeypatch.setattr(ray_engine, "ROOT", tmp_path / "elsewhere")
        with pytest.raises(NotADirectoryError, match="lacks a folder that all machines.*elsewhere"):
            list(spread(refuse, [7]))


@with_ray
def test_an_address_where_nothing_listens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"no Ray cluster at {address} .*refused"), opened("ray", 1):
        pass


def test_a_ray_that_does_not_start_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out.\nMore about it.")  # as Ray has it, on a machine that is too busy

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = r"^no Ray cluster at this machine \(The current node timed out\.\); see .*$"
    with pytest.raises(InputError, match=told), opened("ray", 1):
        pass


def test_without_ray_one_line_says_what_to_install(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    code = (
        "import sys\n"
        "sys.modules['ray'] = None\n"  # as if it was not there
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from cosyvoice.runtime.command import run\n"
        "from tools.extract_embedding import main\n"
        "run(main)\n"
    )
    command = [sys.executable, "-c", code, "--dir", "data", "--onnx_path", "campplus.onnx", "--engine", "ray"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Ray is not installed" in result.stderr and "pip install -r requirements-cluster.txt" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_pool_is_the_default() -> None:
    parser = argparse.ArgumentParser()
    add_engine(parser)
    assert parser.parse_args([]).engine == "pool"
    with opened("pool", 2) as spread:
        assert list(spread(str, range(20))) == [str(number) for number in range(20)]
