"""A small network that predicts the mel itself, in the place of ConditionalCFM."""

from typing import Any

import torch
from torch import Tensor, nn

from cosyvoice.transformer.convnext import ConvNeXtBlock
from cosyvoice.transformer.precision import Convert

SPEAKER_SIZES = 128, 64  # of the two layers that sum up a speaker


class MelRegressor(nn.Module):
    """ConvNeXt blocks at the mel's rate, each scaled and shifted by the speaker, that predict the mel.

    A network too small to carry noise beside the mel leaves the noise in the mel, and words are lost in it. This one
    draws nothing: the same tokens and speaker always give the same mel, the median of those that fit them.
    """

    def __init__(
        self,
        mu_channels: int,
        spk_emb_dim: int,
        mel_channels: int,
        channels: int,
        kernel_size: int,
        num_blocks: int,
        mel_mean: float,
        mel_std: float,
    ) -> None:
        """mel_mean and mel_std are those of the log-mels, about: the blocks make frames of about unit variance."""
        super().__init__()
        self.mel_mean, self.mel_std = mel_mean, mel_std
        hidden_size, condition_size = SPEAKER_SIZES
        self.condition = nn.Sequential(
            nn.Linear(spk_emb_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, condition_size), nn.SiLU()
        )
        self.embed = nn.Linear(mu_channels + mel_channels, channels)
        self.blocks = nn.ModuleList(ConvNeXtBlock(channels, condition_size, kernel_size) for _ in range(num_blocks))
        self.to_mel = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, mel_channels))

    def compute_loss(
        self, x1: Tensor, mask: Tensor, mu: Tensor, spks: Tensor, cond: Tensor, **path: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the mean absolute error of the log-mel over the valid mel cells, and the prediction (B, M, T).

        x1 (B, M, T) is the mel; for the others see `predict`. path: what ConditionalCFM takes besides, of no use here:
        there is no path from noise, and no guidance that needs items without conditions.
        """
        predicted = self.predict(mask, mu, spks, cond)
        error = ((predicted.float() - x1) * mask).abs().sum()
        return error / (mask.sum() * x1.shape[1]), predicted

    @torch.inference_mode()
    def forward(
        self, mu: Tensor, mask: Tensor, spks: Tensor, cond: Tensor, cache: Tensor | None = None, **path: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mel (B, M, T) in float32, and the cache as it came: two chunks of a stream share no noise.

        path: what ConditionalCFM takes besides, such as n_timesteps, which is of no use here.
        """
        return self.predict(mask, mu, spks, cond).float(), cache

    def predict(self, mask: Tensor, mu: Tensor, spks: Tensor, cond: Tensor) -> Tensor:
        """Return the mel (B, M, T), zero at padding, in the dtype of the weights.

        mask (B, 1, T) is one at frames and zero at padding; mu (B, C, T) holds the encoded tokens, spks (B, S) the
        speaker, cond (B, M, T) the known frames. All except the mask have the dtype of the weights.
        """
        mask = mask.to(mu.dtype)
        condition = self.condition(spks)
        hidden = self.embed(torch.cat([mu, cond / self.mel_std], dim=1).transpose(1, 2))  # (B, T, C)
        for block in self.blocks:
            hidden = block(hidden * mask.transpose(1, 2), condition)
        return (self.to_mel(hidden).transpose(1, 2) * self.mel_std + self.mel_mean) * mask

    @torch.no_grad()
    def prepare_inference(self, convert: Convert) -> None:
        """Give the linear layers of the blocks another form, in place."""
        for block in self.blocks:
            block.pointwise[0] = convert(block.pointwise[0])
            block.pointwise[2] = convert(block.pointwise[2])
