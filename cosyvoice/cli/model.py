"""Speech tokens to a waveform, all at once or chunk by chunk while the language model is still writing."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.cli.prefetch import prefetch
from cosyvoice.flow.flow import MaskedDiffWithXvec
from cosyvoice.hifigan.generator import HiFTGenerator
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.model_folder.weights import load_strict, read_state_dict
from cosyvoice.transformer.precision import check_precision
from cosyvoice.utils.device import fastest_device
from cosyvoice.utils.draws import Draws
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.frames import MEL_BINS
from cosyvoice.utils.rates_300m import MEL_HOP_SAMPLES, OVERLAP_TOKENS, mel_frames

MOST_FFT_PLANS = 16  # kept on a GPU
MIN_SPEED, MAX_SPEED = 0.5, 2.0
HOP_SECONDS, MAX_HOP_SECONDS = 2, 4  # speech that one chunk of a stream adds

Weights = Path | Mapping[str, Tensor]  # a file, or tensors by name

NO_TOKENS = torch.zeros(1, 0, dtype=torch.int32)
NO_MEL = torch.zeros(1, 0, MEL_BINS)
NO_SPEAKER = torch.zeros(0, 192)


@dataclass
class Session:
    """What one chunk of an utterance leaves for the next. All is empty before the first chunk."""

    flow_cache: Tensor  # (1, 80, C, 2) noise and mu of the frames that two chunks share
    mel_overlap: Tensor  # (1, 80, 0 or mel_overlap_len) to be faded out under the next chunk's mel
    mel: Tensor  # (1, 80, 0 or mel_cache_len) the last frames that went through the vocoder
    source: Tensor  # (1, 1, 0 or source_cache_len) their excitation
    speech: Tensor  # (1, 0 or source_cache_len) their samples, to be faded out under the next chunk's


class CosyVoiceModel:
    """The three parts together. Attribute names and chunk sizes are upstream's.

    Lengths: tokens for `token_*`, mel frames for `mel_*`, samples for `source_cache_len`.
    """

    def __init__(
        self,
        llm: TransformerLM,
        flow: MaskedDiffWithXvec,
        hift: HiFTGenerator,
        fp16: bool = False,
        device: torch.device | str | None = None,
        precision: str = "float32",
    ) -> None:
        self.device = torch.device(device or fastest_device())
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # what it means here, in any thread
        check_precision(precision, self.device)
        self.fp16 = self.device.type == "cuda" and (fp16 or precision == "float16")  # a CPU is slower in half precision
        self.precision = "float16" if self.fp16 else precision
        self.loaded = False
        self.llm, self.flow, self.hift = (part.to(self.device).eval() for part in (llm, flow, hift))
        if self.device.type == "cuda":  # the vocoder makes two for a length of mel, in memory that torch does not count
            torch.backends.cuda.cufft_plan_cache[self.device].max_size = MOST_FFT_PLANS
        self.token_min_hop_len = HOP_SECONDS * flow.input_frame_rate
        self.token_max_hop_len = MAX_HOP_SECONDS * flow.input_frame_rate
        self.token_overlap_len = OVERLAP_TOKENS
        self.stream_scale_factor = 1  # each hop is this much longer than the one before
        self.mel_overlap_len = mel_frames(OVERLAP_TOKENS, flow.input_frame_rate)
        self.mel_cache_len = 20
        self.source_cache_len = self.mel_cache_len * MEL_HOP_SAMPLES
        self.mel_window = self._window(self.mel_overlap_len)
        self.speech_window = self._window(self.source_cache_len)

    def load(self, llm_model: Weights, flow_model: Weights, hift_model: Weights) -> None:
        """Read the weights of all three parts, once. Raises InputError for those that do not fit.

        Then those of language model and flow get their fastest form, and the vocoder's weight norm is folded; the parts
        take no others any more.
        """
        if self.loaded:
            _refuse_weights()
        for part, weights in ((self.llm, llm_model), (self.flow, flow_model), (self.hift, hift_model)):
            if isinstance(weights, Mapping):
                load_strict(part, weights, f"the {type(part).__name__}'s weights")
            else:
                load_strict(part, read_state_dict(weights), str(weights))
        self.llm.prepare_decoding(self.precision)
        self.flow.prepare_inference(self.precision)
        self.hift.remove_weight_norm()
        for part in (self.llm, self.flow, self.hift):
            part.register_load_state_dict_pre_hook(_refuse_weights)
        self.loaded = True

    def tts(
        self,
        text: Tensor = NO_TOKENS,
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
        """Yield `{"tts_speech": (1, samples)}` on the CPU: one piece, or with `stream` one every 2 seconds.

        Token arguments are (1, N) ids, embeddings (1, 192), or (0, 192) for none, the prompt's mel (1, T, 80).
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
        session = self.new_session()
        with closing(tokens):  # a consumer that leaves early stops the language model
            for chunk, is_last in self._chunks(tokens) if stream else [(list(tokens), True)]:
                if not chunk:
                    raise InputError("the model returned no speech tokens; try another text")
                token = torch.tensor([chunk], device=self.device)
                speech = self.token2wav(token, *voice, session, finalize=is_last, speed=speed)
                yield {"tts_speech": speech.cpu().clone()}  # a copy, which the caller may change in place

    def tts_together(
        self, texts: Sequence[Tensor], embedding: Tensor, draws: Sequence[Draws], speed: float = 1.0
    ) -> Iterator[Tensor]:
        """The speech (1, samples) of several texts (1, N) in the voice of `embedding` (1, 192), on the CPU.

        The language model writes them side by side; each draws from its own `draws`, in the order of `tts`.
        """
        embedding = embedding.to(self.device)
        written = self.llm.inference_together([text.to(self.device) for text in texts], embedding, draws)
        prompt = [x.to(self.device) for x in (NO_TOKENS, NO_MEL)]
        for tokens, own_draws in zip(written, draws, strict=True):
            token = torch.tensor([tokens], device=self.device)
            with own_draws:
                speech = self.token2wav(token, *prompt, embedding, self.new_session(), finalize=True, speed=speed)
            yield speech.cpu()

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
        """One chunk of tokens (1, N) -> speech (1, samples) on the model's device; `session` moves on.

        Unless `finalize`, the end of mel and speech is held back, to be cross-faded with the next chunk.
        """
        mel, session.flow_cache = self.flow.inference(
            *_with_lengths(token, prompt_token, prompt_feat), embedding, session.flow_cache
        )
        mel = torch.cat([session.mel, fade_in_out(mel, session.mel_overlap, self.mel_window)], dim=2)
        if finalize:
            mel = change_speed(mel, speed)
        else:
            mel, session.mel_overlap = mel.tensor_split([-self.mel_overlap_len], dim=2)
        speech, source = self.hift.inference(speech_feat=mel, cache_source=session.source)
        speech = fade_in_out(speech, session.speech, self.speech_window)
        if finalize:
            return speech
        session.mel = mel[:, :, -self.mel_cache_len :]
        session.source = source[:, :, -self.source_cache_len :]
        speech, session.speech = speech.tensor_split([-self.source_cache_len], dim=1)
        return speech

    def new_session(self) -> Session:
        """The state before the first chunk of an utterance."""
        sizes = ((1, MEL_BINS, 0, 2), (1, MEL_BINS, 0), (1, MEL_BINS, 0), (1, 1, 0), (1, 0))
        return Session(*(torch.zeros(size, device=self.device) for size in sizes))

    def _window(self, length: int) -> Tensor:
        """A Hamming window, of which the first `length` values fade in and the last `length` fade out."""
        return torch.hamming_window(2 * length, periodic=False, dtype=torch.float64, device=self.device)

    def _tokens(
        self,
        text: Tensor,
        prompt_text: Tensor,
        prompt_speech_token: Tensor,
        embedding: Tensor,
        source_speech_token: Tensor,
        stream: bool,
    ) -> Generator[int, None, None]:
        """The tokens to speak: those of a source recording, else what the language model writes."""
        if source_speech_token.shape[1] > 0:
            yield from source_speech_token[0].tolist()
            return
        sequences = [x.to(self.device) for x in (text, prompt_text, prompt_speech_token)]
        embedding = embedding.to(self.device)
        if stream or self.llm.takes == 1:  # a stream cannot wait for the end of several takes
            yield from self.llm.inference(*_with_lengths(*sequences), embedding)
        else:
            yield from self.llm.best_take(*sequences, embedding)

    def _chunks(self, tokens: Iterator[int]) -> Iterator[tuple[list[int], bool]]:
        """Cut tokens into chunks that share `token_overlap_len` with the next; the flag marks the last."""
        hop, chunk = self.token_min_hop_len, []
        for token in tokens:
            chunk.append(token)
            if len(chunk) == hop + self.token_overlap_len:
                yield chunk, False
                chunk = chunk[hop:]
                hop = min(self.token_max_hop_len, int(hop * self.stream_scale_factor))
        yield chunk, True


def _refuse_weights(*_load_state_dict: Any) -> None:
    """Their names are no longer those of a file; where not all must be there, none would be taken."""
    raise InputError("the weights are in their form for speaking already; make a new CosyVoice(..., weights={...})")


def check_speed(speed: float, stream: bool = False) -> None:
    """Raises InputError for a speed that cannot be spoken."""
    if not MIN_SPEED <= speed <= MAX_SPEED:
        raise InputError(f"speed {speed} is out of range; give {MIN_SPEED} (slow) to {MAX_SPEED} (fast)")
    if stream and speed != 1:
        raise InputError(f"speed {speed} cannot be streamed; use stream=False, or speed 1")


def change_speed(mel: Tensor, speed: float) -> Tensor:
    """Stretch a mel (1, M, T) to int(T / speed) frames, at least one."""
    if speed == 1:
        return mel
    return F.interpolate(mel, size=max(1, int(mel.shape[2] / speed)), mode="linear")


def fade_in_out(fade_in: Tensor, fade_out: Tensor, window: Tensor) -> Tensor:
    """Cross-fade the start of `fade_in` (..., T) with the end of `fade_out` (..., S); no change where S is 0.

    The first half of the float64 `window` weighs `fade_in`, the second half `fade_out`.
    """
    if fade_out.shape[-1] == 0:
        return fade_in
    rising, falling = window.chunk(2)
    length = rising.shape[0]
    faded = fade_in[..., :length] * rising + fade_out[..., -length:] * falling
    return torch.cat([faded.to(fade_in.dtype), fade_in[..., length:]], dim=-1)


def _with_lengths(*sequences: Tensor) -> list[Tensor]:
    """Each tensor (1, N, ...) followed by its length (1,), as the modules take them."""
    return [y for x in sequences for y in (x, torch.tensor([x.shape[1]], device=x.device))]
