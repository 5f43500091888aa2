"""What the front end makes of texts, recordings and stored voices."""

import io
import math
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import whisper.tokenizer

from cosyvoice.cli.frontend import CosyVoiceFrontEnd, load_prompt, read_spk2info
from cosyvoice.cli.text_normalizer import TextNormalizer, TextSplit
from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.tokenizer import get_byte_tokenizer, get_tokenizer
from cosyvoice.utils.audio import kaldi_fbank, load_wav, read_wav, resample, whisper_log_mel
from cosyvoice.utils.frontend_utils import break_long
from matcha.utils.audio import mel_filters, mel_spectrogram
from tools.random_onnx import write_speaker_encoder, write_speech_tokenizer

RATE_HZ = 22050
SECONDS = 1.2
WHISPER = partial(get_tokenizer, multilingual=True, num_languages=100, language="en", task="transcribe")
MEL = partial(
    mel_spectrogram,
    n_fft=1024,
    num_mels=80,
    sampling_rate=RATE_HZ,
    hop_size=256,
    win_size=1024,
    fmin=0,
    fmax=8000,
)


def glide(seconds: float = SECONDS, rate: int = RATE_HZ) -> np.ndarray:
    at = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 300 * at) * at)).astype(np.float32)


NOISE = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)) / 10


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "prompt.wav"
    soundfile.write(path, glide(), RATE_HZ)
    return path


def make_frontend(folder: Path, **options: object) -> CosyVoiceFrontEnd:
    random = np.random.default_rng(0)
    write_speaker_encoder(folder / "campplus.onnx", random)
    write_speech_tokenizer(folder / "speech_tokenizer_v1.onnx", random, token_rate=50, speech_tokens=4096)
    paths = (folder / "campplus.onnx", folder / "speech_tokenizer_v1.onnx", folder / "spk2info.pt")
    return CosyVoiceFrontEnd(WHISPER, MEL, *paths, **options)


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> CosyVoiceFrontEnd:
    folder = tmp_path_factory.mktemp("model")
    voices = {"anna": torch.arange(192.0)[None], "nan": torch.full((1, 192), torch.nan)}
    torch.save({name: {"embedding": vector} for name, vector in voices.items()}, folder / "spk2info.pt")
    return make_frontend(folder)


def test_zero_shot_inputs(frontend: CosyVoiceFrontEnd, prompt: Path) -> None:
    inputs = frontend.frontend_zero_shot("Hello world.", "A glide.", prompt, RATE_HZ, "")
    frames, tokens = int(SECONDS * RATE_HZ) // 256, round(SECONDS * 50)
    assert inputs["text"].tolist() == [frontend.encode("Hello world.")]
    assert inputs["prompt_text"].tolist() == [frontend.encode("A glide.")]
    assert inputs["prompt_speech_feat"].shape == (1, frames, 80)
    assert inputs["flow_prompt_speech_token"].shape == (1, tokens)
    assert inputs["llm_embedding"].shape == inputs["flow_embedding"].shape == (1, 192)
    for name in [name for name in inputs if name.endswith("_len")]:
        assert inputs[name].dtype == torch.int32
        assert inputs[name].tolist() == [inputs[name.removesuffix("_len")].shape[1]]


def test_prompt_mel_is_computed_at_the_models_own_rate(frontend: CosyVoiceFrontEnd, prompt: Path) -> None:
    """At 24 kHz, as upstream has it, the mel would be 9 % longer and its spectra shifted."""
    feat, _ = frontend._extract_speech_feat(prompt)
    assert torch.equal(feat, MEL(load_wav(prompt, RATE_HZ)).transpose(1, 2))


def test_a_prompt_may_be_a_path_a_stream_or_a_tensor(frontend: CosyVoiceFrontEnd, prompt: Path) -> None:
    expected = frontend.frontend_zero_shot("Hi.", "A glide.", str(prompt))
    stream = frontend.frontend_zero_shot("Hi.", "A glide.", io.BytesIO(prompt.read_bytes()))
    tensor = frontend.frontend_zero_shot("Hi.", "A glide.", load_wav(prompt, 16000))
    assert all(torch.equal(expected[name], stream[name]) for name in expected)
    tensor_feat = tensor.pop("prompt_speech_feat")
    assert all(torch.equal(tensor[name], expected[name]) for name in tensor)
    # 16 kHz hold less treble than the file: the top mel bins differ
    assert (tensor_feat - expected["prompt_speech_feat"])[..., :70].abs().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_integers_are_pcm(dtype: torch.dtype) -> None:
    whole_numbers = (NOISE.double() * (torch.iinfo(dtype).max + 1)).round().to(dtype)
    torch.testing.assert_close(load_prompt(whole_numbers, 16000), NOISE, rtol=0, atol=2**-15)


def test_cross_lingual_hides_the_prompt_from_the_language_model(
    frontend: CosyVoiceFrontEnd, prompt: Path
) -> None:
    inputs = frontend.frontend_cross_lingual("Hi.", prompt, RATE_HZ, "")
    zero_shot = frontend.frontend_zero_shot("Hi.", "", prompt, RATE_HZ, "")
    hidden = {"prompt_text", "prompt_text_len", "llm_prompt_speech_token", "llm_prompt_speech_token_len"}
    assert zero_shot.keys() - inputs.keys() == hidden
    assert "llm_embedding" in inputs


def test_instruct_speaks_without_a_speaker_vector_in_the_language_model(frontend: CosyVoiceFrontEnd) -> None:
    inputs = frontend.frontend_instruct("Hi.", "anna", "Whisper.")
    assert "llm_embedding" not in inputs
    assert inputs["prompt_text"].tolist() == [frontend.encode("Whisper.<endofprompt>")]
    marked = frontend.frontend_instruct("Hi.", "anna", "Whisper.<|endofprompt|>")
    assert marked["prompt_text"].tolist() == [frontend.encode("Whisper.<|endofprompt|>")]


def test_voice_conversion_inputs(frontend: CosyVoiceFrontEnd, prompt: Path) -> None:
    source = torch.from_numpy(glide(2.0, 16000))[None]
    inputs = frontend.frontend_vc(source, prompt, RATE_HZ)
    assert inputs["source_speech_token"].shape == (1, 100)
    assert "flow_embedding" in inputs and "text" not in inputs and "llm_embedding" not in inputs


def test_a_stored_prompt_equals_the_prompt(frontend: CosyVoiceFrontEnd, prompt: Path) -> None:
    frontend.spk2info["glide"] = frontend.prompt_inputs("A glide.", prompt)
    stored = frontend.frontend_zero_shot("Hi.", "", "unused.wav", RATE_HZ, "glide")
    fresh = frontend.frontend_zero_shot("Hi.", "A glide.", prompt)
    assert stored.keys() == fresh.keys()
    assert all(torch.equal(stored[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda frontend, prompt: frontend.frontend_sft("Hi.", "bob"), "'bob'.*anna"),
        (lambda frontend, prompt: frontend.frontend_sft("", "anna"), "nothing to speak"),
        (lambda frontend, prompt: frontend.frontend_sft("?! ...", "anna"), "nothing to speak"),
        (lambda frontend, prompt: frontend.frontend_sft("Hi.", "nan"), "'nan' has values that are not numbers"),
        (lambda frontend, prompt: frontend.text_normalize("caf\udce9"), "not valid Unicode .*UTF-8"),
        (lambda frontend, prompt: frontend.text_normalize("caf\udce9", text_frontend=False), "not valid Unicode"),
        (lambda frontend, prompt: frontend.frontend_vc(torch.zeros(1, 31 * 16000), prompt), "31.00 s"),
        (lambda frontend, prompt: frontend.frontend_vc(torch.zeros(2, 16000), prompt), r"\(2, 16000\)"),
        (lambda frontend, prompt: frontend.frontend_vc(torch.zeros(1, 10), prompt), "0.00 s"),
        (lambda frontend, prompt: frontend.frontend_vc("absent.wav", prompt), "absent.wav"),
        (lambda frontend, prompt: frontend.frontend_vc([0.0] * 16000, prompt), "not list"),
        (lambda frontend, prompt: frontend.frontend_vc(prompt, None), "not NoneType"),
        (lambda frontend, prompt: frontend.frontend_vc(torch.zeros(1, 16000), prompt), "the audio is silent"),
        (lambda frontend, prompt: frontend.frontend_vc(torch.ones(1, 16000), prompt), "the audio is silent"),
        (lambda frontend, prompt: frontend.frontend_vc(NOISE / 0, prompt), "not numbers"),
        (lambda frontend, prompt: frontend.frontend_vc(NOISE > 0, prompt), "not torch.bool"),
        (lambda frontend, prompt: frontend.text_normalize(None), "a text must be a str, not NoneType"),
        (lambda frontend, prompt: frontend.text_normalize(["Hi."], text_frontend=False), "not list"),
        (lambda frontend, prompt: frontend.frontend_sft("Hi.", ["anna"]), "no stored voice"),
    ],
)
def test_mistakes_are_named(frontend: CosyVoiceFrontEnd, prompt: Path, call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(frontend, prompt)


def test_networks_are_opened_only_when_used(tmp_path: Path, prompt: Path) -> None:
    frontend = CosyVoiceFrontEnd(WHISPER, MEL, tmp_path / "campplus.onnx", tmp_path / "tokenizer.onnx")
    frontend.spk2info["anna"] = {"embedding": torch.zeros(1, 192)}
    frontend.frontend_sft("Hi.", "anna")
    with pytest.raises(InputError, match="tokenizer.onnx does not exist"):
        frontend.frontend_vc(prompt, prompt)


def test_a_damaged_network_is_named(tmp_path: Path, prompt: Path) -> None:
    (tmp_path / "tokenizer.onnx").write_bytes(b"not a network")
    frontend = CosyVoiceFrontEnd(WHISPER, MEL, tmp_path / "campplus.onnx", tmp_path / "tokenizer.onnx")
    with pytest.raises(InputError, match="tokenizer.onnx is not an ONNX model"):
        frontend.frontend_vc(prompt, prompt)


class Attack:
    def __reduce__(self) -> tuple:
        return print, ("code was run",)


def test_stored_voices_with_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"anna": {"embedding": Attack()}}, tmp_path / "spk2info.pt")
    with pytest.raises(InputError, match="spk2info.pt"):
        read_spk2info(tmp_path / "spk2info.pt")
    assert "code was run" not in capsys.readouterr().out
    assert read_spk2info(tmp_path / "absent.pt") == {}


@pytest.mark.parametrize(
    "text,spoken",
    [
        ("今天是2024年3月5日。", ["今天是二零二四年三月五日。"]),
        ("It costs $4.50", ["It costs four dollars and fifty cents."]),
        ("on 3/5/2024", ["on the fifth of march twenty twenty four."]),
        ('He said "stop." 3 times.', ['He said "stop." three times.']),
        ("9", ["nine."]),
        ("x² m", ["x squared m."]),
        ("   ", []),
        ("，，，", []),
    ],
)
def test_wetext(frontend: CosyVoiceFrontEnd, text: str, spoken: list[str]) -> None:
    pytest.importorskip("wetext")
    assert frontend.text_normalize(text) == spoken


def test_where_wetext_fails_the_plain_rules_serve(frontend: CosyVoiceFrontEnd, tmp_path: Path) -> None:
    plain = make_frontend(tmp_path, normalizer=None)
    for text in ("!!! ...", "7 !!! ..."):
        assert frontend.text_normalize(text) == plain.text_normalize(text)
    with pytest.raises(InputError, match="'ttsfrd'"):
        make_frontend(tmp_path, normalizer="ttsfrd")


@pytest.mark.parametrize("lost", ["", "."])
def test_what_wetext_loses_stays_as_it_was(frontend: CosyVoiceFrontEnd, monkeypatch, lost: str) -> None:
    monkeypatch.setattr(frontend.normalizer, "_grammar", SimpleNamespace(normalize=lambda text, lang: lost))
    assert frontend.text_normalize("Said.") == ["Said."]


def test_threads_take_turns_to_spell_numbers() -> None:
    """inflect remembers the place of a number in an attribute, which another thread would overwrite."""

    class Speller:
        at_work = 0

        def number_to_words(self, digits: str) -> str:
            self.at_work += 1
            time.sleep(0.01)
            self.at_work -= 1
            return f"{digits}{self.at_work}"

    normalizer = TextNormalizer(get_byte_tokenizer().encode, None)
    normalizer._inflect = Speller()
    with ThreadPoolExecutor(4) as requests:
        assert set(requests.map(normalizer.normalize, ["7"] * 8)) == {"70"}


def test_a_number_without_a_name_is_read_by_its_digits() -> None:
    normalizer = TextNormalizer(get_byte_tokenizer().encode, None)
    assert normalizer.normalize("１" * 37) == " ".join(["one"] * 37)
    assert "decillion" in normalizer.normalize("1" * 36)


def test_a_sentence_without_stops_is_cut(frontend: CosyVoiceFrontEnd) -> None:
    text = "and so on, with another few words " * 60
    pieces = frontend.text_normalize(text)
    assert "".join(pieces).rstrip(".") == text.strip()
    assert max(len(frontend.encode(piece)) for piece in pieces) < 80 + 20  # a rest of less than 20 joins the last
    assert all(piece.endswith((",", ".")) for piece in pieces)


@pytest.mark.parametrize("text", ["aaaa, bbbb, cccc, dddd", "aaaa bbbb cccc dddd", "aaaabbbbccccdddd"])
def test_break_long_loses_nothing(text: str) -> None:
    pieces = break_long(text, len, 12)
    assert "".join(pieces) == text
    assert len(pieces) == 2 and max(map(len, pieces)) <= 12


@pytest.mark.parametrize(("end", "pieces"), [(" go.", 2), ("!", 2), (" " + "a" * 30, 3)])
def test_what_is_left_of_a_broken_sentence_is_not_spoken_alone(end: str, pieces: int) -> None:
    text = " ".join(["a" * 49] * 4) + end  # 199 bytes and what is left
    found = TextNormalizer(get_byte_tokenizer().encode, None, TextSplit(100, 80, 20, 130)).split(text + ".")
    assert "".join(found) == text.removesuffix(".").removesuffix("!") + (end[-1] if end[-1] in ".!" else ".")
    assert len(found) == pieces and max(map(len, found)) <= 120


def test_a_sentence_is_broken_at_full_width_stops_before_its_commas() -> None:
    assert break_long("ああ、いい。うう、ええ", len, 8) == ["ああ、いい。", "うう、ええ"]


def test_a_sentence_is_broken_at_its_commas_first() -> None:
    pieces = break_long("aaaa, bbbb cccc dddd eeee, ffff, gggg", len, 12)
    assert pieces == ["aaaa, bbbb ", "cccc dddd ", "eeee, ffff,", " gggg"]


def test_tokenizers_that_are_not_here_are_refused() -> None:
    for options in (
        {"multilingual": False},
        {"num_languages": 107},
        {"task": "tts"},
        {"language": "klingon"},
    ):
        with pytest.raises(InputError):
            get_tokenizer(**{"multilingual": True, "num_languages": 100, **options})


def test_bytes_have_the_ids_of_whispers_single_bytes() -> None:
    """Of all 256, at the places where whisper's own vocabulary has them."""
    encoding = whisper.tokenizer.get_tokenizer(multilingual=True, num_languages=100).encoding
    in_order = b"".join(encoding.decode_single_token_bytes(number) for number in range(256))
    assert sorted(in_order) == list(range(256))
    tokenizer = get_byte_tokenizer()
    for text in ("Hello, world!", "Grüße", "你好", "\n\t\x00\x7f\xad", "<|en|>", ""):
        ids = tokenizer.encode(text, allowed_special="all")
        assert bytes(in_order[number] for number in ids) == text.encode()
        assert tokenizer.decode(ids) == encoding.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("ü")[:1]) == "\ufffd"


def test_bytes_may_be_lower_case() -> None:
    tokenizer = get_byte_tokenizer(lowercase=True)
    assert tokenizer.decode(tokenizer.encode("Hello ÄÖÜ")) == "hello äöü"


def test_byte_tokenizers_need_no_whisper() -> None:
    use = "from cosyvoice.tokenizer.tokenizer import get_byte_tokenizer; get_byte_tokenizer().encode('a')"
    code = f"import sys; {use}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"whisper", "tiktoken", "torch"} & set(loaded.split())


def test_pieces_are_as_long_as_the_model_wants_them(tmp_path: Path) -> None:
    sentences = [f"Sentence number {number} tells nothing new." for number in ("one", "two", "three", "four") * 3]
    text = " ".join(sentences)
    split = {"max_tokens": 200, "min_tokens": 150, "merge_tokens": 50, "sentence_tokens": 300}
    byte_frontend = CosyVoiceFrontEnd(get_byte_tokenizer, MEL, "", "", normalizer=None, text_split=split)
    pieces = byte_frontend.text_normalize(text)
    assert "".join(pieces) == text
    assert all(150 < len(piece) <= 200 for piece in pieces[:-1]) and len(pieces[-1]) >= 50
    upstream = CosyVoiceFrontEnd(get_byte_tokenizer, MEL, "", "", normalizer=None)
    assert len(upstream.text_normalize(text)) > len(pieces)


def test_a_sentence_longer_than_the_model_knows_is_broken() -> None:
    text = "and so on, " * 29 + "and so on."  # 329 bytes
    for sentence_tokens, most in ((330, 329), (328, 100)):
        normalizer = TextNormalizer(get_byte_tokenizer().encode, None, TextSplit(100, 80, 20, sentence_tokens))
        pieces = normalizer.split(text)
        assert "".join(pieces) == text and max(map(len, pieces)) <= most


@pytest.mark.parametrize(
    "split",
    [{"max": 80}, {"max_tokens": 50}, {"merge_tokens": -1}, {"min_tokens": "60"}, {"sentence_tokens": 70}, [80]],
)
def test_impossible_splits_are_refused(split: object) -> None:
    with pytest.raises(InputError, match="text_split"):
        CosyVoiceFrontEnd(get_byte_tokenizer, MEL, "", "", text_split=split)


def test_two_mel_settings_with_the_same_fmax_do_not_collide() -> None:
    """Upstream keys its filters by fmax alone."""
    noise = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    wide, narrow = MEL(noise), MEL(noise, n_fft=512, win_size=512, num_mels=40)
    assert wide.shape == (1, 80, 31) and narrow.shape == (1, 40, 31)
    assert torch.equal(MEL(noise), wide)


def test_mel_filters_are_triangles_of_equal_area() -> None:
    filters = mel_filters(16000, 4096, 40)
    bin_hz = 16000 / 4096
    torch.testing.assert_close(filters.sum(dim=1) * bin_hz, torch.ones(40), atol=0.02, rtol=0)
    peaks = filters.argmax(dim=1) * bin_hz
    assert (peaks.diff() > 0).all()
    below_1khz = peaks[peaks < 900]
    assert (below_1khz.diff() - below_1khz.diff().mean()).abs().max() < 2 * bin_hz  # linear there


def test_a_tone_lands_in_its_mel_bin() -> None:
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(22050) / 22050)[None]
    loudest = MEL(tone)[0].mean(dim=1).argmax().item()
    assert loudest == mel_filters(22050, 1024, 80, 0, 8000)[:, round(1000 / 22050 * 1024)].argmax().item()


def test_channels_are_averaged_and_any_rate_read(tmp_path: Path) -> None:
    left, right = glide(rate=8000), 0.25 * glide(rate=8000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 8000, subtype="FLOAT")
    wav, rate = read_wav(tmp_path / "stereo.wav")
    assert rate == 8000
    np.testing.assert_allclose(wav[0], (left + right) / 2, atol=1e-7)
    assert load_wav(tmp_path / "stereo.wav", 16000, min_sr=0).shape == (1, 2 * len(left))
    with pytest.raises(InputError, match="8000 Hz"):
        load_wav(tmp_path / "stereo.wav", 16000)


def test_channels_that_are_silent_or_cancel_each_other_take_nothing_away(tmp_path: Path) -> None:
    left, silence = glide(rate=16000), np.zeros_like(glide(rate=16000))
    for name, channels in {
        "cancelling": [left, -left],
        "one-sided": [silence, left, silence],
        "loudest": [0.4 * left, -left, 0.6 * left],
    }.items():
        soundfile.write(tmp_path / f"{name}.wav", np.stack(channels, axis=1), 16000, subtype="FLOAT")
        wav, _ = read_wav(tmp_path / f"{name}.wav")
        np.testing.assert_allclose(wav[0].abs(), np.abs(left), atol=1e-6, err_msg=name)


def wav_bytes(seconds: float = 1.0, extra: bytes = b"") -> bytearray:
    """A wav of 16 bits at 16 kHz; `extra`, of even length, lies in a part before its samples."""
    file = io.BytesIO()
    soundfile.write(file, glide(rate=16000)[: int(16000 * seconds)], 16000, format="WAV", subtype="PCM_16")
    content = bytearray(file.getvalue())
    place = content.index(b"data")
    content[place:place] = b"junk" + struct.pack("<I", len(extra)) + extra if extra else b""
    content[4:8] = struct.pack("<I", len(content) - 8)
    return content


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("extra", [b"", b"data" + b"\xff" * 20])
def test_a_wav_whose_size_was_left_open_is_read_to_its_end(tmp_path: Path, size: int, extra: bytes) -> None:
    content = wav_bytes(extra=extra)
    whole, _ = read_wav(io.BytesIO(content))
    content[-2 * whole.shape[1] - 4 : -2 * whole.shape[1]] = struct.pack("<I", size)
    (tmp_path / "open.wav").write_bytes(content)
    for source in (tmp_path / "open.wav", str(tmp_path / "open.wav"), io.BytesIO(content)):
        assert torch.equal(read_wav(source)[0], whole)


def test_a_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    whole = wav_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut.wav is cut off: it claims \d+ bytes and has \d+. Copy it again"):
        read_wav(tmp_path / "cut.wav")
    soundfile.write(tmp_path / "whole.mp3", glide(rate=16000), 16000, format="MP3")
    mp3 = (tmp_path / "whole.mp3").read_bytes()
    read_wav(tmp_path / "whole.mp3")
    (tmp_path / "cut.mp3").write_bytes(mp3[: 2 * len(mp3) // 3])
    with pytest.raises(InputError, match=r"cut.mp3 is cut off: it claims [\d.]+ s and has [\d.]+"):
        read_wav(tmp_path / "cut.mp3")


@pytest.mark.parametrize(
    ("offset", "kind", "value", "message"),
    [
        (24, "<I", 100_000_007, "100000007 samples a second; 4000 to 384000 are possible"),
        (24, "<I", 20, "20 samples a second"),
        (22, "<H", 200, "200 channels; at most 64"),
    ],
)
def test_an_impossible_header_is_refused_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch, offset: int, kind: str, value: int, message: str
) -> None:
    content = wav_bytes()
    struct.pack_into(kind, content, offset, value)
    struct.pack_into("<H", content, 32, 2 * content[22])  # bytes of a frame
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(InputError, match=message):
        read_wav(io.BytesIO(content))


def test_a_recording_that_is_too_long_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    read_wav(io.BytesIO(wav_bytes()), max_seconds=1)
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(InputError, match=r"stream lasts 1.000 s; it may last at most 0.9 s"):
        read_wav(io.BytesIO(wav_bytes()), max_seconds=0.9)


@pytest.mark.parametrize("content", [b"", b"no audio at all"])
def test_undecodable_audio_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.wav").write_bytes(content)
    with pytest.raises(InputError, match="bad.wav"):
        read_wav(tmp_path / "bad.wav")


def test_whisper_features_span_80_db_and_fbank_has_no_mean() -> None:
    wav = torch.from_numpy(glide(rate=16000))[None]
    features = whisper_log_mel(wav)
    assert features.shape == (1, 128, int(SECONDS * 100))
    assert (features.max() - features.min()).item() == pytest.approx(2.0)  # 8 decades, divided by 4
    assert kaldi_fbank(wav).mean(dim=0).abs().max() < 1e-4


def test_speaking_with_a_stored_voice_imports_no_prompt_libraries() -> None:
    code = "import sys, cosyvoice.cli.frontend; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    slow = {"whisper", "torchaudio", "onnxruntime", "inflect", "wetext", "librosa"}
    assert "cosyvoice.utils.audio" in loaded.split() and not slow & set(loaded.split())


@pytest.mark.parametrize(("rate", "target_rate"), [(44056, 22050), (11127, 16000), (48000, 22050)])
def test_resampling_keeps_a_tone_at_any_rate(rate: int, target_rate: int) -> None:
    """Odd rates too, which share no large factor with the target."""

    def tone(at: int) -> torch.Tensor:
        return torch.sin(2 * math.pi * 440 * torch.arange(at) / at)  # one second

    heard = resample(tone(rate)[None], rate, target_rate)[0]
    assert heard.shape == (target_rate,)
    away_from_the_ends = slice(target_rate // 10, -target_rate // 10)
    assert (heard - tone(target_rate))[away_from_the_ends].abs().max() < 5e-3


def test_threads_may_meet_torchaudio_first() -> None:
    """Its modules import each other; begun by several threads at once, they broke in about one run of four."""
    program = """
import threading, torch
from cosyvoice.utils.audio import kaldi_fbank, resample
together = threading.Barrier(4)
speech = torch.zeros(1, 9000)
def work(use):
    together.wait()
    use()
calls = [lambda: resample(speech, 8000, 16000), lambda: kaldi_fbank(speech)] * 2
threads = [threading.Thread(target=work, args=(call,)) for call in calls]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
