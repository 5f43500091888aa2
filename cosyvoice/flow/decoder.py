"""The velocity network of the flow: a one-dimensional U-Net of convolutions and self-attention."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.precision import Convert, stacked
from matcha.models.components.decoder import (
    Block1D,
    Downsample1D,
    ResnetBlock1D,
    SinusoidalPosEmb,
    TimestepEmbedding,
    Upsample1D,
    init_kaiming,
)
from matcha.models.components.past import Past
from matcha.models.components.transformer import Attention, BasicTransformerBlock


class FusedAttention(Attention):
    """The same attention: queries, keys and values come from one product."""

    def __init__(self, base: Attention, convert: Convert) -> None:
        nn.Module.__init__(self)  # the weights are there already
        self.heads, self.head_dim = base.heads, base.head_dim
        self.to_qkv = convert(stacked(base.to_q, base.to_k, base.to_v))
        self.to_out = convert(base.to_out[0])

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_qkv(x).chunk(3, dim=-1)


class Stage(nn.ModuleList):
    """One level of the U-Net: a residual block, transformer blocks, a change of rate (none in the middle).

    A list, because the checkpoints number these three.
    """

    def forward(self, x: Tensor, mask: Tensor, visible: Tensor | None, time_emb: Tensor, *past: Past) -> Tensor:
        """x (B, C_in, T), mask (B, 1, T), time_emb (B, E) -> (B, C_out, T), before the change of rate.

        visible: the mask of `Attention.forward`. past: the earlier frames of a stream, in a causal network.
        """
        residual_block, transformer_blocks = self[0], self[1]
        x = residual_block(x, mask, time_emb, *past)
        x = rearrange(x, "b c t -> b t c").contiguous()
        for block in transformer_blocks:
            x = block(x, visible, *past)
        return rearrange(x, "b t c -> b c t")

    def resample(self, x: Tensor, *past: Past) -> Tensor:
        return self[2](x, *past)


class ConditionalDecoder(nn.Module):
    """Predicts the velocity of noisy mel frames from the frames, the time and the conditions.

    Matcha-TTS (Mehta et al. 2024), section 3.2. Each level of the way down but the last halves the frame
    rate, and the way up mirrors it; T may be odd, or 1. `in_channels` counts x, mu, speaker and condition.
    Group norms average over padding, so a padded batch is not the same computation as its single items.
    """

    block: ClassVar[type[Block1D]] = Block1D

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        dropout: float,
        attention_head_dim: int,
        n_blocks: int,
        num_mid_blocks: int,
        num_heads: int,
        act_fn: str,
    ) -> None:
        super().__init__()
        if act_fn != "gelu":
            raise InputError(f"{type(self).__name__}: act_fn {act_fn!r} is not implemented; use 'gelu'")
        self.in_channels = in_channels
        time_embed_dim = 4 * channels[0]

        def stage(dim: int, dim_out: int, *change_of_rate: nn.Module) -> Stage:
            residual_block = ResnetBlock1D(dim, dim_out, time_embed_dim, self.block)
            transformer_blocks = nn.ModuleList(
                BasicTransformerBlock(dim_out, num_heads, attention_head_dim, dropout)
                for _ in range(n_blocks)
            )
            return Stage([residual_block, transformer_blocks, *change_of_rate])

        self.time_embeddings = SinusoidalPosEmb(in_channels)
        self.time_mlp = TimestepEmbedding(in_channels, time_embed_dim)
        down_rates = [Downsample1D] * (len(channels) - 1) + [self.same_rate]
        down_dims = pairwise([in_channels, *channels])
        self.down_blocks = nn.ModuleList(
            stage(dim, dim_out, rate(dim_out))
            for (dim, dim_out), rate in zip(down_dims, down_rates, strict=True)
        )
        self.mid_blocks = nn.ModuleList(stage(channels[-1], channels[-1]) for _ in range(num_mid_blocks))
        up_rates = [Upsample1D] * (len(channels) - 1) + [self.same_rate]
        up_dims = pairwise([*reversed(channels), channels[0]])
        self.up_blocks = nn.ModuleList(
            stage(2 * dim, dim_out, rate(dim_out))  # twice: what comes from below, and the skip connection
            for (dim, dim_out), rate in zip(up_dims, up_rates, strict=True)
        )
        self.final_block = self.block(channels[0], channels[0])
        self.final_proj = nn.Conv1d(channels[0], out_channels, kernel_size=1)
        init_kaiming(self)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        mu: Tensor,
        t: Tensor,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, out_channels, T) at x (B, M, T) and time t (B,), zero at padding.

        mask (B, 1, T) is one at frames and zero at padding; mu (B, M, T) holds the encoded tokens, spks (B, S)
        the speaker, cond (B, M, T) the known frames. All but mask and t have the dtype of the weights.
        """
        # (B, 1, 1, T): the same keys for every head and query
        return self.velocity(x, mask, mu, t, spks, cond, lambda level_mask: level_mask.bool()[:, None])

    def velocity(
        self,
        x: Tensor,
        mask: Tensor,
        mu: Tensor,
        t: Tensor,
        spks: Tensor | None,
        cond: Tensor | None,
        visible_at: Callable[[Tensor], Tensor | None],
        *past: Past,
    ) -> Tensor:
        """Return the same where `visible_at` turns a level's mask (B, 1, T) into the mask of its attention.

        past: the earlier frames of a stream, in a causal network.
        """
        mask = mask.to(x.dtype)
        time_emb = self.time_mlp(self.time_embeddings(t).to(x.dtype))  # (B, E)
        x = self._join(x, mu, spks, cond)
        level_masks = [mask[:, :, :: 2**level] for level in range(len(self.down_blocks))]
        masks = [(level_mask, visible_at(level_mask)) for level_mask in level_masks]
        skips = []
        for stage, (stage_mask, visible) in zip(self.down_blocks, masks, strict=True):
            x = stage(x, stage_mask, visible, time_emb, *past)
            skips.append(x)
            x = stage.resample(x * stage_mask, *past)
        for stage in self.mid_blocks:
            x = stage(x, *masks[-1], time_emb, *past)
        for stage, (stage_mask, visible), skip in zip(self.up_blocks, reversed(masks), reversed(skips), strict=True):
            # trimmed: an odd length, halved and doubled, is one frame longer
            x = torch.cat([x[:, :, : skip.shape[-1]], skip], dim=1)
            x = stage(x, stage_mask, visible, time_emb, *past)
            x = stage.resample(x * stage_mask, *past)
        return self.final_proj(self.final_block(x, mask, *past)) * mask

    @torch.no_grad()
    def prepare_inference(self, convert: Convert) -> None:
        """Give the linear layers of the transformer blocks another form, in place: nearly all products are theirs."""
        for block in self.modules():
            if isinstance(block, BasicTransformerBlock):
                block.attn1 = FusedAttention(block.attn1, convert)
                block.ff.net[0].proj = convert(block.ff.net[0].proj)
                block.ff.net[2] = convert(block.ff.net[2])

    @staticmethod
    def _join(x: Tensor, mu: Tensor, spks: Tensor | None, cond: Tensor | None) -> Tensor:
        """Everything the first layer sees, stacked by channel: (B, in_channels, T)."""
        inputs = [x, mu]
        if spks is not None:
            inputs.append(spks[:, :, None].expand(-1, -1, x.shape[-1]))
        if cond is not None:
            inputs.append(cond)
        return torch.cat(inputs, dim=1)

    @staticmethod
    def same_rate(dim: int) -> nn.Conv1d:
        """Return what the last level of each way has in place of a change of rate."""
        return nn.Conv1d(dim, dim, kernel_size=3, padding=1)
