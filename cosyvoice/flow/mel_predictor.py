"""A small network that predicts a mel from a noisy one, for MelPredictingCFM."""

import torch
from torch import Tensor, nn

from cosyvoice.transformer.convnext import ConvNeXtBlock
from cosyvoice.transformer.precision import Convert
from matcha.models.components.decoder import SinusoidalPosEmb

TIME_SIZE = 128  # of the time's embedding
CONDITION_SIZE = 64  # of what time and speaker are summed up to


class MelPredictor(nn.Module):
    """ConvNeXt blocks at the mel's rate, each scaled and shifted by time and speaker.

    `in_channels` counts x, mu, speaker and condition, as ConditionalDecoder's does, all of one size. mel_mean and
    mel_std are those of the log-mels, about: the blocks see and make frames of about unit variance.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        kernel_size: int,
        num_blocks: int,
        mel_mean: float,
        mel_std: float,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.mel_mean, self.mel_std = mel_mean, mel_std
        speaker_size = in_channels - 3 * out_channels
        self.time_embedding = SinusoidalPosEmb(TIME_SIZE)
        self.condition = nn.Sequential(
            nn.Linear(TIME_SIZE + speaker_size, TIME_SIZE), nn.SiLU(), nn.Linear(TIME_SIZE, CONDITION_SIZE), nn.SiLU()
        )
        self.embed = nn.Linear(3 * out_channels, channels)
        self.blocks = nn.ModuleList(ConvNeXtBlock(channels, CONDITION_SIZE, kernel_size) for _ in range(num_blocks))
        self.to_mel = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, out_channels))

    def forward(self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor) -> Tensor:
        """Mel (B, M, T) at the end of the path that is at x (B, M, T) at time t (B,), zero at padding.

        mask (B, 1, T) is one at frames and zero at padding; mu (B, M, T) holds the encoded tokens, spks (B, S)
        the speaker, cond (B, M, T) the known frames. All but mask and t have the dtype of the weights.
        """
        mask = mask.to(x.dtype)
        condition = self.condition(torch.cat([self.time_embedding(t).to(x.dtype), spks], dim=1))
        noisy = (x - t.to(x.dtype)[:, None, None] * self.mel_mean) / self.mel_std
        hidden = self.embed(torch.cat([noisy, mu, cond / self.mel_std], dim=1).transpose(1, 2))  # (B, T, C)
        for block in self.blocks:
            hidden = block(hidden * mask.transpose(1, 2), condition)
        return (self.to_mel(hidden).transpose(1, 2) * self.mel_std + self.mel_mean) * mask

    @torch.no_grad()
    def prepare_inference(self, convert: Convert) -> None:
        """Give the linear layers of the blocks another form, in place."""
        for block in self.blocks:
            block.pointwise[0] = convert(block.pointwise[0])
            block.pointwise[2] = convert(block.pointwise[2])
