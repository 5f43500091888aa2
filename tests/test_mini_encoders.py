"""CosyVoice-mini's speech tokenizer and speaker encoder: their codes, their training on a toy corpus, their files."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from cosyvoice.utils.audio import PROMPT_RATE_HZ, WHISPER_HOP_SAMPLES, WHISPER_MELS
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.speech_encoders import SpeakerEncoder, SpeechTokenizer
from examples.mini import encoder_training, train_speaker_encoder, train_tokenizer
from examples.mini.encoder_training import augment, wrapped
from examples.mini.speaker_training import equal_error_rate
from examples.mini.speech_tokenizer import CODES, DIMENSIONS, LEVELS, PHONES, ScalarQuantiser, Tokenizer, token_phones
from examples.mini.tokenizer_training import warp_bins
from tools.kaldi_folder import write_table

SCRIPTS = {"speech_tokenizer_v1": train_tokenizer.main, "campplus": train_speaker_encoder.main}
STEPS = 6
TONES_HZ = {"aa": 300, "s": 2500, "pau": 0}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    corpus = make_corpus(tmp_path_factory.mktemp("trained"))
    return {name: train(corpus, name) for name in SCRIPTS}


def make_corpus(folder: Path) -> Path:
    """A Kaldi-style folder of two speakers, who whistle their phones."""
    random = np.random.default_rng(1)
    wavs, speakers = {}, {}
    for number in range(6):
        utt = f"utt{number}"
        wav = folder / "wav" / f"{utt}.wav"
        wav.parent.mkdir(exist_ok=True)
        times = np.arange(int(0.4 * PROMPT_RATE_HZ)) / PROMPT_RATE_HZ
        pitch = 1 + 0.3 * (number % 2)
        parts = [0.3 * np.sin(2 * np.pi * pitch * tone * times) for tone in TONES_HZ.values()]
        soundfile.write(wav, np.concatenate(parts) + 0.01 * random.standard_normal(3 * len(times)), PROMPT_RATE_HZ)
        ends = [f"{0.4 * (place + 1):.3f} {phone}" for place, phone in enumerate(TONES_HZ)]
        wav.with_suffix(".phones").write_text("\n".join(ends) + "\n")
        wavs[utt], speakers[utt] = str(wav), f"speaker{number % 2}"
    write_table(wavs, folder / "wav.scp")
    write_table(speakers, folder / "utt2spk")
    return folder


def train(corpus: Path, name: str, output: str = "first") -> Path:
    path = corpus / output / f"{name}.onnx"
    arguments = ["--data", str(corpus), "--dev", str(corpus), "--output", str(path), "--steps", str(STEPS)]
    SCRIPTS[name](arguments)
    return path


def test_the_quantiser_reaches_every_code_and_each_has_its_own_number() -> None:
    levels = torch.tensor([-3.0, -0.4, 0.4, 3.0])
    hidden = torch.tensor(list(product(levels.tolist(), repeat=DIMENSIONS)))  # (CODES, DIMENSIONS)
    quantised = ScalarQuantiser()(hidden)
    assert quantised.unique().tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert sorted(ScalarQuantiser.indices(quantised).tolist()) == list(range(CODES)) == list(range(LEVELS**DIMENSIONS))


def test_the_quantiser_rounds_to_the_nearest_level_and_passes_gradients() -> None:
    hidden = torch.linspace(-20, 20, 999)[:, None].expand(-1, DIMENSIONS).clone().requires_grad_()
    quantised = ScalarQuantiser()(hidden)
    bounded = hidden.tanh() * LEVELS / 2
    assert (quantised - bounded).abs().max() <= 0.502  # half a step, and the edge that is kept free
    quantised.sum().backward()
    assert hidden.grad[499].min() > 1.9  # the slope of 2 tanh at zero


def test_tokens_do_not_know_the_mean_spectrum() -> None:
    torch.manual_seed(1)
    tokenizer, feats = Tokenizer().eval(), torch.randn(1, WHISPER_MELS, 41)
    coloured = feats + torch.randn(1, WHISPER_MELS, 1)
    hidden = [tokenizer.quantiser(tokenizer.encode(each)) for each in (feats, coloured)]
    assert hidden[0].shape == (1, 21, DIMENSIONS)
    assert (ScalarQuantiser.indices(hidden[0]) == ScalarQuantiser.indices(hidden[1])).float().mean() > 0.9


def test_phones_are_those_at_the_tokens_centres(tmp_path: Path) -> None:
    path = tmp_path / "a.phones"
    path.write_text("0.035 pau\n0.050 s\n0.080 aa\n")
    phones = [PHONES[phone] for phone in token_phones(path, 5).tolist()]
    # at 10, 30, 50, 70, 90 ms; a phone begins where the one before ends
    assert phones == ["pau", "pau", "aa", "aa", "aa"]


@pytest.mark.parametrize("line", ["0.1", "soon aa", "0.1 AA", ""])
def test_a_bad_line_of_phones_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.phones"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match="a.phones, line 1"):
        token_phones(path, 5)


def test_crops_go_round() -> None:
    assert wrapped(3, 6, 4).tolist() == [3, 0, 1, 2, 3, 0]


def test_augmentation_keeps_silence_and_speech_finite_and_adds_noise() -> None:
    torch.manual_seed(1)
    speech = torch.randn(4, 80, 50)
    speech[:, :, 25:] = -23.0  # the floor
    heard = augment(speech)
    assert heard.shape == speech.shape and heard.isfinite().all()
    assert heard[:, :, 25:].min() > -22
    assert augment(torch.full((1, 80, 9), -23.0)).isfinite().all()


def test_warped_bins_move_by_the_factor() -> None:
    feats = torch.arange(128.0)[None, :, None].expand(2, -1, 3)
    warped = warp_bins(feats, torch.tensor([1.0, 0.9]))
    torch.testing.assert_close(warped[0], feats[0])
    torch.testing.assert_close(warped[1], 0.9 * feats[1])


def test_equal_error_rate_of_known_pairs() -> None:
    assert equal_error_rate(torch.tensor([0.8, 0.9]), torch.tensor([0.1, 0.2])) == 0
    assert equal_error_rate(torch.tensor([0.1, 0.8]), torch.tensor([0.2, 0.0])) == 0.5


@pytest.mark.parametrize("seconds", [0.1, 0.205, 0.21, 3.0, 30.0])
def test_the_files_take_speech_of_any_length(trained: dict[str, Path], seconds: float) -> None:
    wav = speech(seconds)
    frames = wav.shape[1] // WHISPER_HOP_SAMPLES
    tokens = SpeechTokenizer(trained["speech_tokenizer_v1"], "cpu")(wav)
    assert tokens.shape == (1, (frames + 1) // 2)
    assert tokens.min() >= 0 and tokens.max() < CODES
    assert SpeakerEncoder(trained["campplus"], "cpu")(wav).shape == (1, 192)


def test_silence_has_tokens(trained: dict[str, Path]) -> None:
    tokens = SpeechTokenizer(trained["speech_tokenizer_v1"], "cpu")(torch.zeros(1, PROMPT_RATE_HZ))
    assert tokens.min() >= 0 and tokens.max() < CODES


def test_the_tokenizers_file_declares_its_interface(trained: dict[str, Path]) -> None:
    session = SpeechTokenizer(trained["speech_tokenizer_v1"], "cpu").open()
    feats, length = session.get_inputs()
    (indices,) = session.get_outputs()
    assert (feats.name, feats.type, feats.shape) == ("feats", "tensor(float)", [1, WHISPER_MELS, "T"])
    assert (length.name, length.type, length.shape) == ("feats_length", "tensor(int32)", [1])
    assert (indices.name, indices.type) == ("indices", "tensor(int32)")


def test_frames_beyond_the_length_do_not_count(trained: dict[str, Path]) -> None:
    tokenizer = SpeechTokenizer(trained["speech_tokenizer_v1"], "cpu")
    feats = np.random.default_rng(2).standard_normal((1, WHISPER_MELS, 60), dtype=np.float32)
    length = np.array([33], dtype=np.int32)
    assert torch.equal(tokenizer.run(feats, length), tokenizer.run(feats[:, :, :33], length))


def test_a_killed_training_ends_as_an_uninterrupted_one(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoder_training, "CHECKPOINT_STEPS", 2)
    whole_step = encoder_training.Training._step
    for name in SCRIPTS:
        train(corpus, name)

        def killed(self: encoder_training.Training, step: int, *arguments: object) -> float:
            if step == 3:
                raise KeyboardInterrupt
            return whole_step(self, step, *arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(encoder_training.Training, "_step", killed)
            train(corpus, name, "second")
        assert not (corpus / "second" / f"{name}.onnx").exists()
        capsys.readouterr()
        again = train(corpus, name, "second")
        assert "continuing after step 2" in capsys.readouterr().out
        assert again.read_bytes() == (corpus / "first" / again.name).read_bytes()
        assert [path.name for path in again.parent.glob(f".{name}*")] == []


def test_a_checkpoint_of_other_options_is_refused(corpus: Path) -> None:
    checkpoint = encoder_training.checkpoint_of(corpus / "first" / "campplus.onnx")
    checkpoint.parent.mkdir()
    torch.save({"recipe": "{}", "step": 2}, checkpoint)
    with pytest.raises(InputError, match="of other options or data; delete it"):
        train(corpus, "campplus")


def test_a_finished_file_is_left_alone(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in SCRIPTS:
        path = corpus / "first" / f"{name}.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"finished")
        train(corpus, name)
        assert path.read_bytes() == b"finished"
        assert "delete it to train anew" in capsys.readouterr().out


def test_the_tokenizer_learns_and_reports(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus / "longer.onnx"
    train_tokenizer.main(["--data", str(corpus), "--dev", str(corpus), "--output", str(path), "--steps", "120"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["phone_accuracy"] > 0.6  # of three phones
    assert 3 <= results["codes_used"] <= CODES and 2 < results["perplexity"] <= results["codes_used"] + 1e-6
    assert results["speaker_by_chance"] == 0.5 <= results["speaker_from_token"]


def test_bad_corpora_are_errors(corpus: Path) -> None:
    with pytest.raises(InputError, match="--steps 0"):
        train_tokenizer.main(["--data", "a", "--dev", "b", "--output", str(corpus / "c.onnx"), "--steps", "0"])
    write_table({f"utt{number}": "one" for number in range(6)}, corpus / "utt2spk")
    with pytest.raises(InputError, match="one is the only speaker"):
        train(corpus, "campplus")
    for phones in (corpus / "wav").glob("*.phones"):
        phones.unlink()
    with pytest.raises(InputError, match="no recording has .phones"):
        train(corpus, "speech_tokenizer_v1")
    write_table({"utt0": "one"}, corpus / "utt2spk")
    with pytest.raises(InputError, match="names no speaker of utt1"):
        train(corpus, "campplus")


def speech(seconds: float) -> Tensor:
    return 0.1 * torch.randn(1, int(seconds * PROMPT_RATE_HZ), generator=torch.Generator().manual_seed(3))
