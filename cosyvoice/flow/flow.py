"""The flow: speech tokens and a speaker vector in, a mel spectrogram out."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosyvoice.flow.flow_matching import ConditionalCFM
from cosyvoice.flow.length_regulator import InterpolateRegulator
from cosyvoice.flow.mel_regressor import MelRegressor
from cosyvoice.transformer.precision import MANY_FRAMES, conversion
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.frames import TOKEN_RATE_HZ, mel_frames
from cosyvoice.utils.mask import make_pad_mask

NO_PREFIX_PROBABILITY = 0.5
MAX_PREFIX_SHARE = 0.3  # of the clip's frames


class MaskedDiffWithXvec(nn.Module):
    """Speech tokens to mel by conditional flow matching: CosyVoice (Du et al. 2024), section 2.3.

    Tokens are encoded and stretched to mel frames; the flow then turns noise into the mel, given these
    frames, the speaker vector, and the mel at the start where it is known (the prompt).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        spk_embed_dim: int,
        output_type: str,
        vocab_size: int,
        encoder: nn.Module,
        length_regulator: InterpolateRegulator,
        decoder: ConditionalCFM | MelRegressor,
        input_frame_rate: int = TOKEN_RATE_HZ,
        only_mask_loss: bool = True,
    ) -> None:
        super().__init__()
        if output_type != "mel":
            raise InputError(f"MaskedDiffWithXvec: output_type {output_type!r} is not implemented; use 'mel'")
        if not only_mask_loss:
            raise InputError("MaskedDiffWithXvec: only_mask_loss False is not implemented; use True")
        self.input_frame_rate = input_frame_rate  # tokens a second
        self.input_embedding = nn.Embedding(vocab_size, input_size)
        self.spk_embed_affine_layer = nn.Linear(spk_embed_dim, output_size)
        self.encoder = encoder
        self.encoder_proj = nn.Linear(encoder.output_size(), output_size)
        self.decoder = decoder
        self.length_regulator = length_regulator

    def forward(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The loss of a padded batch in which about half the clips start with a random stretch of known mel.

        Reads speech_token (B, N), speech_token_len (B,), speech_feat (B, T, 80), speech_feat_len (B,) and
        embedding (B, 192). The stretches are drawn from Python's `random`, the rest from torch.
        """
        names = ("speech_token", "speech_token_len", "speech_feat", "speech_feat_len", "embedding")
        token, token_len, feat, feat_len, embedding = (batch[name].to(device) for name in names)
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
        frames = feat.shape[1]
        unknown = make_pad_mask(torch.tensor(prefix_lengths, device=feat.device), frames)[:, :, None]
        loss, _ = self.decoder.compute_loss(
            x1=feat.transpose(1, 2),  # (B, T, M) -> (B, M, T)
            mask=~make_pad_mask(feat_len, frames)[:, None],
            mu=mu.transpose(1, 2),
            spks=self._project_speaker(embedding),
            cond=feat.masked_fill(unknown, 0.0).to(mu.dtype).transpose(1, 2),
            times=times,
            drops_conditions=drops_conditions,
        )
        return loss

    def prepare_inference(self, precision: str = "float32") -> None:
        """Give the weights that every step of the solver multiplies with their fastest form, once.

        precision: a name in `MANY_FRAMES`. Names of weights change: this is for a model that only speaks from now on.
        """
        self.decoder.prepare_inference(conversion(self, precision, MANY_FRAMES))

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
        self._check_inference_input(token, prompt_token, prompt_feat)
        prompt_frames = prompt_feat.shape[1]
        target_frames = mel_frames(token.shape[1], self.input_frame_rate)
        encoded = self._encode(torch.cat([prompt_token, token], dim=1), prompt_token_len + token_len)
        encoded_prompt, encoded_target = encoded.tensor_split([prompt_token.shape[1]], dim=1)
        mu, frames = self.length_regulator.inference(
            encoded_prompt, encoded_target, prompt_frames, target_frames, self.input_frame_rate
        )
        mel, flow_cache = self.decoder(
            mu=mu.transpose(1, 2),  # (1, T, M) -> (1, M, T)
            mask=torch.ones(1, 1, frames, dtype=torch.bool, device=mu.device),
            n_timesteps=n_timesteps,
            spks=self._project_speaker(embedding),
            cond=F.pad(prompt_feat.to(mu.dtype).transpose(1, 2), (0, target_frames)),
            prompt_len=prompt_frames,
            cache=flow_cache,
        )
        return mel[:, :, prompt_frames:], flow_cache

    @staticmethod
    def _check_inference_input(token: Tensor, prompt_token: Tensor, prompt_feat: Tensor) -> None:
        if token.shape[0] != 1:
            raise InputError(f"flow.inference takes one utterance at a time, not {token.shape[0]}")
        if token.shape[1] == 0:
            raise InputError("flow.inference got no speech tokens; there is nothing to synthesise")
        if (prompt_token.shape[1] == 0) != (prompt_feat.shape[1] == 0):
            raise InputError("flow.inference needs both prompt_token and prompt_feat, or neither")

    def _encode(self, token: Tensor, token_len: Tensor) -> Tensor:
        """(B, N) ids, anything at padding -> (B, N, 80)."""
        padding = make_pad_mask(token_len, token.shape[1])[:, :, None]
        embedded = self.input_embedding(token.clamp(min=0)).masked_fill(padding, 0.0)
        encoded, _ = self.encoder(embedded, token_len)
        return self.encoder_proj(encoded)

    def _project_speaker(self, embedding: Tensor) -> Tensor:
        """(B, 192) -> (B, 80); only the direction of the vector counts, and zeros leave the bias alone."""
        direction = F.normalize(embedding, dim=1)
        return self.spk_embed_affine_layer(direction.to(self.spk_embed_affine_layer.weight.dtype))


def draw_prefix_length(frames: int) -> int:
    """How many frames of a training clip are given as known: none half of the time, else up to 30 %."""
    if random.random() < NO_PREFIX_PROBABILITY:
        return 0
    return random.randint(0, int(MAX_PREFIX_SHARE * frames))
