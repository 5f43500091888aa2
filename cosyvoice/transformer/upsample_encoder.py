"""The encoder that looks a few tokens ahead and puts out mel frames, several a token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosyvoice.transformer.encoder import INITIAL_CACHE_FRAMES, AttentionStack, InputEmbedding
from cosyvoice.utils.mask import make_pad_mask, mask_of_new_frames
from matcha.models.components.causal import CausalConv1d
from matcha.models.components.past import Past


@dataclass
class UpsamplePast:
    """What an UpsampleConformerEncoder keeps of a stream."""

    lower: Past  # counted in tokens
    upper: Past  # counted in frames


class PreLookaheadLayer(nn.Module):
    """Two convolutions beside the input; the first sees the token and the `lookahead` ones behind it."""

    def __init__(self, channels: int, lookahead: int) -> None:
        super().__init__()
        self.lookahead = lookahead
        self.conv1 = nn.Conv1d(channels, channels, kernel_size=lookahead + 1)
        self.conv2 = CausalConv1d(channels, channels, kernel_size=3)

    def forward(self, x: Tensor, context: Tensor | None, past: Past | None = None) -> Tensor:
        """x (B, T, C) and the tokens behind it (B, lookahead, C), or None where there are only zeros -> (B, T, C)."""
        ahead = F.pad(x, (0, 0, 0, self.lookahead)) if context is None else torch.cat([x, context], dim=1)
        hidden = F.leaky_relu(self.conv1(ahead.transpose(1, 2)))  # (B, T, C) -> (B, C, T)
        return x + self.conv2(hidden, past).transpose(1, 2)


class Upsampling(nn.Module):
    """Repeats every token `ratio` times, then a causal convolution over the frames of two tokens and one more."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = CausalConv1d(channels, channels, kernel_size=2 * ratio + 1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """(B, T, C) -> (B, ratio T, C). past: the earlier frames of a stream."""
        frames = x.transpose(1, 2).repeat_interleave(self.ratio, dim=2)  # (B, T, C) -> (B, C, ratio T)
        return self.conv(frames, past).transpose(1, 2)


class UpsampleConformerEncoder(AttentionStack):
    """Encodes speech tokens as mel frames (CosyVoice 2, Du et al. 2024, section 2.4).

    `num_blocks` blocks work at the rate of the tokens, `num_up_blocks` at that of the frames, `up_ratio` times as many.
    A token sees `pre_lookahead_len` tokens ahead; beyond, attention sees all or, when streaming, goes to the end of the
    own chunk of `static_chunk_size` tokens. Padding is not masked in front of the convolutions: the last tokens of an
    item see something else in a padded batch than alone, as in the public models' training.
    """

    activation = nn.SiLU
    norm_names = ("norm_mha", "norm_ff")
    convolves = False

    def __init__(
        self,
        input_size: int,
        output_size: int = 256,
        num_blocks: int = 6,
        dropout_rate: float = 0.1,
        num_up_blocks: int = 4,
        up_ratio: int = 2,
        pre_lookahead_len: int = 3,
        **options: Any,
    ) -> None:
        """options: those of AttentionStack."""
        super().__init__(
            input_size, output_size, num_blocks=num_blocks + num_up_blocks, dropout_rate=dropout_rate, **options
        )
        self.up_encoders = self.encoders[num_blocks:]  # all blocks are alike
        self.encoders = self.encoders[:num_blocks]
        self.pre_lookahead_layer = PreLookaheadLayer(output_size, pre_lookahead_len)
        self.up_layer = Upsampling(output_size, up_ratio)
        self.up_embed = InputEmbedding(output_size, output_size, dropout_rate, relu=False)

    def forward(
        self, xs: Tensor, xs_lens: Tensor, context: Tensor | None = None, streaming: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Encode a padded batch.

        xs: (B, T, input_size). xs_lens: (B,). context: (B, pre_lookahead_len, input_size), the tokens behind xs, or
        None for zeros. streaming: attend by chunks. Returns the output (B, up_ratio T, output_size) and the mask of
        valid frames (B, 1, up_ratio T).
        """
        ratio, chunk_size = self.up_layer.ratio, self.static_chunk_size if streaming else 0
        valid = ~make_pad_mask(xs_lens, xs.size(1)).unsqueeze(1)
        x = self.pre_lookahead_layer(self.embed(xs), None if context is None else self.embed(context))
        x = self.attend(x, self.encoders, valid, chunk_size)
        valid = valid.repeat_interleave(ratio, dim=2)
        x = self.attend(self.up_embed(self.up_layer(x)), self.up_encoders, valid, ratio * chunk_size)
        return self.after_norm(x), valid

    def new_past(self) -> UpsamplePast:
        """Return the past of a stream that has not begun, for `step`. The chunk size must not be 0."""

        def empty(layers: nn.ModuleList, chunk_size: int) -> Past:
            attentions = [layer.self_attn for layer in layers]
            return Past(attended={each: each.new_cache(INITIAL_CACHE_FRAMES, chunk_size - 1) for each in attentions})

        chunk_size = self.static_chunk_size
        return UpsamplePast(empty(self.encoders, chunk_size), empty(self.up_encoders, self.up_layer.ratio * chunk_size))

    def step(self, xs: Tensor, context: Tensor | None, past: UpsamplePast, final: int) -> Tensor:
        """Encode the next N tokens of a stream, as `forward` by chunks does within the whole.

        xs: (1, N, input_size). context: as in `forward`. past: the tokens before, which end where a chunk does. final:
        how many of the N are kept in it, a number of whole chunks; the others have to come again with the next call.
        Returns (1, up_ratio N, output_size).
        """
        ratio = self.up_layer.ratio
        past.lower.final, past.upper.final = final, ratio * final
        x = self.pre_lookahead_layer(self.embed(xs), None if context is None else self.embed(context), past.lower)
        x = self.next_frames(x, self.encoders, past.lower, self.static_chunk_size)
        x = self.up_embed(self.up_layer(x, past.upper))
        return self.after_norm(self.next_frames(x, self.up_encoders, past.upper, ratio * self.static_chunk_size))

    @staticmethod
    def next_frames(x: Tensor, layers: nn.ModuleList, past: Past, chunk_size: int) -> Tensor:
        """Pass new frames x (1, N, C) through the layers, and let the past advance."""
        mask = mask_of_new_frames(x.size(1), past.length + x.size(1), chunk_size, x.device)
        for layer in layers:
            x = layer.step(x, mask, past.attended[layer.self_attn])
        past.advance()
        return x
