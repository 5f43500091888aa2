"""The flow of the second generation: a fixed number of mel frames a token, and frames that a stream can keep."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cosyvoice.flow.causal_flow_matching import CausalConditionalCFM, check_frames
from cosyvoice.flow.mel_stream import MelStream
from cosyvoice.flow.token_flow import BATCH_NAMES, TokenFlow, draw_prefix_length
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.precision import KEPT
from cosyvoice.transformer.upsample_encoder import UpsampleConformerEncoder

STREAMING_PROBABILITY = 0.5  # of a training batch


class CausalMaskedDiffWithXvec(TokenFlow):
    """Speech tokens to mel by causal conditional flow matching: CosyVoice 2 (Du et al. 2024), section 2.4.

    The encoder makes `token_mel_ratio` frames of every token, and the flow turns noise into the mel, given these
    frames, the speaker vector, and the mel at the start where it is known (the prompt).
    """

    def __init__(
        self,
        encoder: UpsampleConformerEncoder,
        decoder: CausalConditionalCFM,
        input_frame_rate: int = 25,
        token_mel_ratio: int = 2,
        pre_lookahead_len: int = 3,
        **options: Any,
    ) -> None:
        """options: those of TokenFlow. Raises InputError where the encoder has another ratio or look-ahead."""
        super().__init__(encoder=encoder, decoder=decoder, input_frame_rate=input_frame_rate, **options)
        own = encoder.up_layer.ratio, encoder.pre_lookahead_layer.lookahead
        if own != (token_mel_ratio, pre_lookahead_len):
            raise InputError(
                f"CausalMaskedDiffWithXvec: token_mel_ratio {token_mel_ratio} and pre_lookahead_len "
                f"{pre_lookahead_len} must be the encoder's up_ratio and pre_lookahead_len, {own[0]} and {own[1]}"
            )
        self.kept_type: torch.dtype | None = None  # of a stream's keys and values; None is that of the weights
        self.token_mel_ratio = token_mel_ratio
        self.pre_lookahead_len = pre_lookahead_len  # tokens

    def prepare_inference(self, precision: str = "float32") -> None:
        """See TokenFlow. Streams keep keys and values in fewer bits, too, unless the precision is exact."""
        super().prepare_inference(precision)
        self.kept_type = KEPT[precision]

    def forward(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return the loss of a padded batch in which about half the clips start with a random stretch of known mel.

        Reads speech_token (B, N), speech_token_len (B,), speech_feat (B, T, 80), speech_feat_len (B,) and
        embedding (B, 192). Draws from Python's `random` whether all attend by chunks, then the stretches; the rest from
        torch.
        """
        token, token_len, feat, feat_len, embedding = (batch[name].to(device) for name in BATCH_NAMES)
        streaming = draw_streaming()
        prefix_lengths = [draw_prefix_length(frames) for frames in feat_len.tolist()]
        return {"loss": self.loss(token, token_len, feat, feat_len, embedding, prefix_lengths, streaming=streaming)}

    def loss(
        self,
        token: Tensor,
        token_len: Tensor,
        feat: Tensor,
        feat_len: Tensor,
        embedding: Tensor,
        prefix_lengths: Sequence[int],
        times: Tensor | None = None,
        drops_conditions: bool = True,
        streaming: bool | None = None,
    ) -> Tensor:
        """Return the decoder's loss over the valid mel cells; of clip i prefix_lengths[i] frames are known.

        token (B, N) and feat (B, T, 80) are padded; of a clip whose tokens and mel do not last equally long, the longer
        is cut to the shorter. embedding (B, 192) is of any length. streaming: whether to attend by chunks, drawn where
        it is None. For the others see `ConditionalCFM.compute_loss`. Raises InputError for a clip that is too short.
        """
        streaming = draw_streaming() if streaming is None else streaming
        token_len = torch.minimum(token_len, feat_len // self.token_mel_ratio)
        if not token_len.all():
            raise InputError("a training clip has no token, or less mel than one token has; leave it out")
        tokens = int(token_len.max())
        frames = self.token_mel_ratio * tokens
        mu = self._encode(token[:, :tokens], token_len, None, streaming)
        return self.decoder_loss(
            mu,
            feat[:, :frames],
            self.token_mel_ratio * token_len,
            embedding,
            prefix_lengths,
            times=times,
            drops_conditions=drops_conditions,
            streaming=streaming,
        )

    @torch.inference_mode()
    def inference(
        self,
        token: Tensor,
        token_len: Tensor,
        prompt_token: Tensor,
        prompt_token_len: Tensor,
        prompt_feat: Tensor,
        prompt_feat_len: Tensor,
        embedding: Tensor,
        streaming: bool = False,
        finalize: bool = True,
        n_timesteps: int = 10,
    ) -> tuple[Tensor, None]:
        """Return the float32 mel (1, 80, T) of one utterance without its prompt, and None where v1 has a cache.

        token (1, N); prompt_token (1, P) and prompt_feat (1, token_mel_ratio P, 80), P = 0 for no prompt; embedding
        (1, 192). streaming: attend by chunks, counted from the start of the prompt. Unless `finalize`, the last
        `pre_lookahead_len` tokens are only looked at, and T is by so much shorter. The lengths follow from the shapes.
        Raises InputError for no tokens to speak, a prompt that does not fit, more than one utterance or 15000 frames.
        """
        self.check_inference_input(token, prompt_token, prompt_feat)
        self.check_prompt(prompt_token, prompt_feat)
        ahead = 0 if finalize else self.pre_lookahead_len
        if token.shape[1] <= ahead:
            raise InputError(f"flow.inference needs more than {ahead} tokens unless finalize=True; collect more first")
        whole = torch.cat([prompt_token, token], dim=1)
        spoken, context = whole.tensor_split([whole.shape[1] - ahead], dim=1)
        check_frames(self.token_mel_ratio * spoken.shape[1])  # before the encoder, whose attention would be huge
        lengths = torch.tensor([spoken.shape[1]], device=whole.device)
        mu = self._encode(spoken, lengths, self.input_embedding(context) if ahead else None, streaming)
        prompt_frames = prompt_feat.shape[1]
        mel, _ = self.decoder(
            mu=mu.transpose(1, 2),  # (1, T, M) -> (1, M, T)
            mask=torch.ones(1, 1, mu.shape[1], dtype=torch.bool, device=mu.device),
            n_timesteps=n_timesteps,
            spks=self.project_speaker(embedding),
            cond=F.pad(prompt_feat.to(mu.dtype).transpose(1, 2), (0, mu.shape[1] - prompt_frames)),
            streaming=streaming,
        )
        return mel[:, :, prompt_frames:], None

    def stream(self, prompt_token: Tensor, prompt_feat: Tensor, embedding: Tensor, n_timesteps: int = 10) -> MelStream:
        """Return a stream that speaks tokens as they come, and computes each final frame once.

        Arguments as in `inference`. Raises InputError for a prompt that does not fit, and for a model without chunks.
        """
        self.check_prompt(prompt_token, prompt_feat)
        return MelStream(self, prompt_token, prompt_feat, embedding, n_timesteps)

    def check_prompt(self, prompt_token: Tensor, prompt_feat: Tensor) -> None:
        """Raise InputError unless the prompt has `token_mel_ratio` frames of mel a token."""
        frames = self.token_mel_ratio * prompt_token.shape[1]
        if prompt_feat.shape[1] != frames:
            raise InputError(
                f"the prompt's {prompt_token.shape[1]} tokens need {frames} frames of mel, not {prompt_feat.shape[1]}; "
                "cut both to the shorter"
            )

    def mel_frames(self, tokens: int) -> int:
        return self.token_mel_ratio * tokens

    def whole_tokens(self, frames: int) -> int:
        return frames // self.token_mel_ratio

    def batch_options(self, draw: int | None = None) -> dict[str, bool]:
        """Return whether the batch attends by chunks. Every second loss of held-out clips does.

        A voice speaks whole sentences and streams, so both count when epochs are compared.
        """
        return {"streaming": draw_streaming() if draw is None else draw % 2 == 1}

    def _encode(self, token: Tensor, token_len: Tensor, context: Tensor | None, streaming: bool) -> Tensor:
        """(B, N) ids, anything at padding, and the embedded tokens behind them -> (B, token_mel_ratio N, 80)."""
        encoded, _ = self.encoder(self.embed(token, token_len), token_len, context, streaming)
        return self.encoder_proj(encoded)


def draw_streaming() -> bool:
    """Draw whether a training batch attends by chunks: half of them do."""
    return random.random() < STREAMING_PROBABILITY
