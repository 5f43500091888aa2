"""Speech tokens to a waveform, all at once or chunk by chunk while the language model is still writing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosyvoice.cli.speech_model import Session, SpeechModel, check_speed, with_lengths
from cosyvoice.flow.causal_flow import CausalMaskedDiffWithXvec
from cosyvoice.flow.flow import MaskedDiffWithXvec
from cosyvoice.flow.mel_stream import MelStream
from cosyvoice.hifigan.generator import HiFTGenerator
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.common import fade_in_out
from cosyvoice.utils.frames import MEL_BINS
from cosyvoice.utils.rates_300m import OVERLAP_TOKENS, mel_frames

__all__ = ["CosyVoice2Model", "CosyVoiceModel", "check_speed", "fade_in_out"]  # servers import them from here

HOP_SECONDS, MAX_HOP_SECONDS = 2, 4  # speech that one chunk of CosyVoice-300M's streams adds
MOST_HOPS = 4  # a chunk of CosyVoice2's streams adds at most so many times what the first one adds


@dataclass
class OverlapSession(Session):
    """What one chunk leaves for the next where both compute the frames between them."""

    flow_cache: Tensor  # (1, 80, C, 2) noise and mu of the frames that two chunks share
    mel_overlap: Tensor  # (1, 80, 0 or mel_overlap_len) to be faded out under the next chunk's mel


class CosyVoiceModel(SpeechModel):
    """CosyVoice-300M: the chunks of a stream overlap, and are cross-faded."""

    mel_cache_len = 20

    def __init__(self, llm: TransformerLM, flow: MaskedDiffWithXvec, hift: HiFTGenerator, *args: Any, **options: Any):
        """The other arguments are those of SpeechModel."""
        super().__init__(llm, flow, hift, *args, **options)
        self.token_min_hop_len = HOP_SECONDS * flow.input_frame_rate
        self.token_max_hop_len = MAX_HOP_SECONDS * flow.input_frame_rate
        self.token_overlap_len = OVERLAP_TOKENS
        self.stream_scale_factor = 1  # each hop is this much longer than the one before
        self.mel_overlap_len = mel_frames(OVERLAP_TOKENS, flow.input_frame_rate)
        self.mel_window = self._window(self.mel_overlap_len)

    def new_session(self) -> OverlapSession:
        mel = (1, MEL_BINS, 0)
        return OverlapSession(*self._empty(mel, (1, 1, 0), (1, 0), (*mel, 2), mel))

    def chunks(self, tokens: Iterator[int], prompt_tokens: int) -> Iterator[tuple[list[int], bool]]:
        """Cut tokens into chunks that share `token_overlap_len` with the next; the flag marks the last."""
        hop, chunk = self.token_min_hop_len, []
        for token in tokens:
            chunk.append(token)
            if len(chunk) == hop + self.token_overlap_len:
                yield chunk, False
                chunk = chunk[hop:]
                hop = min(self.token_max_hop_len, int(hop * self.stream_scale_factor))
        yield chunk, True

    def next_mel(
        self,
        token: Tensor,
        prompt_token: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        session: OverlapSession,
        finalize: bool,
    ) -> Tensor:
        """Return the chunk's mel, faded in under what the last one held back; unless `finalize`, hold back its end."""
        mel, session.flow_cache = self.flow.inference(
            *with_lengths(token, prompt_token, prompt_feat), embedding, session.flow_cache
        )
        mel = fade_in_out(mel, session.mel_overlap, self.mel_window)
        if not finalize:
            mel, session.mel_overlap = mel.tensor_split([-self.mel_overlap_len], dim=2)
        return mel

    def tokens_of_pieces(self, *_: Any) -> Iterator[int]:
        raise InputError("CosyVoice-300M cannot speak a text that is still arriving; give it whole, or use CosyVoice2")


@dataclass
class CausalSession(Session):
    """What one chunk leaves for the next where mel frames, once computed, never change."""

    flow: MelStream | None = None  # from the first chunk on that is not the last as well
    tokens: list[Tensor] | None = None  # (1, N) each, so far; None where the last chunk needs only its own


class CosyVoice2Model(SpeechModel):
    """CosyVoice2: each chunk of a stream goes on exactly where the one before ended, and computes new frames only.

    The last chunk does so, too: what was heard and what comes last belong to one course of the flow, and nothing is
    computed twice. Only the attention to earlier frames makes later chunks dearer (docs/performance.md). The public
    code instead computes the whole utterance once more for the last chunk, with attention of all to all, and keeps its
    end. On the recorded streams that moves the last chunk's mel by up to 0.7, and the frames that were heard before
    would move by up to 2.2. With `last_chunk_sees_all` = True the last chunk is the public code's. A stream that ends
    within its first chunk has nothing to go on from, and equals speech in one piece.
    """

    mel_cache_len = 8
    last_chunk_sees_all = False

    def __init__(
        self, llm: Qwen2LM, flow: CausalMaskedDiffWithXvec, hift: HiFTGenerator, *args: Any, **options: Any
    ) -> None:
        """The other arguments are those of SpeechModel."""
        super().__init__(llm, flow, hift, *args, **options)
        self.token_hop_len = flow.encoder.static_chunk_size  # so that every chunk is final when it is computed
        self.token_max_hop_len = MOST_HOPS * self.token_hop_len
        self.stream_scale_factor = 2  # each hop is this much longer than the one before

    def new_session(self) -> CausalSession:
        tokens: list[Tensor] | None = [] if self.last_chunk_sees_all else None
        return CausalSession(*self._empty((1, MEL_BINS, 0), (1, 1, 0), (1, 0)), tokens=tokens)

    def chunks(self, tokens: Iterator[int], prompt_tokens: int) -> Iterator[tuple[list[int], bool]]:
        """Cut tokens so that each chunk ends a look-ahead behind a chunk of the flow, counted from the prompt's start.

        Each chunk has only new tokens, and the last one may have none. The flag marks the last. Raises InputError for a
        flow without chunks.
        """
        hop, chunk = self.token_hop_len, []
        if hop == 0:
            raise InputError("the flow's encoder has no chunks: set static_chunk_size in the YAML, or use stream=False")
        wanted = hop + -prompt_tokens % hop + self.flow.pre_lookahead_len
        for token in tokens:
            chunk.append(token)
            if len(chunk) == wanted:
                yield chunk, False
                hop = min(self.token_max_hop_len, hop * self.stream_scale_factor)
                chunk, wanted = [], hop
        yield chunk, True

    def next_mel(
        self,
        token: Tensor,
        prompt_token: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        session: CausalSession,
        finalize: bool,
    ) -> Tensor:
        """Return the mel behind that of the chunks before; see the class for that of the last one."""
        if session.tokens is not None:
            session.tokens.append(token)
        if finalize and (session.flow is None or session.tokens is not None):
            whole = token if session.tokens is None else torch.cat(session.tokens, dim=1)
            mel, _ = self.flow.inference(*with_lengths(whole, prompt_token, prompt_feat), embedding)
            return mel[:, :, session.flow.settled :] if session.flow else mel
        if session.flow is None:
            session.flow = self.flow.stream(prompt_token, prompt_feat, embedding)
        return session.flow.push(token, finalize)

    def tokens_of_pieces(
        self, text: Iterator[Tensor], prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor
    ) -> Iterator[int]:
        return self.llm.inference_bistream(text, *with_lengths(prompt_text, prompt_speech_token), embedding)
