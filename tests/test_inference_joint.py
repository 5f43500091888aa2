"""The command that speaks: which files it takes, what it writes, what it refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from models import tiny, tiny_model_dir

import inference_joint
from config import JOINT_TRAINING_CONFIG, MODES, PROJECT_DIR
from cosyvoice.cli.cosyvoice import CosyVoice
from cosyvoice.cli.model import CosyVoiceModel
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.precision import fastest_precision
from cosyvoice.utils.rates_300m import SAMPLE_RATE_HZ
from cosyvoice.utils.wav_files import write_wav
from llm_flow_model import JointModel
from lora import adapters
from utils import pick_device
from voices.lines import read_lines
from voices.merge import merge_run, merged_path
from voices.run import base_fingerprints, last_checkpoint, read_run
from voices.run_state import Origin

MODE = "joint"
SPEAKER = "anna"
TEXT = "Hello there."


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a base that has a speaker of the trained one's name."""
    folder = tiny_model_dir(tmp_path_factory.mktemp("model"))
    torch.save({SPEAKER: {"embedding": torch.zeros(1, 192)}}, folder / "spk2info.pt")
    return folder


@pytest.fixture(scope="module")
def output_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training run: a checkpoint with random adapters, and what merging made of it."""
    folder = tmp_path_factory.mktemp("output")
    torch.manual_seed(0)
    write_checkpoint(last_checkpoint(folder, MODE), model_dir)
    run = read_run(last_checkpoint(folder, MODE))
    targets = {part: merged_path(folder, part, MODE) for part in run.parts}
    merge_run(run, ModelFolder(model_dir), folder, targets, use_best=False)
    return folder


def write_checkpoint(path: Path, model_dir: Path) -> None:
    origin = Origin(MODE, run="1", base=base_fingerprints(ModelFolder(model_dir)), data="", speaker=SPEAKER)
    embedding = torch.nn.functional.normalize(torch.randn(192), dim=0)
    model = JointModel({part: tiny(part) for part in MODES[MODE]}, JOINT_TRAINING_CONFIG, 0, embedding, origin)
    for layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B, std=0.02)  # it starts at zero, and nothing is trained here
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


class Speaker:
    """Runs the command on the folders of this module and reads the wav it wrote."""

    def __init__(self, model_dir: Path, output_dir: Path, wav: Path) -> None:
        self.folders = ["--model-dir", str(model_dir), "--output-dir", str(output_dir), "--device", "cpu"]
        self.wav = wav

    def run(self, *options: str | Path) -> None:
        assert inference_joint.main([*self.folders, "--output", str(self.wav), *map(str, options)]) == 0

    def speak(self, *options: str | Path) -> np.ndarray:
        self.run("--text", TEXT, *options)
        return soundfile.read(self.wav)[0]


@pytest.fixture
def speaker(model_dir: Path, output_dir: Path, tmp_path: Path) -> Speaker:
    return Speaker(model_dir, output_dir, tmp_path / "result.wav")


def test_the_newest_voice_speaks(speaker: Speaker, capsys: pytest.CaptureFixture[str]) -> None:
    samples = speaker.speak("--seed", "7")
    info = soundfile.info(speaker.wav)
    assert (info.samplerate, info.channels) == (SAMPLE_RATE_HZ, 1)
    assert len(samples) > 0 and np.abs(samples).max() > 0.01
    with soundfile.SoundFile(speaker.wav) as file:
        assert "seed 7" in file.comment and fastest_precision(torch.device("cpu")) in file.comment
    printed = capsys.readouterr().out
    for expected in (f"llm_merged_{MODE}.pt", f"flow_merged_{MODE}.pt", "hift.pt", SPEAKER, "real-time factor"):
        assert expected in printed
    assert np.array_equal(samples, speaker.speak("--seed", "7"))


def test_a_stream_writes_each_piece_and_then_all_of_them(
    speaker: Speaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 9):
        (tmp_path / f"result.piece{number:03d}.wav").write_bytes(b"of an earlier run")
    whole = speaker.speak("--stream", "--seed", "7")
    pieces = [soundfile.read(path)[0] for path in sorted(tmp_path.glob("result.piece*.wav"))]
    assert pieces and np.array_equal(np.concatenate(pieces), whole) and np.abs(whole).max() > 0.01
    lines = [line for line in capsys.readouterr().out.splitlines() if "s of speech" in line]
    assert "result.piece001.wav" in lines[0] and "first sound after" in lines[0]
    assert "result.wav" in lines[len(pieces)] and "first sound" not in lines[len(pieces)]
    assert np.array_equal(whole, speaker.speak("--stream", "--seed", "7"))
    with pytest.raises(InputError, match="speed 1.5 cannot be streamed"):
        speaker.speak("--stream", "--speed", "1.5")


def test_a_wav_that_finds_no_room_is_told(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # Windows has none
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match="cannot write .*result.wav: File too large; make room"):
            write_wav(tmp_path / "result.wav", torch.zeros(1, 1000), SAMPLE_RATE_HZ, "seed 7")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_merged_file_that_is_gone_is_named(speaker: Speaker, output_dir: Path) -> None:
    flow = output_dir / f"flow_merged_{MODE}.pt"
    away = flow.rename(flow.with_suffix(".away"))
    try:
        with pytest.raises(InputError, match=f"{flow.name} of voice_.* is gone; run merge_joint_weights.py again"):
            speaker.speak()
    finally:
        away.rename(flow)


def test_a_card_too_old_for_torch_is_not_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "sm_120"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GeForce GTX 1080")
    for capability, device in (((7, 5), "cuda"), ((12, 0), "cuda"), ((6, 1), "cpu")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert pick_device("auto").type == device
    assert CosyVoiceModel(*map(tiny, ("llm", "flow", "hift"))).device.type == "cpu"
    assert capsys.readouterr().err.count("GTX 1080 is older than") == 2
    with pytest.raises(InputError, match="GTX 1080 is older than .* use --device cpu"):
        pick_device("cuda")


def test_adapters_speak_like_the_merged_voice(speaker: Speaker, output_dir: Path) -> None:
    merged = speaker.speak()
    adapted = speaker.speak("--adapter", last_checkpoint(output_dir, MODE))
    assert np.array_equal(merged, adapted)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_merged_and_adapted_voices_speak_in_fewer_bits(speaker: Speaker, output_dir: Path, precision: str) -> None:
    merged = speaker.speak("--precision", precision)
    adapted = speaker.speak("--precision", precision, "--adapter", last_checkpoint(output_dir, MODE))
    assert len(merged) > 0 and np.isfinite(merged).all()
    assert np.array_equal(merged, adapted)


def test_a_part_that_is_not_named_is_the_base(
    speaker: Speaker, output_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = speaker.speak("--llm", merged_path(output_dir, "llm", MODE), "--flow", merged_path(output_dir, "flow", MODE))
    assert np.array_equal(both, speaker.speak())
    capsys.readouterr()
    llm_alone = speaker.speak("--llm", merged_path(output_dir, "llm", MODE))
    assert "flow.pt (base)" in capsys.readouterr().out
    assert llm_alone.shape == both.shape and not np.allclose(llm_alone, both, atol=1e-3)


def test_the_speaker_vector_can_be_chosen(speaker: Speaker, output_dir: Path, tmp_path: Path) -> None:
    vector = torch.load(output_dir / "spk2info.pt", weights_only=True)[SPEAKER]["embedding"]
    torch.save(vector, tmp_path / "vector.pt")
    np.save(tmp_path / "vector.npy", vector[0].numpy())
    mean = speaker.speak()
    assert np.array_equal(mean, speaker.speak("--embedding", tmp_path / "vector.pt"))
    assert np.array_equal(mean, speaker.speak("--embedding", tmp_path / "vector.npy"))
    assert np.array_equal(mean, speaker.speak("--speaker", SPEAKER))
    zero = speaker.speak("--embedding", "zero")
    assert zero.shape != mean.shape or not np.allclose(zero, mean, atol=1e-3)


def test_each_line_becomes_a_wav(speaker: Speaker, tmp_path: Path) -> None:
    several, single = tmp_path / "several.txt", tmp_path / "single.txt"
    several.write_bytes("\ufeffFirst\f line.\r\n\r\nThird line.\r\n".encode())
    single.write_text("\n\nThird line.", encoding="utf-8")
    exact = ("--precision", "float32")
    speaker.run("--text-file", several, *exact)
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == ["result_001.wav", "result_003.wav"]
    third = (tmp_path / "result_003.wav").read_bytes()
    for options in (["--text-file", single], ["--text-file", several, "--batch-size", "1"]):
        (tmp_path / "result_003.wav").unlink()
        speaker.run(*options, *exact)
        assert (tmp_path / "result_003.wav").read_bytes() == third  # its draws do not depend on other lines


def test_long_text_is_split_and_joined(speaker: Speaker) -> None:
    sentence = "This is a rather long sentence of many words, and it goes on for quite a while. "
    speaker.run("--text", sentence)
    once = soundfile.info(speaker.wav).frames
    speaker.run("--text", sentence * 6)
    assert soundfile.info(speaker.wav).frames > 3 * once


def test_pieces_of_a_text_draw_differently(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the same words would be spoken alike, and unlike ones with the same rhythm."""
    monkeypatch.setattr(CosyVoice, "split", lambda _, text: [text, text])
    samples = speaker.speak()
    half = len(samples) // 2
    assert not np.array_equal(samples[:half], samples[half:])


def test_speed_shortens(speaker: Speaker) -> None:
    assert len(speaker.speak("--speed", "2")) == len(speaker.speak()) // 256 // 2 * 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", ""], "nothing to speak"),
        (["--text", " \n"], "nothing to speak"),
        (["--text", "?! ..."], "nothing to speak"),
        (["--text", TEXT, "--speed", "0.4"], "speed 0.4"),
        (["--text", TEXT, "--speed", "nan"], "speed nan"),
        (["--text", TEXT, "--output", "voice.mp3"], "voice.mp3"),
        (["--text", TEXT, "--precision", "int4"], "unknown precision 'int4'; give one of float32, float16"),
        (["--text", TEXT, "--speaker", "nobody"], "nobody.*anna"),
        (["--text", TEXT, "--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--text", TEXT, "--embedding", "nowhere.pt"], "nowhere.pt"),
        (["--text", TEXT, "--llm", "nowhere.pt"], "--llm nowhere.pt does not exist"),
        (["--text", TEXT, "--adapter", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--text", TEXT, "--model-dir", "nowhere"], "nowhere"),
        (["--text", TEXT, "--output-dir", "nowhere"], "no trained voice"),
        (["--text-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input(speaker: Speaker, options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        speaker.run(*options)
    assert not speaker.wav.exists()


def test_an_output_that_is_a_folder_is_refused_before_speaking(speaker: Speaker, tmp_path: Path) -> None:
    folder = tmp_path / "voice.wav"
    folder.mkdir()
    with pytest.raises(InputError, match=r"voice.wav is a folder; give a file, .*voice.wav/result.wav"):
        speaker.run("--text", TEXT, "--output", str(folder))


def test_lines_without_words_are_left_out_and_said_to_be(tmp_path: Path, capsys) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("One.\n---\n\nTwo.\n", encoding="utf-8")
    lines = read_lines(None, path, tmp_path / "out.wav")
    assert [(line.number, line.text) for line in lines] == [(1, "One."), (4, "Two.")]
    assert capsys.readouterr().err == f"left out: line 2 of {path} has nothing to speak: '---'\n"
    path.write_text("---\n", encoding="utf-8")
    with pytest.raises(InputError, match="has nothing to speak; write one"):
        read_lines(None, path, tmp_path / "out.wav")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.npy", np.zeros(3), "192"),
        ("nan.npy", np.full(192, np.nan), "192"),
        ("text.npy", np.full(192, "x"), "damaged"),
        ("objects.npy", np.full(192, None), "damaged"),
        ("dict.pt", {"embedding": torch.zeros(192)}, "192"),
        ("code.pt", Path("x"), "refused"),
    ],
)
def test_bad_speaker_vectors(speaker: Speaker, tmp_path: Path, name: str, content: object, message: str) -> None:
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        speaker.speak("--embedding", path)


def test_a_voice_of_another_base_is_refused(speaker: Speaker, output_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tiny_model_dir(tmp_path / "other")
    weights = torch.load(other / "flow.pt", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, other / "flow.pt")
    merged, checkpoint = merged_path(output_dir, "llm", MODE), last_checkpoint(output_dir, MODE)
    for options in ([], ["--adapter", checkpoint], ["--llm", merged]):
        with pytest.raises(InputError, match="another base"):
            speaker.speak("--model-dir", other, *options)


def test_speech_is_not_written_among_a_base_models_files(speaker: Speaker, model_dir: Path) -> None:
    with pytest.raises(InputError, match="is in the model folder"):
        speaker.speak("--output", model_dir / "speech.wav")
    assert not (model_dir / "speech.wav").exists()


def test_an_adapter_and_a_merged_file_for_one_part_are_refused(speaker: Speaker, output_dir: Path) -> None:
    merged, checkpoint = merged_path(output_dir, "llm", MODE), last_checkpoint(output_dir, MODE)
    with pytest.raises(InputError, match="leave out --llm"):
        speaker.speak("--adapter", checkpoint, "--llm", merged)


def test_a_merged_file_is_no_adapter(speaker: Speaker, output_dir: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        speaker.speak("--adapter", merged_path(output_dir, "llm", MODE))


def test_help_answers_without_torch() -> None:
    code = "import sys, inference_joint as i\ntry: i.parse(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--adapter" in done.stdout
