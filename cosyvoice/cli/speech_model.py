"""What the models of both generations do alike: load weights, write tokens, and turn mel into sound piece by piece."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.cli.prefetch import prefetch
from cosyvoice.flow.token_flow import TokenFlow
from cosyvoice.hifigan.generator import HiFTGenerator
from cosyvoice.llm.speech_token_lm import SpeechTokenLM
from cosyvoice.model_folder.weights import TRAINING_COUNTERS, current_name, load_strict, read_state_dict
from cosyvoice.runtime.device import fastest_device
from cosyvoice.runtime.draws import Draws
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.precision import check_precision
from cosyvoice.utils.common import fade_in_out
from cosyvoice.utils.frames import MEL_BINS

MOST_FFT_PLANS = 16  # kept on a GPU
MIN_SPEED, MAX_SPEED = 0.5, 2.0
# By part: what gives it its fastest form for speaking, at a precision.
PREPARE: dict[str, Callable[[Any, str], None]] = {
    "llm": lambda llm, precision: llm.prepare_decoding(precision),
    "flow": lambda flow, precision: flow.prepare_inference(precision),
    "hift": lambda hift, precision: hift.remove_weight_norm(),
}
MODEL_PARTS = tuple(PREPARE)

# A file, tensors by name, or a part that has its weights and is used as it is: it may be in training.
Weights = Path | str | Mapping[str, Tensor] | nn.Module

NO_TOKENS = torch.zeros(1, 0, dtype=torch.int32)
NO_MEL = torch.zeros(1, 0, MEL_BINS)
NO_SPEAKER = torch.zeros(0, 192)


@dataclass
class Session:
    """What one chunk of an utterance leaves for the vocoder's next. All is empty before the first chunk."""

    mel: Tensor  # (1, 80, 0 or mel_cache_len) the last frames that went through the vocoder
    source: Tensor  # (1, 1, 0 or source_cache_len) their excitation
    speech: Tensor  # (1, 0 or source_cache_len) their samples, to be faded out under the next chunk's


class LoadedKeys(NamedTuple):
    """What torch's `load_state_dict` tells."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class SpeechModel(ABC):
    """The three parts together. Attribute names and chunk sizes are upstream's.

    Lengths: tokens for `token_*`, mel frames for `mel_*`, samples for `source_cache_len`.
    """

    mel_cache_len: int

    def __init__(
        self,
        llm: SpeechTokenLM,
        flow: TokenFlow,
        hift: HiFTGenerator,
        fp16: bool = False,
        device: torch.device | str | None = None,
        precision: str = "float32",
        rebuild: Callable[[str], nn.Module] | None = None,
    ) -> None:
        """rebuild: makes a part anew by its name, so that other weights can be loaded. The rest as in CosyVoice."""
        self.device = torch.device(device or fastest_device())
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # what it means here, in any thread
        check_precision(precision, self.device)
        self.fp16 = self.device.type == "cuda" and (fp16 or precision == "float16")  # a CPU is slower in half precision
        self.precision = "float16" if self.fp16 else precision
        self.rebuild = rebuild
        self.prepared: set[str] = set()
        self.llm, self.flow, self.hift = map(self._placed, (llm, flow, hift))
        if self.device.type == "cuda":  # the vocoder makes two for a length of mel, in memory that torch does not count
            torch.backends.cuda.cufft_plan_cache[self.device].max_size = MOST_FFT_PLANS
        self.source_cache_len = self.mel_cache_len * hift.samples_per_frame
        self.speech_window = self._window(self.source_cache_len)

    def load(self, llm_model: Weights, flow_model: Weights, hift_model: Weights) -> None:
        """Read the weights of all three parts. Raises InputError for those that do not fit.

        Each part gets its fastest form for speaking, except a part that is given as a module. `load`, and the
        `load_state_dict` of each part in that form, can be called again.
        """
        for name, weights in zip(MODEL_PARTS, (llm_model, flow_model, hift_model), strict=True):
            if isinstance(weights, nn.Module):
                setattr(self, name, self._placed(weights))
                continue
            part = self._rebuilt(name) if name in self.prepared else getattr(self, name)
            if isinstance(weights, Mapping):
                load_strict(part, dict(weights), f"the {name}'s weights")
            else:
                load_strict(part, read_state_dict(Path(weights)), str(weights))
            self._use(name, part)

    def _use(self, name: str, part: nn.Module) -> None:
        """Give a part that has its weights its fastest form, in which they have other names, and let it speak."""
        PREPARE[name](part, self.precision)
        part.load_state_dict = partial(self._load_state_dict, name)
        setattr(self, name, part)
        self.prepared.add(name)

    def _rebuilt(self, name: str) -> nn.Module:
        """Return a new part for other weights: those of one in its fastest form cannot be replaced."""
        if self.rebuild is None:
            raise InputError("the weights are in their form for speaking already; make a new model for others")
        return self._placed(self.rebuild(name))

    def _placed(self, part: nn.Module) -> nn.Module:
        return part.to(self.device).eval()

    def _load_state_dict(self, name: str, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadedKeys:
        """Do what a part's `load_state_dict` does, but for all of its weights only; unless strict, others may be there.

        The part is a new object after that: look it up as `model.llm`, `model.flow` or `model.hift`.
        """
        part = self._rebuilt(name)
        state = {key: value for key, value in state_dict.items() if key not in TRAINING_COUNTERS}
        known = part.state_dict().keys()
        unexpected = [] if strict else [key for key in state if current_name(key) not in known]
        load_strict(
            part, {key: value for key, value in state.items() if key not in unexpected}, f"the {name}'s weights"
        )
        self._use(name, part)
        return LoadedKeys([], unexpected)

    def tts(
        self,
        text: Tensor | Iterator[Tensor] = NO_TOKENS,
        flow_embedding: Tensor = NO_SPEAKER,
        llm_embedding: Tensor = NO_SPEAKER,
        prompt_text: Tensor = NO_TOKENS,
        llm_prompt_speech_token: Tensor = NO_TOKENS,
        flow_prompt_speech_token: Tensor = NO_TOKENS,
        prompt_speech_feat: Tensor = NO_MEL,
        source_speech_token: Tensor = NO_TOKENS,
        stream: bool = False,
        speed: float = 1.0,
        **_lengths: Tensor,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield `{"tts_speech": (1, samples)}` on the CPU: one piece, or with `stream` one for each chunk of tokens.

        Token arguments are (1, N) ids, embeddings (1, 192), or (0, 192) for none, the prompt's mel (1, T, 80). A text
        that is still being written is an iterator of such ids, for CosyVoice2 only.
        With `source_speech_token` these tokens are spoken and the text is not used. Lengths, which front ends
        and stored speakers hold for each tensor, follow from the shapes.

        Without `stream`, torch's generator serves token sampling, flow noise and source noise in this order.
        Raises InputError for a speed out of range or in a stream, and when there is nothing to speak.
        """
        check_speed(speed, stream)
        voice = [x.to(self.device) for x in (flow_prompt_speech_token, prompt_speech_feat, flow_embedding)]
        tokens = self._tokens(text, prompt_text, llm_prompt_speech_token, llm_embedding, source_speech_token, stream)
        if stream and self.device.type == "cuda":
            tokens = prefetch(tokens)  # on a CPU it would only take the first chunk's cores
        session, is_silent = self.new_session(), True
        with closing(tokens):  # a consumer that leaves early stops the language model
            chunks = self.chunks(tokens, flow_prompt_speech_token.shape[1]) if stream else [(list(tokens), True)]
            for chunk, is_last in chunks:
                is_silent = is_silent and not chunk
                if is_silent:
                    raise InputError("the model returned no speech tokens; try another text")
                token = torch.tensor([chunk], dtype=torch.long, device=self.device)
                speech = self.token2wav(token, *voice, session, finalize=is_last, speed=speed)
                yield {"tts_speech": speech.cpu().clone()}  # a copy, which the caller may change in place

    def tts_together(
        self, texts: Sequence[Tensor], embedding: Tensor, draws: Sequence[Draws], speed: float = 1.0
    ) -> Iterator[Tensor]:
        """Yield the speech (1, samples) of several texts (1, N) in the voice of `embedding` (1, 192), on the CPU.

        The language model writes them side by side; each draws from its own `draws`, in the order of `tts`.
        """
        written = self.write_together(texts, embedding, draws)
        for tokens, own_draws in zip(written, draws, strict=True):
            yield self.sound(tokens, embedding, own_draws, speed)

    def write_together(self, texts: Sequence[Tensor], embedding: Tensor, draws: Sequence[Draws]) -> list[list[int]]:
        """Return the speech tokens of several texts (1, N), which the language model writes side by side."""
        texts = [text.to(self.device) for text in texts]
        return self.llm.inference_together(texts, embedding.to(self.device), draws)

    def sound(self, tokens: Sequence[int], embedding: Tensor, draws: Draws, speed: float = 1.0) -> Tensor:
        """Return the speech (1, samples) of tokens in the voice of `embedding` (1, 192), on the CPU.

        Raises InputError where there are no tokens.
        """
        if not tokens:
            raise InputError("the model returned no speech tokens; try another text")
        token = torch.tensor([tokens], device=self.device)
        prompt = [x.to(self.device) for x in (NO_TOKENS, NO_MEL, embedding)]
        with draws:
            speech = self.token2wav(token, *prompt, self.new_session(), finalize=True, speed=speed)
        return speech.cpu()

    @torch.inference_mode()
    def token2wav(
        self,
        token: Tensor,
        prompt_token: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        session: Session,
        finalize: bool = False,
        speed: float = 1.0,
    ) -> Tensor:
        """Return the speech (1, samples) of one of the `chunks` of tokens (1, N), on the model's device.

        `session` moves on. Unless `finalize`, the end of the speech is held back, to be cross-faded with the next.
        """
        mel = self.next_mel(token, prompt_token, prompt_feat, embedding, session, finalize)
        if finalize:
            mel = change_speed(mel, speed)
        mel = torch.cat([session.mel, mel], dim=2)
        speech, source = self.hift.inference(speech_feat=mel, cache_source=session.source)
        speech = fade_in_out(speech, session.speech, self.speech_window)
        if finalize:
            return speech
        session.mel = mel[:, :, -self.mel_cache_len :]
        session.source = source[:, :, -self.source_cache_len :]
        speech, session.speech = speech.tensor_split([-self.source_cache_len], dim=1)
        return speech

    @abstractmethod
    def new_session(self) -> Session:
        """Return the state before the first chunk of an utterance."""

    @abstractmethod
    def chunks(self, tokens: Iterator[int], prompt_tokens: int) -> Iterator[tuple[list[int], bool]]:
        """Cut the tokens of a stream into chunks. The flag marks the last one, and there always is a last one.

        prompt_tokens: how many the prompt has.
        """

    @abstractmethod
    def next_mel(
        self,
        token: Tensor,
        prompt_token: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        session: Session,
        finalize: bool,
    ) -> Tensor:
        """Return the mel (1, 80, T) that a chunk of tokens adds to the utterance; arguments as in `token2wav`."""

    @abstractmethod
    def tokens_of_pieces(
        self, text: Iterator[Tensor], prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor
    ) -> Iterator[int]:
        """Yield the tokens of a text whose pieces (1, N) are still arriving."""

    def _empty(self, *sizes: Sequence[int]) -> list[Tensor]:
        return [torch.zeros(size, device=self.device) for size in sizes]

    def _window(self, length: int) -> Tensor:
        """Return a Hamming window, of which the first `length` values fade in and the last `length` fade out."""
        return torch.hamming_window(2 * length, periodic=False, dtype=torch.float64, device=self.device)

    def _tokens(
        self,
        text: Tensor | Iterator[Tensor],
        prompt_text: Tensor,
        prompt_speech_token: Tensor,
        embedding: Tensor,
        source_speech_token: Tensor,
        stream: bool,
    ) -> Generator[int, None, None]:
        """Yield the tokens to speak: those of a source recording, else what the language model writes."""
        if source_speech_token.shape[1] > 0:
            yield from source_speech_token[0].tolist()
            return
        prompt = prompt_text.to(self.device), prompt_speech_token.to(self.device)
        embedding = embedding.to(self.device)
        if not isinstance(text, Tensor):
            yield from self.tokens_of_pieces((piece.to(self.device) for piece in text), *prompt, embedding)
        elif stream or self.llm.takes == 1:  # a stream cannot wait for the end of several takes
            yield from self.llm.inference(*with_lengths(text.to(self.device), *prompt), embedding)
        else:
            yield from self.llm.best_take(text.to(self.device), *prompt, embedding)


def check_speed(speed: float, stream: bool = False) -> None:
    """Raise InputError for a speed that cannot be spoken."""
    if not MIN_SPEED <= speed <= MAX_SPEED:
        raise InputError(f"speed {speed} is out of range; give {MIN_SPEED} (slow) to {MAX_SPEED} (fast)")
    if stream and speed != 1:
        raise InputError(f"speed {speed} cannot be streamed; use stream=False, or speed 1")


def change_speed(mel: Tensor, speed: float) -> Tensor:
    """Stretch a mel (1, M, T) to int(T / speed) frames, at least one."""
    if speed == 1:
        return mel
    return F.interpolate(mel, size=max(1, int(mel.shape[2] / speed)), mode="linear")


def with_lengths(*sequences: Tensor) -> list[Tensor]:
    """Return each tensor (1, N, ...) followed by its length (1,), as the modules take them."""
    return [y for x in sequences for y in (x, torch.tensor([x.shape[1]], device=x.device))]
