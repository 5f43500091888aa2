"""Turns text and prompt recordings into the model's input tensors."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from cosyvoice.cli.text_normalizer import TextNormalizer, TextSplit
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import load_tensors
from cosyvoice.runtime.errors import InputError
from cosyvoice.speech_encoders.encoders import SpeakerEncoder, SpeechTokenizer, check_prompt
from cosyvoice.utils.audio import PROMPT_RATE_HZ, load_wav, resample
from cosyvoice.utils.frames import Rates
from cosyvoice.utils.frontend_utils import has_words, nothing_to_speak
from cosyvoice.utils.rates_300m import TOKEN_RATE_HZ, rates_at

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Prompt = str | Path | BinaryIO | Tensor  # a recording, or (1, samples) at 16 kHz
FRONTEND_PARTS = ("get_tokenizer", "feat_extractor", "allowed_special")  # entries of a YAML that it needs
PCM_PEAKS = {torch.int16: 2**15, torch.int32: 2**31}
# The tensors of a stored voice by name: the shape, with None for any size, and whether it is floating point.
STORED_INPUTS = {
    **dict.fromkeys(("embedding", "llm_embedding", "flow_embedding"), ((1, None), True)),
    "prompt_speech_feat": ((1, None, None), True),
    **dict.fromkeys(("prompt_text", "llm_prompt_speech_token", "flow_prompt_speech_token"), ((1, None), False)),
}
COSYVOICE_300M_RATES = rates_at(TOKEN_RATE_HZ)
END_OF_INSTRUCTION = "<endofprompt>"  # as CosyVoice-300M-Instruct was trained; plain text to the tokenizer


class CosyVoiceFrontEnd:
    """A front end that makes model inputs: CPU tensors by name, batch size 1, int32 lengths of shape (1,).

    This class serves CosyVoice-300M; subclasses override what other generations do differently.

    get_tokenizer and feat_extractor are the YAML's functions; campplus_model and speech_tokenizer_model are ONNX
    files, opened at first use; spk2info is a file of stored voices that may be absent. normalizer is "wetext" or None,
    see TextNormalizer; text_split has arguments of TextSplit. Prompt mels are computed at the model's sample rate,
    which comes from `rates`. device, "auto", "cpu" or "cuda", is where the ONNX networks run.
    """

    def __init__(
        self,
        get_tokenizer: Callable[[], Any],
        feat_extractor: Callable[[Tensor], Tensor],
        campplus_model: Path | str,
        speech_tokenizer_model: Path | str,
        spk2info: Path | str = "",
        allowed_special: str | set[str] = "all",
        *,
        rates: Rates = COSYVOICE_300M_RATES,
        normalizer: str | None = "wetext",
        device: str = "auto",
        text_split: Mapping[str, int] | None = None,
    ) -> None:
        self._get_tokenizer = get_tokenizer
        self.feat_extractor = feat_extractor
        self.speaker_encoder = SpeakerEncoder(campplus_model, device)
        self.speech_tokenizer = SpeechTokenizer(speech_tokenizer_model, device, rates.token_rate)
        self.spk2info = read_spk2info(Path(spk2info)) if spk2info else {}
        self.allowed_special = allowed_special
        self.rates = rates
        self.normalizer = TextNormalizer(self.encode, normalizer, TextSplit.of(text_split or {}))

    @cached_property
    def tokenizer(self) -> Any:
        return self._get_tokenizer()

    @property
    def sample_rate(self) -> int:
        return self.rates.sample_rate

    @property
    def device(self) -> torch.device:
        """Return where the front end's tensors are. The model moves them to its own device."""
        return torch.device("cpu")

    @property
    def campplus_session(self) -> "InferenceSession":
        return self.speaker_encoder.open()

    @property
    def speech_tokenizer_session(self) -> "InferenceSession":
        return self.speech_tokenizer.open()

    def encode(self, text: str) -> list[int]:
        """Return text token ids."""
        return self.tokenizer.encode(text, allowed_special=self.allowed_special)

    def unknown_letters(self, text: str) -> list[str]:
        """Return the letters of the text that the tokenizer knows to be missing from the model's training."""
        known_by_tokenizer = getattr(self.tokenizer, "unknown_letters", None)
        return known_by_tokenizer(text) if known_by_tokenizer else []

    def text_normalize(
        self, text: str | Iterator[str], split: bool = True, text_frontend: bool = True
    ) -> list[str] | list[Iterator[str]] | str:
        """Return the text in words, whole or (split) in pieces of the lengths in text_split.

        Text with special tokens (`<|...|>`), or with text_frontend off, stays as it is, in one piece. An iterator of
        texts, which is still being written, is returned in a list without being read. The list is empty if there is
        only punctuation. Raises InputError for anything that is not a text, or not valid Unicode.
        """
        if isinstance(text, Iterator):
            return [text]
        if not isinstance(text, str):
            raise InputError(f"a text must be a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a byte of another encoding, as Python passes it on from a command line
            raise InputError(f"the text is not valid Unicode ({error.reason}); give it in UTF-8") from None
        if not text_frontend or not text or ("<|" in text and "|>" in text):
            return [text] if split else text
        text = self.normalizer.normalize(text)
        return self.normalizer.split(text) if split else text

    def frontend_sft(self, tts_text: str | Iterator[str], spk_id: str) -> dict[str, Tensor]:
        """Return the inputs for a stored voice. Raises InputError if it is unknown or the text is empty."""
        embedding = self._stored_voice(spk_id).get("embedding")
        if embedding is None:
            raise InputError(f"the voice {spk_id!r} is stored with its prompt; name it as zero_shot_spk_id")
        return {**self._text_inputs(tts_text), "llm_embedding": embedding, "flow_embedding": embedding}

    def frontend_zero_shot(
        self,
        tts_text: str | Iterator[str],
        prompt_text: str,
        prompt_wav: Prompt,
        resample_rate: int | None = None,
        zero_shot_spk_id: str = "",
    ) -> dict[str, Tensor]:
        """Return the inputs for a voice and its manner, given by a recording and its text, or by zero_shot_spk_id.

        resample_rate overrides the rate of the prompt mel, in Hz.
        """
        text = self._text_inputs(tts_text)
        if zero_shot_spk_id:
            voice = self._stored_voice(zero_shot_spk_id)
            if "flow_embedding" not in voice:
                raise InputError(f"the voice {zero_shot_spk_id!r} is stored without a prompt; use inference_sft")
            return {**voice, **text}
        return {**self.prompt_inputs(prompt_text, prompt_wav, resample_rate), **text}

    def frontend_cross_lingual(
        self,
        tts_text: str | Iterator[str],
        prompt_wav: Prompt,
        resample_rate: int | None = None,
        zero_shot_spk_id: str = "",
    ) -> dict[str, Tensor]:
        """Return zero-shot inputs without the language model's prompt, so that the languages may differ."""
        inputs = self.frontend_zero_shot(tts_text, "", prompt_wav, resample_rate, zero_shot_spk_id)
        llm_prompt = ("prompt_text", "llm_prompt_speech_token")
        return {name: value for name, value in inputs.items() if not name.startswith(llm_prompt)}

    def frontend_instruct(self, tts_text: str, spk_id: str, instruct_text: str) -> dict[str, Tensor]:
        """Return the inputs for a stored voice that follows an instruction, without the LLM's speaker vector."""
        inputs = self.frontend_sft(tts_text, spk_id)
        del inputs["llm_embedding"]  # it would outweigh the instruction
        if "endofprompt" not in instruct_text:
            instruct_text += END_OF_INSTRUCTION
        inputs["prompt_text"], inputs["prompt_text_len"] = self._extract_text_token(instruct_text)
        return inputs

    def frontend_vc(
        self, source_speech_16k: Prompt, prompt_wav: Prompt, resample_rate: int | None = None
    ) -> dict[str, Tensor]:
        """Return the inputs to speak one recording's content in the voice of another."""
        tokens, token_len = self._extract_speech_token(source_speech_16k)
        return {"source_speech_token": tokens, "source_speech_token_len": token_len} | self._flow_prompt(
            prompt_wav, resample_rate
        )

    def prompt_inputs(
        self, prompt_text: str, prompt_wav: Prompt, resample_rate: int | None = None
    ) -> dict[str, Tensor]:
        """Return all zero-shot inputs except the text to speak. They are stored for a voice with its prompt."""
        inputs = self._flow_prompt(prompt_wav, resample_rate)
        text, text_len = self._extract_text_token(prompt_text)
        return inputs | {
            "prompt_text": text,
            "prompt_text_len": text_len,
            "llm_prompt_speech_token": inputs["flow_prompt_speech_token"],
            "llm_prompt_speech_token_len": inputs["flow_prompt_speech_token_len"],
            "llm_embedding": inputs["flow_embedding"],
        }

    def _flow_prompt(self, prompt_wav: Prompt, resample_rate: int | None) -> dict[str, Tensor]:
        tokens, token_len = self._extract_speech_token(prompt_wav)
        feat, feat_len = self._extract_speech_feat(prompt_wav, resample_rate)
        return {
            "flow_prompt_speech_token": tokens,
            "flow_prompt_speech_token_len": token_len,
            "prompt_speech_feat": feat,
            "prompt_speech_feat_len": feat_len,
            "flow_embedding": self._extract_spk_embedding(prompt_wav),
        }

    def _text_inputs(self, tts_text: str | Iterator[str]) -> dict[str, Any]:
        if isinstance(tts_text, str) and not has_words(tts_text):
            raise InputError(nothing_to_speak(tts_text))
        text, text_len = self._extract_text_token(tts_text)
        return {"text": text, "text_len": text_len}

    def _extract_text_token(self, text: str | Iterator[str]) -> tuple[Tensor | Iterator[Tensor], Tensor]:
        """Return token ids int32 (1, N) and their number (1,).

        For a text that is still being written, return an iterator over its ids (1, 1), and 0.
        """
        if isinstance(text, Iterator):
            ids = (number for piece in text for number in self.encode(piece))
            return (torch.tensor([[number]], dtype=torch.int32) for number in ids), torch.zeros(1, dtype=torch.int32)
        return with_length(torch.tensor([self.encode(text)], dtype=torch.int32))

    def _extract_speech_token(self, prompt_wav: Prompt) -> tuple[Tensor, Tensor]:
        """Return speech tokens int32 (1, N), and their number (1,)."""
        return with_length(self.speech_tokenizer(load_prompt(prompt_wav, PROMPT_RATE_HZ)))

    def _extract_spk_embedding(self, prompt_wav: Prompt) -> Tensor:
        """Return the speaker vector float32 (1, 192)."""
        return self.speaker_encoder(load_prompt(prompt_wav, PROMPT_RATE_HZ))

    def _extract_speech_feat(self, prompt_wav: Prompt, resample_rate: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the log-mel (1, T, 80) at the model's sample rate, and its number of frames (1,)."""
        wav = load_prompt(prompt_wav, resample_rate or self.sample_rate)
        return with_length(self.feat_extractor(wav).transpose(1, 2))  # (1, 80, T) -> (1, T, 80)

    def _stored_voice(self, spk_id: str) -> dict[str, Tensor]:
        if not isinstance(spk_id, str) or spk_id not in self.spk2info:
            known = ", ".join(self.spk2info) or "none, since this model folder has no spk2info.pt"
            raise InputError(f"there is no stored voice {spk_id!r}; known voices: {known}")
        voice = self.spk2info[spk_id]
        if not all(value.isfinite().all() for value in voice.values() if isinstance(value, Tensor)):
            raise InputError(f"the stored voice {spk_id!r} has values that are not numbers; make it again")
        return voice


def load_prompt(prompt_wav: Prompt, rate: int) -> Tensor:
    """Return a prompt as mono float32 (1, samples) at rate Hz. A tensor is at 16 kHz; integers are PCM."""
    if isinstance(prompt_wav, Tensor):
        if prompt_wav.dtype in PCM_PEAKS:
            prompt_wav = prompt_wav / PCM_PEAKS[prompt_wav.dtype]
        if not prompt_wav.is_floating_point():
            raise InputError(f"a prompt tensor must be floating point, int16 or int32, not {prompt_wav.dtype}")
        wav = prompt_wav.float()
        check_prompt(wav)
        return resample(wav, PROMPT_RATE_HZ, rate)
    if not isinstance(prompt_wav, str | Path):
        if not hasattr(prompt_wav, "seek"):
            kind = type(prompt_wav).__name__
            raise InputError(f"a prompt must be a path, an open file or a tensor (1, samples) at 16 kHz, not {kind}")
        prompt_wav.seek(0)  # every feature reads the stream again
    return load_wav(prompt_wav, rate)


def open_front_end(
    folder: ModelFolder, parts: Mapping[str, Any], device: str, kind: type[CosyVoiceFrontEnd] = CosyVoiceFrontEnd
) -> CosyVoiceFrontEnd:
    """Return the front end of a model folder. parts: FRONTEND_PARTS of its YAML, and text_split if it has one.

    kind: the class of the front end; all classes treat text without prompts alike.
    """
    return kind(
        parts["get_tokenizer"],
        parts["feat_extractor"],
        folder.speaker_encoder,
        folder.speech_tokenizer,
        folder.stored_speakers,
        parts["allowed_special"],
        rates=folder.rates,
        device=device,
        text_split=parts.get("text_split"),
    )


def read_spk2info(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return stored voices by name, on the CPU; none if the file is absent.

    Raises InputError if the file is damaged, contains code, or is not a dict of voices.
    """
    if not path.is_file():
        return {}
    voices = load_tensors(path, "delete it or copy it again")
    if not isinstance(voices, dict) or not all(isinstance(voice, dict) for voice in voices.values()):
        raise InputError(f"{path} has no voices by name; give the spk2info.pt of a model or of a merge")
    for name, voice in voices.items():
        if not isinstance(name, str) or not all(_is_input(key, value) for key, value in voice.items()):
            raise InputError(f"{path}: the voice {name!r} is damaged; give the spk2info.pt of a model or of a merge")
    return voices


def _is_input(name: str, value: Any) -> bool:
    """Return whether a stored value has the type of `prompt_inputs`. Under other names it may be anything."""
    if name not in STORED_INPUTS:
        return True
    dims, is_float = STORED_INPUTS[name]
    return (
        isinstance(value, Tensor)
        and value.dim() == len(dims)
        and all(wanted in (None, size) for wanted, size in zip(dims, value.shape, strict=True))
        and (value.is_floating_point() if is_float else value.dtype in (torch.int32, torch.int64))
    )


def with_length(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Return (1, N, ...) and N as int32 (1,)."""
    return sequence, torch.tensor([sequence.shape[1]], dtype=torch.int32)
