"""The blocks of a Qwen2 model as decoding runs them, for frames that come one after the other.

The weights are those of transformers' modules, which training runs. Decoding is our own: it keeps keys and values in
place, reads a group's heads together, and a CUDA graph can repeat its steps. Rotary positions: Su et al., 2021,
"RoFormer", section 3.2. Grouped heads: Ainslie et al., 2023, "GQA".
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.transformer.precision import Convert, stacked

if TYPE_CHECKING:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

Rotation = tuple[Tensor, Tensor]  # cosines and sines (B or 1, 1, N, D / 2)
Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # new keys and values -> all that there are


def rotation(places: Tensor, head_size: int, base: float) -> Rotation:
    """Return the angles' cosines and sines at the places (B or 1, N) of a sequence, which count from 0."""
    exponents = torch.arange(0, head_size, 2, device=places.device, dtype=torch.float32) / head_size
    angles = places.unsqueeze(-1) * base**-exponents  # (B, N, D / 2)
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotated(heads: Tensor, turn: Rotation) -> Tensor:
    """Return heads (B, H, N, D) in which the pairs (i, i + D / 2) of channels are turned."""
    cosines, sines = (part.to(heads.dtype) for part in turn)
    left, right = heads.chunk(2, dim=-1)
    return torch.cat((left * cosines - right * sines, right * cosines + left * sines), dim=-1)


def rms_norm(x: Tensor, norm: "Qwen2RMSNorm") -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class SideBySide(nn.Module):
    """Several linear layers of the same input, whose outputs follow one another."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


class DecodingBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), over the weights of a transformers' block."""

    def __init__(self, layer: "Qwen2DecoderLayer", convert: Convert | None = None) -> None:
        """convert: gives the linear layers their decoding form. Without it they are used as they are, and shared."""
        super().__init__()
        attention, feed_forward = layer.self_attn, layer.mlp
        self.head_size = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_size
        self.key_heads = attention.k_proj.out_features // self.head_size
        join = SideBySide if convert is None else lambda *linears: convert(stacked(*linears))
        alone = convert or (lambda linear: linear)
        self.qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = alone(attention.o_proj)
        self.gate_up = join(feed_forward.gate_proj, feed_forward.up_proj)
        self.down = alone(feed_forward.down_proj)
        self.attention_norm, self.feed_forward_norm = layer.input_layernorm, layer.post_attention_layernorm

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor | None, keep: Keep) -> Tensor:
        """Read N new frames (B, N, C).

        mask: (1 or B, 1 or N, T), True where attention is allowed, or None where everything is visible. keep: stores
        keys and values (B, K, N, D) of the new frames and returns those of all T. Returns (B, N, C).
        """
        sizes = (self.heads, self.key_heads, self.key_heads)
        heads = self.qkv(rms_norm(x, self.attention_norm)).unflatten(-1, (sum(sizes), self.head_size)).transpose(1, 2)
        query, key = rotated(heads[:, : -self.key_heads], turn).split(sizes[:2], dim=1)
        keys, values = keep(key, heads[:, -self.key_heads :])
        x = x + self.out(self.attend(query, keys, values, mask))
        gate, up = self.gate_up(rms_norm(x, self.feed_forward_norm)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """query: (B, H, N, D). keys, values: (B, K, T, D). Returns (B, N, H * D).

        The H / K heads that share keys are further queries of these: no key is copied.
        """
        new = query.size(2)
        group = self.heads // self.key_heads
        query = query.unflatten(1, (self.key_heads, group)).flatten(2, 3)  # (B, H, N, D) -> (B, K, G * N, D)
        if mask is not None:
            mask = mask.unsqueeze(1) if mask.size(1) == 1 else mask.repeat(1, group, 1).unsqueeze(1)
        heads = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        heads = heads.unflatten(2, (group, new)).flatten(1, 2)  # (B, K, G * N, D) -> (B, H, N, D)
        return heads.transpose(1, 2).flatten(2)


def decoding_blocks(layers: Sequence[nn.Module]) -> list[DecodingBlock]:
    """Return the blocks in their decoding form, made on the spot from those that still are transformers'."""
    return [layer if isinstance(layer, DecodingBlock) else DecodingBlock(layer) for layer in layers]
