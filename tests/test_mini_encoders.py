"""CosyVoice-mini's speech tokenizer and speaker encoder: their codes, their training on a toy corpus, their files."""

import json
import struct
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
import whisper.model
from torch import Tensor, nn

from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.runtime.errors import InputError
from cosyvoice.speech_encoders.encoders import SpeakerEncoder, SpeechTokenizer
from cosyvoice.utils.audio import PROMPT_RATE_HZ, WHISPER_HOP_SAMPLES, WHISPER_MELS, whisper_log_mel
from cosyvoice.utils.frames import Rates
from examples.mini import (
    encoder_files,
    encoder_training,
    make_flow_start,
    make_speaker_encoder,
    tokenizer_training,
    train_tokenizer,
    whisper_encoder,
)
from examples.mini.encoder_files import export, round_weights
from examples.mini.encoder_training import Recording
from examples.mini.speech_tokenizer import Encoder, ScalarQuantiser, TokenizerFile, levels_of
from examples.mini.whisper_encoder import BLOCKS, WIDTH, To80Bins, WhisperEncoder, read_variables
from tools import packages
from tools.campplus import CAMPlus
from tools.kaldi_folder import write_table

CODES = 256
RECIPE = ModelFolder(Path(make_flow_start.__file__).parent)
RATES = Rates(22050, 256, 50)
STEPS = 12
TONES_HZ = (300, 2500, 0, 900)
SECONDS = 0.6  # of each tone
PRETRAINED = WhisperEncoder.pretrained  # which most tests replace

# The tokenizer's codes


@pytest.mark.parametrize("levels", [levels_of(CODES), (4, 3), (2, 7), (3,)])
def test_the_quantiser_reaches_every_code_and_each_has_its_own_number(levels: tuple[int, ...]) -> None:
    quantiser = ScalarQuantiser(levels)
    axis = torch.linspace(-4, 4, 36)
    quantised = quantiser(torch.cartesian_prod(*[axis] * len(levels)).view(-1, len(levels)))
    for number, count in enumerate(levels):
        found = quantised[:, number].unique()
        torch.testing.assert_close(found[(found.diff(prepend=found[:1] - 1) > 1e-3)], torch.linspace(-1, 1, count))
    assert quantised.abs().max() <= 1 + 1e-6
    indices = quantiser.indices(quantised)
    assert indices.dtype == torch.int32
    assert indices.unique().tolist() == list(range(quantiser.codes)) == list(range(int(np.prod(levels))))
    torch.testing.assert_close(quantiser.numbers(indices), quantised)


def test_the_first_number_is_the_lowest_digit_of_a_code() -> None:
    quantiser = ScalarQuantiser((4, 3))
    points = torch.tensor([*product(torch.linspace(-1, 1, 3).tolist(), torch.linspace(-1, 1, 4).tolist())]).flip(1)
    assert quantiser.indices(points).tolist() == list(range(12))


@pytest.mark.parametrize("count", [2, 5, 8])
def test_the_quantiser_rounds_to_the_nearest_level_and_passes_gradients(count: int) -> None:
    hidden = torch.linspace(-9, 9, 999)[:, None].requires_grad_()
    quantised = ScalarQuantiser((count,))(hidden)
    half = (count - 1) / 2
    bounded = hidden.detach().tanh() * (count / 2 - 1e-3) / half
    distances = (bounded - torch.linspace(-1, 1, count)).abs()  # (999, levels)
    torch.testing.assert_close((quantised - bounded).abs(), distances.amin(dim=1, keepdim=True), atol=1e-5, rtol=0)
    quantised.sum().backward()
    slope = (1 - hidden.detach().tanh() ** 2) * (count / 2 - 1e-3) / half
    torch.testing.assert_close(hidden.grad, slope)


def test_the_flow_starts_from_vectors_that_are_alike_where_the_codes_numbers_are(tmp_path: Path) -> None:
    config = Path(make_flow_start.__file__).with_name("cosyvoice.yaml")
    for name in ("start.pt", "again.pt"):
        make_flow_start.main(["--config", str(config), "--output", str(tmp_path / name), "--seed", "7"])
    state = torch.load(tmp_path / "start.pt")
    load_model_yaml(config, parts=("flow",))["flow"].load_state_dict(state)
    vectors = state["input_embedding.weight"]
    assert vectors.std() == pytest.approx(1, abs=0.2)
    numbers = ScalarQuantiser(levels_of(CODES)).numbers(torch.arange(CODES))
    rows, columns = torch.triu_indices(CODES, CODES, 1)
    near = (numbers[rows] - numbers[columns]).norm(dim=1), (vectors[rows] - vectors[columns]).norm(dim=1)
    assert torch.corrcoef(torch.stack(near))[0, 1] > 0.8  # of random vectors it would be 0
    assert all(torch.equal(value, state[name]) for name, value in torch.load(tmp_path / "again.pt").items())


def test_a_velocity_network_starts_as_one_that_takes_the_noise_away(tmp_path: Path) -> None:
    config = Path(make_flow_start.__file__).parents[1] / "mini2" / "cosyvoice2.yaml"
    make_flow_start.main(["--config", str(config), "--output", str(tmp_path / "start.pt"), "--seed", "7"])
    flow = load_model_yaml(config, parts=("flow",))["flow"]
    flow.load_state_dict(torch.load(tmp_path / "start.pt"))
    torch.manual_seed(0)
    noise, known = torch.randn(2, 80, 30), torch.zeros(2, 80, 30)
    mu = 2.4 * torch.randn(2, 80, 30) + make_flow_start.MEL_MEAN
    with torch.no_grad():
        velocity = flow.decoder.estimator(noise, known[:, :1] + 1, mu, torch.tensor([0.2, 0.8]), known[..., 0], known)
        encoded = flow.encoder_proj(torch.randn(500, flow.encoder_proj.in_features))
    assert (velocity - (mu - noise)).square().mean().sqrt() < 0.3 * mu.std()
    leaked = torch.linalg.lstsq(noise.flatten(0, 1), (velocity - mu + noise).flatten(0, 1)).solution
    assert leaked.abs().max() < 0.3
    assert encoded.mean() == pytest.approx(make_flow_start.MEL_MEAN, abs=0.2)


def test_a_velocity_network_needs_a_channel_for_each_of_the_mels() -> None:
    config = Path(make_flow_start.__file__).parents[1] / "mini2" / "cosyvoice2.yaml"
    network = load_model_yaml(config, parts=("velocity",))["velocity"]
    network.final_proj = torch.nn.Conv1d(64, 80, kernel_size=1)
    with pytest.raises(InputError, match="the flow's channels are 64, and must be at least 80"):
        make_flow_start.start_as_denoiser(network)


@pytest.mark.parametrize("codes", [4097, 1, 255])
def test_a_flow_of_another_tokenizer_is_refused(codes: int) -> None:
    with pytest.raises(InputError, match=f"speech_token_size is {codes}, and should be a fourth power"):
        make_flow_start.token_vectors(codes, 128)


# Whisper's features and encoder


def test_80_bins_come_close_to_whispers_own() -> None:
    wav = harmonic_speech()
    own = whisper_log_mel(wav, n_mels=whisper_encoder.BINS)
    mixed = To80Bins()(whisper_log_mel(wav))
    assert mixed.shape == own.shape == (1, 80, 150)
    assert (mixed - own).abs().mean() < 0.02
    assert (own.mean(dim=2) - own.mean()).abs().mean() > 0.1  # ten times as far if bins were mixed up


def test_filters_are_mixed_without_subtracting() -> None:
    mixture = whisper_encoder.mix_filters()
    assert mixture.shape == (80, WHISPER_MELS) and mixture.min() >= 0
    strongest = mixture.argmax(dim=1)
    assert (strongest.diff() >= 0).all() and strongest[0] < 3 and strongest[-1] > 124  # in the order of the fine ones


def test_the_encoder_equals_whispers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks instead of six are quicker. The weights are in half precision, as CTranslate2 stores them."""
    monkeypatch.setattr(whisper_encoder, "BLOCKS", 2)
    theirs = whisper_audio_encoder(frames=1500)
    content = write_variables(ctranslate2_variables(theirs))
    monkeypatch.setattr(whisper_encoder, "whisper_files", lambda: {"model.bin": content})
    ours, first = PRETRAINED(2), PRETRAINED(1)
    assert not any(parameter.requires_grad for parameter in ours.parameters()) and not ours.training
    log_mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(log_mel)
        torch.testing.assert_close(ours(log_mel), expected, atol=1e-4, rtol=1e-4)
        short = whisper_audio_encoder(frames=21)
        found = ours(log_mel[..., :41])
        torch.testing.assert_close(found, short(log_mel[..., :41]), atol=1e-4, rtol=1e-4)
        ours.blocks, ours.norm = ours.blocks[:1], nn.Identity()
        assert torch.equal(first(log_mel[..., :41]), ours(log_mel[..., :41]))  # it stops after the first block


def test_all_weights_of_six_blocks_have_a_source() -> None:
    encoder = WhisperEncoder(BLOCKS)
    state = encoder.state_dict()
    names = [f"encoder/{name}" for name in ("conv1/weight", "conv1/bias", "conv2/weight", "conv2/bias")]
    names += ["encoder/layer_norm/gamma", "encoder/layer_norm/beta"]
    for layer, part in product(range(BLOCKS), ("self_attention", "ffn")):
        ends = [f"linear_{n}/{kind}" for n in (0, 1) for kind in ("weight", "bias")]
        names += [f"encoder/layer_{layer}/{part}/{end}" for end in [*ends, "layer_norm/gamma", "layer_norm/beta"]]
    variables = {name: np.full(1, number, dtype=np.float16) for number, name in enumerate(names)}
    mapped = whisper_encoder.encoder_state(variables, BLOCKS)
    assert mapped.keys() == state.keys()
    assert sorted(int(value) for value in mapped.values()) == list(range(len(names)))  # each exactly once
    assert all(value.dtype == torch.float32 for value in mapped.values())


def test_variables_are_read_in_their_types_and_shapes() -> None:
    random = np.random.default_rng(1)
    variables = {
        "encoder/a/weight": random.standard_normal((2, 3, 4)).astype(np.float16),
        "b": random.standard_normal(5).astype(np.float32),
        "c": random.integers(-100, 100, (3, 1)).astype(np.int8),
        "d": np.array(7, dtype=np.int32),
        "e": np.array([-300], dtype=np.int16),
    }
    found = read_variables(write_variables(variables))
    assert found.keys() == variables.keys()
    for name, expected in variables.items():
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape, name
        assert np.array_equal(found[name], expected), name


def whisper_audio_encoder(frames: int) -> whisper.model.AudioEncoder:
    torch.manual_seed(4)
    encoder = whisper.model.AudioEncoder(80, frames, WIDTH, n_head=8, n_layer=2)
    for parameter in encoder.parameters():
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).half().float()
    return encoder.eval()


def ctranslate2_variables(encoder: whisper.model.AudioEncoder) -> dict[str, np.ndarray]:
    """Return the weights under CTranslate2's names, with query, key and value in one matrix."""
    state = encoder.state_dict()
    variables = {}
    for kind in ("weight", "bias"):
        beta = {"weight": "gamma", "bias": "beta"}[kind]
        variables |= {f"conv{n}/{kind}": state[f"conv{n}.{kind}"] for n in (1, 2)}
        variables[f"layer_norm/{beta}"] = state[f"ln_post.{kind}"]
        for layer in range(2):
            ours, theirs = f"layer_{layer}", f"blocks.{layer}"
            query = state[f"{theirs}.attn.query.{kind}"]
            key = state.get(f"{theirs}.attn.key.{kind}", torch.zeros_like(query))  # it has no bias
            variables |= {
                f"{ours}/self_attention/linear_0/{kind}": torch.cat([query, key, state[f"{theirs}.attn.value.{kind}"]]),
                f"{ours}/self_attention/linear_1/{kind}": state[f"{theirs}.attn.out.{kind}"],
                f"{ours}/self_attention/layer_norm/{beta}": state[f"{theirs}.attn_ln.{kind}"],
                f"{ours}/ffn/linear_0/{kind}": state[f"{theirs}.mlp.0.{kind}"],
                f"{ours}/ffn/linear_1/{kind}": state[f"{theirs}.mlp.2.{kind}"],
                f"{ours}/ffn/layer_norm/{beta}": state[f"{theirs}.mlp_ln.{kind}"],
            }
    return {f"encoder/{name}": value.half().numpy() for name, value in variables.items()}


def write_variables(variables: dict[str, np.ndarray]) -> bytes:
    """Return a file of CTranslate2, version 6."""

    def text(content: str) -> bytes:
        return struct.pack("<H", len(content) + 1) + content.encode() + b"\0"

    numbers = {kind: number for number, kind in enumerate(("float32", "int8", "int16", "int32", "float16"))}
    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        parts += [text(name), struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)]
        parts += [struct.pack("<BI", numbers[value.dtype.name], value.nbytes), value.tobytes()]
    return b"".join(parts)


# Files with small weights


class Small(nn.Module):
    """A matrix and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(64, 96)
        self.convolution = nn.Conv1d(96, 48, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(self.matrix(x).relu().transpose(1, 2))


def export_small(module: nn.Module, path: Path) -> dict[str, onnx.TensorProto]:
    export(module, small_inputs, path, "y", {"x": {1: "T"}, "y": {2: "T"}})
    return {stored.name: stored for stored in onnx.load(str(path)).graph.initializer}


def small_inputs(frames: int) -> dict[str, Tensor]:
    return {"x": torch.randn(1, frames, 64, generator=torch.Generator().manual_seed(frames))}


@pytest.mark.parametrize("rounded", [(), ("matrix",), ("convolution",), ("matrix", "convolution")])
def test_rounded_weights_are_stored_in_8_bits_and_others_in_16(rounded: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = Small()
    for name in rounded:
        round_weights(getattr(module, name))
    stored = export_small(module, tmp_path / "small.onnx")
    numbers = {"matrix": 64 * 96, "convolution": 96 * 48 * 3}
    for name, count in numbers.items():
        kind = onnx.TensorProto.INT8 if name in rounded else onnx.TensorProto.FLOAT16
        found = [tensor.data_type for tensor in stored.values() if int(np.prod(tensor.dims)) == count]
        assert found == [kind], name
    biases = [tensor for name, tensor in stored.items() if name.endswith("bias")]
    assert len(biases) == 2 and all(tensor.data_type == onnx.TensorProto.FLOAT for tensor in biases)
    weights = sum(count * (1 if name in rounded else 2) for name, count in numbers.items())
    assert weights < (tmp_path / "small.onnx").stat().st_size < weights + 4000
    if len(rounded) == 2:
        assert difference(module, tmp_path / "small.onnx") < 1e-5  # nothing is lost


def difference(module: nn.Module, path: Path) -> float:
    import onnxruntime

    inputs = small_inputs(37)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": inputs["x"].numpy()})
    with torch.no_grad():
        return float((module(inputs["x"]) - torch.from_numpy(found)).abs().max())


def test_weights_are_rounded_by_their_output_channel() -> None:
    torch.manual_seed(3)
    module = nn.Conv1d(8, 4, 3)
    with torch.no_grad():
        module.weight[1] *= 100  # a loud channel must not cost the others their precision
        module.weight[2] = 0
    before = {name: value.clone() for name, value in module.state_dict().items()}
    round_weights(module)
    steps = before["weight"].abs().amax(dim=(1, 2), keepdim=True) / 127
    assert ((module.weight - before["weight"]).abs() <= steps / 2 + 1e-7).all()
    ratios = module.weight[[0, 1, 3]] / steps[[0, 1, 3]]
    assert ratios.abs().max() <= 127 + 1e-3 and (ratios - ratios.round()).abs().max() < 1e-3
    assert not module.weight[2].any() and torch.equal(module.bias, before["bias"])
    again = module.weight.clone()
    round_weights(module)
    torch.testing.assert_close(module.weight, again)


def test_a_file_that_differs_from_its_module_is_not_written(tmp_path: Path) -> None:
    class OfOneLength(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2) * int(x.shape[1])  # the exporter takes it for a constant

    with pytest.raises(AssertionError, match="differs from its module"):
        export_small(OfOneLength(), tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []


# A toy corpus, and a random Whisper of one and two blocks


def random_whisper(blocks: int) -> WhisperEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(blocks)
        encoder = WhisperEncoder(1 if blocks < BLOCKS else 2)
        for convolution in (encoder.conv1, encoder.conv2):
            convolution.weight.data *= 4
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def quick() -> None:
    """Stand in for Whisper, train small networks on short crops, and check files with fewer frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WhisperEncoder, "pretrained", random_whisper)
        patch.setattr(tokenizer_training, "CROP_SECONDS", 0.8)
        for name in ("TEXT_BLOCKS", "MEL_BLOCKS", "FEATURE_BLOCKS"):
            patch.setattr(tokenizer_training, name, 1)
        patch.setattr(encoder_files, "CHECKED_FRAMES", (20, 21, 300))
        patch.setattr(encoder_training, "CHECKPOINT_STEPS", 5)
        patch.setattr(encoder_training, "REPORTS", 1)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus: Path) -> tuple[Path, dict[str, float]]:
    """Train a few steps. Return the file and the figures that the script prints."""
    with redirect_stdout(StringIO()) as printed:
        path = train(corpus, "first")
    return path, json.loads(printed.getvalue().splitlines()[-1])


def make_corpus(folder: Path) -> Path:
    """Write a Kaldi-style folder of two speakers, who whistle tones in different orders."""
    random = np.random.default_rng(1)
    wavs, speakers = {}, {}
    for number in range(6):
        utt = f"utt{number}"
        wav = folder / "wav" / f"{utt}.wav"
        wav.parent.mkdir(exist_ok=True)
        times = np.arange(int(SECONDS * PROMPT_RATE_HZ)) / PROMPT_RATE_HZ
        pitch = 1 + 0.3 * (number % 2)
        tones = [0.3 * np.sin(2 * np.pi * pitch * tone * times) for tone in random.permutation(TONES_HZ)]
        samples = np.concatenate(tones)
        soundfile.write(wav, samples + 0.01 * random.standard_normal(len(samples)), PROMPT_RATE_HZ)
        wavs[utt], speakers[utt] = str(wav), f"speaker{number % 2}"
    write_table(wavs, folder / "wav.scp")
    write_table(speakers, folder / "utt2spk")
    return folder


def train(corpus: Path, name: str) -> Path:
    path = corpus / name / "speech_tokenizer_v1.onnx"
    options = ["--data", str(corpus), "--dev", str(corpus), "--output", str(path), "--steps", str(STEPS)]
    train_tokenizer.main(options)
    return path


def features(wav: Path) -> tokenizer_training.Corpus:
    return tokenizer_training.Corpus([Recording(wav, "somebody")], RECIPE)


def test_a_killed_training_ends_as_an_uninterrupted_one(
    corpus: Path,
    trained: tuple[Path, dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole_step = encoder_training.Training._step

    def killed(self: encoder_training.Training, step: int, *arguments: object) -> float:
        if step == 8:
            raise KeyboardInterrupt
        return whole_step(self, step, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoder_training.Training, "_step", killed)
        train(corpus, "second")
    assert [path.name for path in (corpus / "second").iterdir()] == [".speech_tokenizer_v1.training.pt"]
    capsys.readouterr()
    again = train(corpus, "second")
    assert "continuing after step 5" in capsys.readouterr().out
    assert again.read_bytes() == trained[0].read_bytes()
    assert list(again.parent.iterdir()) == [again]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    wavs = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for wav in wavs:
        wav.write_bytes(b"speech")

    def run(steps: int = 9, seed: int = 1, recordings: int = 2, last: int = 100) -> None:
        model, count = nn.Linear(2, 1), iter(range(last))
        of = [Recording(wav, "somebody") for wav in wavs[:recordings]]
        training = encoder_training.Training(model, of, steps, seed, 1e-3, tmp_path / "out.onnx")
        training.run(lambda: model(torch.full((1, 2), float(next(count)))).mean(), str)

    with pytest.raises(StopIteration):
        run(last=6)
    for options in ({"steps": 10}, {"seed": 2}, {"recordings": 1}):
        with pytest.raises(InputError, match=r"out.training.pt is of other options or data. Delete it to train"):
            run(**options)
    wavs[1].write_bytes(b"other speech")
    with pytest.raises(InputError, match="is of other options or data"):
        run()
    encoder_training.checkpoint_of(tmp_path / "out.onnx").write_bytes(b"half of a checkpoint")
    with pytest.raises(InputError, match="delete it to train from the start"):
        run()


def test_a_finished_file_is_left_alone(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus / "fourth" / "speech_tokenizer_v1.onnx"
    path.parent.mkdir()
    path.write_bytes(b"finished")
    train(corpus, "fourth")
    assert path.read_bytes() == b"finished"
    assert "delete it to train again" in capsys.readouterr().out


def test_the_tokenizer_learns_and_reports(corpus: Path, trained: tuple[Path, dict[str, float]]) -> None:
    after = trained[1]
    torch.manual_seed(1)
    recordings = encoder_training.read_recordings([corpus])
    model = tokenizer_training.Model(CODES, 50)
    before = tokenizer_training.measure(model, tokenizer_training.Corpus(recordings, RECIPE))
    assert after["mel"] < 0.6 * before["mel"]
    assert 1 <= after["perplexity"] <= CODES and 0.2 < after["repeats"] <= 1
    assert after["speaker_by_chance"] == 0.5 <= after["speaker_from_token"] <= 1


def test_every_term_of_the_loss_falls_and_teaches_the_encoder(corpus: Path) -> None:
    torch.manual_seed(1)
    model, batch = tokenizer_training.Model(CODES, 50), features(corpus / "wav" / "utt0.wav").draw_batch()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    taught = {"mel": {"encoder", "speaker", "decoder"}, "features": {"encoder", "features"}, "change": {"encoder"}}
    losses = []
    for _ in range(25):
        terms = model.losses(*batch)
        losses.append({name: term.item() for name, term in terms.items()})
        assert terms.keys() == taught.keys()
        for name, term in terms.items() if len(losses) == 1 else ():
            optimiser.zero_grad()
            term.backward(retain_graph=True)
            grads = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
            assert {key.partition(".")[0] for key, grad in grads.items() if grad.any()} == taught[name], name
        optimiser.zero_grad()
        (terms["mel"] + terms["features"] + 0.1 * terms["change"]).backward()
        optimiser.step()
    assert losses[-1]["mel"] < 0.6 * losses[0]["mel"] and losses[-1]["features"] < 0.8 * losses[0]["features"]


def test_codes_of_known_recordings_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two speakers have one code each, and one in common."""
    codes = {"a": [1, 1, 2, 2], "b": [3, 3, 2, 2], "unheard": [3, 1, 3, 2]}
    corpus = object.__new__(tokenizer_training.Corpus)
    corpus.recordings = [Recording(Path(f"{name}.wav"), name) for name in ("a", "b")]
    corpus.utterances = ["a", "b"]
    dev = object.__new__(tokenizer_training.Corpus)
    dev.recordings, dev.utterances = [Recording(Path("c.wav"), "b")], ["unheard"]
    monkeypatch.setattr(tokenizer_training, "codes_of", lambda model, name: torch.tensor(codes[name]))
    model = tokenizer_training.Model(CODES, 50)
    leak = tokenizer_training.speaker_leak(model, corpus, dev)
    assert leak == {"speaker_from_token": 0.5, "speaker_by_chance": 0.5}
    leak = tokenizer_training.speaker_leak(model, corpus, corpus)
    assert leak == {"speaker_from_token": 0.75, "speaker_by_chance": 0.5}  # the code in common is taken for one of them
    spoken = torch.randn(20, WIDTH)
    corpus.utterances = [tokenizer_training.Utterance(spoken, spoken, torch.randn(80, 34))]
    monkeypatch.setattr(tokenizer_training, "codes_of", lambda model, utterance: torch.tensor([5, 5, 7, 9, 7, 9]))
    found = tokenizer_training.measure(model, corpus)
    assert found["perplexity"] == pytest.approx(3) and found["repeats"] == 0.2


@pytest.mark.parametrize("utterances", [2, 6, 100])
def test_recordings_are_drawn_in_their_order(utterances: int) -> None:
    recordings = [Recording(Path(f"{number}.wav"), "somebody") for number in range(6)]
    drawn = encoder_training.draw(recordings, utterances, seed=3)
    assert drawn == sorted(drawn, key=lambda recording: recording.wav) and len(drawn) == min(utterances, 6)
    assert drawn == encoder_training.draw(recordings, utterances, seed=3)
    assert len({tuple(encoder_training.draw(recordings, 2, seed)) for seed in range(9)}) > 1


def test_short_recordings_are_left_out_and_long_ones_cut(corpus: Path, tmp_path: Path) -> None:
    long, short = tmp_path / "long.wav", tmp_path / "short.wav"
    soundfile.write(long, harmonic_speech(30.7)[0].numpy(), PROMPT_RATE_HZ)
    soundfile.write(short, harmonic_speech(0.78)[0].numpy(), PROMPT_RATE_HZ)
    found = tokenizer_training.Corpus([Recording(short, "a"), Recording(long, "b")], RECIPE)
    assert [recording.speaker for recording in found.recordings] == ["b"]
    (utterance,) = found.utterances
    assert utterance.start.shape == utterance.features.shape == (1500, WIDTH)
    assert all(part.dtype == torch.float16 for part in (utterance.start, utterance.features, utterance.mel))
    with pytest.raises(InputError, match=r"no recording lasts 0.8 s. Give folders"):
        features(short)


def test_crops_of_features_and_mel_are_of_the_same_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and mel hold their own time in seconds."""
    monkeypatch.setattr(tokenizer_training, "CROP_SECONDS", 2.0)
    seconds = 4
    start = (torch.arange(50 * seconds) / 50)[:, None].expand(-1, 3)
    mel = (torch.arange(round(seconds * 22050 / 256)) * 256 / 22050).expand(2, -1)
    for seed in range(20):
        tokenizer_training.seed_all(seed)
        tokens, known, here, elsewhere = tokenizer_training.crop(tokenizer_training.Utterance(start, start, mel), RATES)
        assert torch.equal(tokens, known)
        assert tokens.shape == (100, 3) and here.shape == elsewhere.shape == (2, 172)
        assert abs(tokens[0, 0] - here[0, 0]) < 0.03
    padded = tokenizer_training.crop(tokenizer_training.Utterance(start[:100], start[:100], 1 + mel[:, :170]), RATES)[2]
    assert padded[:, 170:].eq(0).all() and padded[:, :170].gt(0).all()  # rounding may leave a mel short of a frame


def test_crops_for_25_tokens_a_second_begin_where_a_token_does() -> None:
    start = (torch.arange(200) / 50)[:, None].expand(-1, 3)
    mel = (torch.arange(200) / 50).expand(2, -1)  # 50 frames a second, like the hidden frames
    rates = Rates(sample_rate=24000, mel_hop=480, token_rate=25)
    begins = set()
    for seed in range(20):
        tokenizer_training.seed_all(seed)
        heard, _, here, _ = tokenizer_training.crop(tokenizer_training.Utterance(start, start, mel), rates)
        assert torch.equal(heard[:, 0], here[0])
        begins.add(round(float(heard[0, 0]) * 50))
    assert len(begins) > 5 and all(begin % 2 == 0 for begin in begins)


@pytest.mark.parametrize("frames", [1, 2, 7, 10])
def test_25_tokens_a_second_stand_for_two_frames_each(frames: int) -> None:
    """The last token of an odd number of frames hears its only one twice."""
    torch.manual_seed(1)
    encoder = Encoder(levels_of(625), 25).eval()
    hidden = torch.randn(1, frames, WIDTH)
    tokens = encoder(hidden)
    assert tokens.shape == (1, (frames + 1) // 2, 4)
    even = torch.cat((hidden, hidden[:, -1:]), dim=1) if frames % 2 else hidden
    assert torch.equal(tokens, encoder(even))
    mel = torch.randn(1, 80, 30)
    losses = tokenizer_training.Model(625, 25).eval().losses(hidden, hidden, mel, mel)
    assert all(value.isfinite() for name, value in losses.items() if frames > 2 or name != "change")


def test_bad_corpora_are_errors(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    for option in ("--steps", "--utterances"):
        with pytest.raises(InputError, match=f"{option} 0"):
            train_tokenizer.main(["--data", "a", "--dev", "b", "--output", str(corpus / "c.onnx"), option, "0"])
    with pytest.raises(InputError, match="wav.scp|utt2spk"):
        train(tmp_path / "nowhere", "first")
    (corpus / "wav" / "utt3.wav").write_bytes(b"no sound")
    with pytest.raises(InputError, match="utt3.wav cannot be decoded"):
        train(corpus, "first")
    write_table({"utt0": "one"}, corpus / "utt2spk")
    with pytest.raises(InputError, match="names no speaker of utt1"):
        train(corpus, "first")


# The files


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizerFile, SpeechTokenizer]:
    """Return a tokenizer with random weights that uses many of its codes, and its file."""
    torch.manual_seed(6)
    start = WhisperEncoder(2)
    round_weights(start)
    file = TokenizerFile(start, Encoder(levels_of(CODES), 50))
    with torch.no_grad():
        file.encoder.normalise.momentum = 1.0
        file.encoder.normalise(start(file.to_80_bins(torch.randn(1, WHISPER_MELS, 300))).transpose(1, 2))
        file.encoder.to_code[1].weight *= 3
    path = tmp_path_factory.mktemp("tokenizer") / "speech_tokenizer_v1.onnx"
    export(file, tokenizer_training.example_inputs, path, "indices", {"feats": {2: "T"}, "indices": {1: "N"}})
    return file, SpeechTokenizer(path, "cpu")


@pytest.fixture(scope="module")
def speaker_encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[CAMPlus, SpeakerEncoder]:
    """Return CAM++ with random weights, and its file."""
    folder = tmp_path_factory.mktemp("campplus")
    torch.manual_seed(5)
    network = CAMPlus().eval()
    torch.save(network.state_dict(), folder / "weights.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "packaged_file", lambda package, path: folder / "weights.pt")
        make_speaker_encoder.main(["--output", str(folder / "campplus.onnx")])
    return network, SpeakerEncoder(folder / "campplus.onnx", "cpu")


@pytest.mark.parametrize("seconds", [0.1, 0.205, 0.21, 3.0, 30.0])
def test_the_files_take_speech_of_any_length(
    tokenizer_file: tuple[TokenizerFile, SpeechTokenizer],
    speaker_encoder: tuple[CAMPlus, SpeakerEncoder],
    seconds: float,
) -> None:
    wav = speech(seconds)
    frames = wav.shape[1] // WHISPER_HOP_SAMPLES
    tokens = tokenizer_file[1](wav)
    assert tokens.shape == (1, (frames + 1) // 2)
    assert tokens.min() >= 0 and tokens.max() < CODES
    assert speaker_encoder[1](wav).shape == (1, 192)


def test_silence_has_tokens(tokenizer_file: tuple[TokenizerFile, SpeechTokenizer]) -> None:
    feats = whisper_log_mel(torch.zeros(1, PROMPT_RATE_HZ))
    tokens = tokenizer_file[1].run(feats.numpy(), np.array([feats.shape[2]], dtype=np.int32))
    assert tokens.shape == (1, 50) and tokens.min() >= 0 and tokens.max() < CODES


def test_the_files_declare_their_interfaces(
    tokenizer_file: tuple[TokenizerFile, SpeechTokenizer], speaker_encoder: tuple[CAMPlus, SpeakerEncoder]
) -> None:
    session = tokenizer_file[1].open()
    feats, length = session.get_inputs()
    (indices,) = session.get_outputs()
    assert (feats.name, feats.type, feats.shape) == ("feats", "tensor(float)", [1, WHISPER_MELS, "T"])
    assert (length.name, length.type, length.shape) == ("feats_length", "tensor(int32)", [1])
    assert (indices.name, indices.type, indices.shape) == ("indices", "tensor(int32)", [1, "N"])
    session = speaker_encoder[1].open()
    (fbank,), (vector,) = session.get_inputs(), session.get_outputs()
    assert (fbank.name, fbank.type, fbank.shape) == ("input", "tensor(float)", [1, "T", 80])
    assert (vector.name, vector.type, vector.shape[1]) == ("output", "tensor(float)", 192)


def test_frames_beyond_the_length_do_not_count(tokenizer_file: tuple[TokenizerFile, SpeechTokenizer]) -> None:
    tokenizer = tokenizer_file[1]
    feats = np.random.default_rng(2).standard_normal((1, WHISPER_MELS, 60), dtype=np.float32)
    length = np.array([33], dtype=np.int32)
    tokens = tokenizer.run(feats, length)
    assert tokens.shape == (1, 17)
    assert torch.equal(tokens, tokenizer.run(feats[:, :, :33], length))
    assert not torch.equal(tokens, tokenizer.run(feats, np.array([60], dtype=np.int32))[:, :17])


def test_the_tokenizers_file_is_small_and_keeps_whispers_blocks_rounded(
    tokenizer_file: tuple[TokenizerFile, SpeechTokenizer],
) -> None:
    file, tokenizer = tokenizer_file
    assert 9.2e6 < tokenizer.path.stat().st_size < 9.6e6
    inputs = tokenizer_training.example_inputs(999)
    with torch.no_grad():
        expected = file(*inputs.values())
    found = tokenizer.run(*(value.numpy() for value in inputs.values()))
    assert (found == expected).float().mean() > 0.97 and len(found.unique()) > CODES / 4
    stored = onnx.load(str(tokenizer.path)).graph.initializer
    in_bytes = sum(int(np.prod(tensor.dims)) for tensor in stored if tensor.data_type == onnx.TensorProto.INT8)
    assert in_bytes == sum(p.numel() for p in file.start.parameters() if p.dim() > 1)


def test_the_speaker_encoder_is_the_network_with_rounded_weights(
    speaker_encoder: tuple[CAMPlus, SpeakerEncoder],
) -> None:
    network, encoder = speaker_encoder
    assert 6.9e6 < encoder.path.stat().st_size < 7.6e6  # as many weights, in a byte each
    inputs = make_speaker_encoder.example_inputs(200)["input"]
    found = encoder.run(inputs.numpy())
    with torch.no_grad():
        assert torch.cosine_similarity(found, network(inputs)).item() > 0.99
        round_weights(network)
        torch.testing.assert_close(found, network(inputs), atol=1e-3, rtol=1e-3)


def harmonic_speech(seconds: float = 1.5) -> Tensor:
    """Return a gliding voice with noise between its pulses, (1, samples) at 16 kHz."""
    times = torch.arange(int(seconds * PROMPT_RATE_HZ)) / PROMPT_RATE_HZ
    phase = 2 * torch.pi * (110 * times + 30 * times.clamp(max=1.5) ** 2)
    voice = sum(torch.sin(number * phase) / number for number in range(1, 30))
    return (0.1 * voice * (1 + torch.sin(20 * times)) + 0.05 * speech(seconds)[0])[None]


def speech(seconds: float) -> Tensor:
    return 0.1 * torch.randn(1, int(seconds * PROMPT_RATE_HZ), generator=torch.Generator().manual_seed(3))
