"""The flow: speech tokens and a speaker vector in, a mel spectrogram out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cosyvoice.flow.flow_matching import ConditionalCFM
from cosyvoice.flow.length_regulator import InterpolateRegulator
from cosyvoice.flow.mel_regressor import MelRegressor
from cosyvoice.flow.token_flow import BATCH_NAMES, TokenFlow, draw_prefix_length
from cosyvoice.utils.rates_300m import TOKEN_RATE_HZ, rates_at


class MaskedDiffWithXvec(TokenFlow):
    """Speech tokens to mel by conditional flow matching: CosyVoice (Du et al. 2024), section 2.3.

    Tokens are encoded and stretched to mel frames; the flow then turns noise into the mel, given these
    frames, the speaker vector, and the mel at the start where it is known (the prompt).
    """

    def __init__(
        self,
        length_regulator: InterpolateRegulator,
        decoder: ConditionalCFM | MelRegressor,
        input_frame_rate: int = TOKEN_RATE_HZ,
        **options: Any,
    ) -> None:
        """options: those of TokenFlow."""
        super().__init__(decoder=decoder, input_frame_rate=input_frame_rate, **options)
        self.length_regulator = length_regulator
        self.rates = rates_at(input_frame_rate)

    def forward(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The loss of a padded batch in which about half the clips start with a random stretch of known mel.

        Reads speech_token (B, N), speech_token_len (B,), speech_feat (B, T, 80), speech_feat_len (B,) and
        embedding (B, 192). The stretches are drawn from Python's `random`, the rest from torch.
        """
        token, token_len, feat, feat_len, embedding = (batch[name].to(device) for name in BATCH_NAMES)
        prefix_lengths = [draw_prefix_length(frames) for frames in feat_len.tolist()]
        return {"loss": self.loss(token, token_len, feat, feat_len, embedding, prefix_lengths)}

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
    ) -> Tensor:
        """The decoder's loss over the valid mel cells; of clip i prefix_lengths[i] frames are known.

        token (B, N) and feat (B, T, 80) are padded, T = max(feat_len); embedding (B, 192) is of any length. For the
        others see `ConditionalCFM.compute_loss`.
        """
        mu, _ = self.length_regulator(self._encode(token, token_len), feat_len)  # (B, T, 80)
        return self.decoder_loss(
            mu, feat, feat_len, embedding, prefix_lengths, times=times, drops_conditions=drops_conditions
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
        flow_cache: Tensor | None,
        n_timesteps: int = 10,
    ) -> tuple[Tensor, Tensor]:
        """The float32 mel (1, 80, T) of one utterance without its prompt, and the cache for the next chunk.

        token (1, N); prompt_token (1, P) and prompt_feat (1, F, 80), P = F = 0 for no prompt; embedding
        (1, 192); flow_cache (1, 80, C, 2), None or C = 0 for the first chunk; n_timesteps Euler steps.
        Raises InputError for no tokens, half a prompt, or more than one utterance.
        """
        self.check_inference_input(token, prompt_token, prompt_feat)
        prompt_frames = prompt_feat.shape[1]
        target_frames = self.mel_frames(token.shape[1])
        encoded = self._encode(torch.cat([prompt_token, token], dim=1), prompt_token_len + token_len)
        encoded_prompt, encoded_target = encoded.tensor_split([prompt_token.shape[1]], dim=1)
        mu, frames = self.length_regulator.inference(
            encoded_prompt, encoded_target, prompt_frames, target_frames, self.input_frame_rate
        )
        mel, flow_cache = self.decoder(
            mu=mu.transpose(1, 2),  # (1, T, M) -> (1, M, T)
            mask=torch.ones(1, 1, frames, dtype=torch.bool, device=mu.device),
            n_timesteps=n_timesteps,
            spks=self.project_speaker(embedding),
            cond=F.pad(prompt_feat.to(mu.dtype).transpose(1, 2), (0, target_frames)),
            prompt_len=prompt_frames,
            cache=flow_cache,
        )
        return mel[:, :, prompt_frames:], flow_cache

    def mel_frames(self, tokens: int) -> int:
        return self.rates.mel_frames(tokens)

    def whole_tokens(self, frames: int) -> int:
        return self.rates.whole_tokens(frames)

    def _encode(self, token: Tensor, token_len: Tensor) -> Tensor:
        """(B, N) ids, anything at padding -> (B, N, 80)."""
        encoded, _ = self.encoder(self.embed(token, token_len), token_len)
        return self.encoder_proj(encoded)
