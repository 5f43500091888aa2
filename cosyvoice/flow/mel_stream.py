"""Mel frames while the tokens still come: every frame is computed once, as soon as nothing can change it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cosyvoice.runtime.errors import InputError

if TYPE_CHECKING:
    from cosyvoice.flow.causal_flow import CausalMaskedDiffWithXvec


class MelStream:
    """One utterance of a CausalMaskedDiffWithXvec, whose tokens come in pieces of any length.

    The frames are those of `flow.inference(..., streaming=True)` over all tokens so far. Attention goes by chunks of
    the encoder's `static_chunk_size` tokens, counted from the start of the prompt, and every token sees
    `pre_lookahead_len` more ahead. So the frames of a chunk are final once all its tokens and the look-ahead behind
    them are there; only then are they kept. Frames of a chunk that is still open are computed too, but change when it
    fills: the next `push` returns them again. `settled` counts the final ones. A piece that ends `pre_lookahead_len`
    tokens behind a chunk leaves none open, so all that it returns is final.

    A call costs the frames of the new chunks, and their attention to all frames before. Memory grows with every final
    frame; see `SolverPast`, which refuses frames that there is no memory for. The whole chunks of the prompt are
    computed when the stream is made.
    """

    @torch.inference_mode()
    def __init__(
        self,
        flow: "CausalMaskedDiffWithXvec",
        prompt_token: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        n_timesteps: int,
    ) -> None:
        """For the arguments see `CausalMaskedDiffWithXvec.stream`."""
        chunk_size, ratio = flow.encoder.static_chunk_size, flow.token_mel_ratio
        if chunk_size == 0 or flow.decoder.estimator.static_chunk_size != ratio * chunk_size:
            raise InputError(
                f"a stream needs a static_chunk_size above 0 in the flow's encoder, and {ratio} times as much in its "
                "estimator; correct the model's YAML, or use flow.inference"
            )
        self.flow = flow
        self.tokens = prompt_token  # (1, N) those whose frames are not final yet
        self.begun = False  # whether there were tokens beyond the prompt
        self.ended = False
        self.prompt = prompt_feat.transpose(1, 2)  # (1, F, M) -> (1, M, F)
        self.speaker = flow.project_speaker(embedding)
        self.encoder_past = flow.encoder.new_past()
        self.decoder_past = flow.decoder.new_past(n_timesteps, flow.kept_type or self.speaker.dtype)
        self._next_frames(self._whole_chunks(), self._whole_chunks())

    @property
    def settled(self) -> int:
        """How many mel frames behind the prompt are final."""
        return max(0, self.decoder_past.length - self.prompt.shape[2])

    @torch.inference_mode()
    def push(self, token: Tensor, finalize: bool = False) -> Tensor:
        """Return the float32 mel (1, 80, T) from frame `settled`, as it was before the call, to the last that can be.

        token (1, N), N may be 0. finalize: these are the last tokens; nothing comes behind them, and all frames are
        final. T is 0 while there are too few tokens. Raises InputError for an utterance without tokens or beyond 15000
        frames, and after the end.
        """
        if self.ended:
            raise InputError("this stream has ended; make a new one with flow.stream")
        self.begun = self.begun or token.shape[1] > 0
        if finalize and not self.begun:
            raise InputError("flow.stream got no speech tokens; there is nothing to synthesise")
        self.tokens = torch.cat([self.tokens, token], dim=1)
        self.ended = True  # unless this call succeeds: half a call cannot be repeated
        known = self.tokens.shape[1] if finalize else max(0, self.tokens.shape[1] - self.flow.pre_lookahead_len)
        before = self.decoder_past.length
        mel = self._next_frames(known, known if finalize else self._whole_chunks())
        self.ended = finalize
        return mel[:, :, max(0, self.prompt.shape[2] - before) :]

    def _whole_chunks(self) -> int:
        """How many of the tokens that are not final yet make whole chunks whose look-ahead is there."""
        known = self.tokens.shape[1] - self.flow.pre_lookahead_len
        chunk_size = self.flow.encoder.static_chunk_size
        return max(0, known) // chunk_size * chunk_size

    def _next_frames(self, count: int, final: int) -> Tensor:
        """Return the mel of the first `count` tokens that are not final yet, and keep what belongs to `final` of them.

        Returns (1, 80, token_mel_ratio * count), with frames of the prompt where these come first.
        """
        flow, ratio, first = self.flow, self.flow.token_mel_ratio, self.decoder_past.length
        if count == 0:
            return self.prompt.new_zeros(1, self.prompt.shape[1], 0, dtype=torch.float32)
        embedded = flow.input_embedding(self.tokens)
        context = embedded[:, count : count + flow.pre_lookahead_len] if count < embedded.shape[1] else None
        encoded = flow.encoder.step(embedded[:, :count], context, self.encoder_past, final)
        mu = flow.encoder_proj(encoded).transpose(1, 2)  # (1, T, M) -> (1, M, T)
        known = self.prompt[:, :, first : first + mu.shape[2]].to(mu.dtype)
        cond = F.pad(known, (0, mu.shape[2] - known.shape[2]))
        mel = flow.decoder.step(mu, self.speaker, cond, self.decoder_past, ratio * final)
        self.tokens = self.tokens[:, final:]
        return mel
