"""CosyVoice-mini: how its folder is made, what ships, and when it is used."""

import gzip
import hashlib
import shutil
from pathlib import Path

import pytest
import soundfile
import torch

import config
from config import MINI_NAME, PROJECT_DIR, find_model_dir
from cosyvoice.bin import export_jit, export_onnx
from cosyvoice.cli.cosyvoice import CosyVoice
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import save_tensors
from examples.mini import make_model_dir, resynthesise, voice_folders
from tools.kaldi_folder import write_table

SHIPPED = PROJECT_DIR / "pretrained_models" / MINI_NAME
RECIPE = PROJECT_DIR / "examples" / "mini"
LARGEST_BYTES = 40_000_000
SENTENCE = "The old man walks to the market."


def test_the_shipped_folder_is_whole_and_has_the_card_beside_the_recipe() -> None:
    read_sums(SHIPPED)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= LARGEST_BYTES
    assert (SHIPPED / "README.md").read_bytes() == (RECIPE / "model_card.md").read_bytes()


def test_the_shipped_folder_is_of_the_recipe_beside_it() -> None:
    assert (SHIPPED / "cosyvoice.yaml").read_bytes() == (RECIPE / "cosyvoice.yaml").read_bytes()


def read_sums(folder: Path) -> dict[str, str]:
    """Return the digests of SHA256SUMS by file, after a check that they are right and that no file is missing."""
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert {path.name for path in folder.iterdir()} == {*sums, "SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    return sums


def test_its_attention_stacks_are_exported(tmp_path: Path) -> None:
    """Trained weights make larger numbers, and larger rounding errors, than random ones."""
    for name in ("cosyvoice.yaml", "llm.pt", "flow.pt"):
        shutil.copy(SHIPPED / name, tmp_path)
    export_jit.main(["--model_dir", str(tmp_path)])
    assert len(list(tmp_path.glob("*.fp32.zip"))) == len(export_jit.STACKS)


def test_a_flow_without_an_estimator_is_not_exported() -> None:
    with pytest.raises(InputError, match="CosyVoice-mini has no estimator to be exported"):
        export_onnx.main(["--model_dir", str(SHIPPED)])


def test_the_shipped_model_speaks_a_sentence_of_the_right_length() -> None:
    cosyvoice = CosyVoice(str(SHIPPED))
    assert cosyvoice.list_available_spks() == ["gongitsune", "nezumi", "kumo"]
    torch.manual_seed(0)
    (piece,) = cosyvoice.inference_sft(SENTENCE, "kumo")
    seconds = piece["tts_speech"].size(1) / cosyvoice.sample_rate
    assert 1 < seconds < 4 and 0.01 < piece["tts_speech"].std() < 0.5


def test_recordings_pass_through_the_shipped_models_later_parts(tmp_path: Path) -> None:
    clip = PROJECT_DIR / "examples" / "raw_audio" / "001"
    for suffix in (".wav", ".txt"):
        shutil.copy(clip.with_suffix(suffix), tmp_path)
    seconds = soundfile.info(clip.with_suffix(".wav")).duration
    for through in ("mel", "tokens"):
        options = ["--src_dir", str(tmp_path), "--des_dir", str(tmp_path / through), "--model-dir", str(SHIPPED)]
        resynthesise.main([*options, "--through", through])
        assert soundfile.info(tmp_path / through / "001.wav").duration == pytest.approx(seconds, abs=0.05)
        assert (tmp_path / through / "001.txt").read_text() == clip.with_suffix(".txt").read_text()


def trained(folder: Path) -> Path:
    """What the recipe leaves, with random weights and files that are no networks."""
    for part, place in (("llm", "llm/llm.pt"), ("flow", "flow/flow.pt"), ("hift", "hifigan/hift.pt")):
        torch.manual_seed(0)
        module = load_model_yaml(RECIPE / "cosyvoice.yaml", parts=(part,))[part]
        save_tensors(module.state_dict(), folder / "exp" / place)
    for name in ("campplus.onnx", "speech_tokenizer_v1.onnx"):
        (folder / name).write_bytes(b"onnx")
    (folder / "lexicon.txt.gz").write_bytes(gzip.compress(b"the dh ax0\nwalks w ao1 k s\n"))
    save_tensors({"slt": [1.0] * 192, "f2": [0.5] * 192}, folder / "voices" / "train" / "spk2embedding.pt")
    return folder


def test_a_model_folder_is_made_from_what_the_recipe_leaves(tmp_path: Path) -> None:
    work_dir, folder = trained(tmp_path / "work"), tmp_path / "model"
    options = ["--recipe", str(RECIPE), "--work_dir", str(work_dir), "--model_dir", str(folder), "--voices"]
    with pytest.raises(InputError, match="has no speaker rms. It has slt, f2"):
        make_model_dir.main([*options, "rms"])
    assert not folder.exists()
    make_model_dir.main([*options, "f2"])
    assert torch.load(folder / "llm.pt")["llm_decoder.bias"].dtype == torch.float16
    sums = read_sums(folder)
    assert {"lexicon.txt.gz", "campplus.onnx", "speech_tokenizer_v1.onnx", "spk2info.pt"} < sums.keys()
    for name in ("lexicon.txt.gz", "campplus.onnx", "speech_tokenizer_v1.onnx"):
        assert (folder / name).read_bytes() == (work_dir / name).read_bytes()
    assert (folder / "cosyvoice.yaml").read_bytes() == (RECIPE / "cosyvoice.yaml").read_bytes()
    assert (folder / "README.md").read_bytes() == (RECIPE / "model_card.md").read_bytes()
    cosyvoice = CosyVoice(str(folder))
    assert cosyvoice.list_available_spks() == ["f2"]
    stored = cosyvoice.frontend.spk2info["f2"]["embedding"]
    assert torch.equal(stored, torch.full((1, 192), 0.5))
    tokenizer = cosyvoice.frontend.tokenizer  # reads with the lexicon of the folder
    assert tokenizer.decode(tokenizer.encode("The cat")) == "/dh ax0/ cat"
    for name in ("campplus.onnx", "lexicon.txt.gz"):
        (work_dir / name).rename(work_dir / "moved")
        with pytest.raises(InputError, match=f"{name} does not exist. Run the stages"):
            make_model_dir.main([*options, "f2"])
        (work_dir / "moved").rename(work_dir / name)


def test_a_folder_holds_equal_weights_once(tmp_path: Path) -> None:
    embedding = torch.randn(9, 4)
    tied = make_model_dir.halved({"embedding": embedding, "head": embedding.clone(), "turned": embedding.view(4, 9)})
    assert tied["embedding"] is tied["head"]
    assert tied["turned"].shape == (4, 9) and torch.equal(tied["head"], embedding.half())


def test_a_folder_for_each_speaker(tmp_path: Path) -> None:
    source, target = tmp_path / "dev", tmp_path / "voices"
    for name in ("one", "two"):
        (tmp_path / f"{name}.wav").write_bytes(name.encode())
    write_table({name: str(tmp_path / f"{name}.wav") for name in ("one", "two")}, source / "wav.scp")
    write_table({"one": "Hello there.", "two": "Good night."}, source / "text")
    write_table({"one": "awb", "two": "slt"}, source / "utt2spk")
    voice_folders.main(["--src_dir", str(source), "--des_dir", str(target)])
    files = {str(path.relative_to(target)): path.read_text() for path in target.glob("*/*")}
    assert files == {
        "awb/one.wav": "one", "awb/one.txt": "Hello there.\n", "slt/two.wav": "two", "slt/two.txt": "Good night.\n",
    }  # fmt: skip


def test_the_mini_is_used_where_there_is_no_300m_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project, elsewhere = tmp_path / "home" / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(config, "PROJECT_DIR", project)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(InputError, match="no model folder CosyVoice-300M"):
        find_model_dir(None)
    models = {name: project / "pretrained_models" / name for name in (MINI_NAME, "CosyVoice-300M-SFT")}
    for name, folder in models.items():
        folder.mkdir(parents=True)
        (folder / "cosyvoice.yaml").touch()
        assert find_model_dir(None).path == folder  # the larger one as soon as it is there
        assert (MINI_NAME in capsys.readouterr().out) == (name == MINI_NAME)
