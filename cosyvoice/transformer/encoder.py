"""The attention stacks behind the text encoder, the language model and the flow's token encoder."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.attention import AttentionCache, RelPositionMultiHeadedAttention
from cosyvoice.transformer.cache import INITIAL_CACHE_FRAMES, visible_rows
from cosyvoice.transformer.convolution import ConvolutionModule
from cosyvoice.transformer.embedding import relative_positions
from cosyvoice.transformer.encoder_layer import EncoderLayer, PositionwiseFeedForward
from cosyvoice.utils.mask import add_optional_chunk_mask, make_pad_mask


class InputEmbedding(nn.Module):
    """Linear, LayerNorm, dropout (and ReLU in the language model), scaled by sqrt(width)."""

    def __init__(self, input_size: int, output_size: int, dropout_rate: float, relu: bool) -> None:
        super().__init__()
        layers = [nn.Linear(input_size, output_size), nn.LayerNorm(output_size), nn.Dropout(dropout_rate)]
        self.out = nn.Sequential(*layers, *([nn.ReLU()] if relu else []))
        self.scale = math.sqrt(output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.scale


class AttentionStack(nn.Module):
    """Embedding, blocks with relative positions, final norm. Subclasses say what differs between the families.

    `static_chunk_size` 0 lets every frame see all others, 1 makes the stack causal. `use_cnn_module` adds a convolution
    of `cnn_module_kernel` frames to every block. Of the other options only the values of the v1 recipes are
    implemented; any other value is refused by name.
    """

    activation: ClassVar[type[nn.Module]]
    norm_names: ClassVar[tuple[str, str]]
    convolves: ClassVar[bool]  # whether use_cnn_module may be True
    only_accepts: ClassVar[dict[str, Any]] = {
        "normalize_before": True,
        "pos_enc_layer_type": "rel_pos_espnet",
        "selfattention_layer_type": "rel_selfattn",
        "use_dynamic_chunk": False,
        "use_dynamic_left_chunk": False,
        "cnn_module_norm": "layer_norm",
        "macaron_style": False,
    }

    def __init__(
        self,
        input_size: int,
        output_size: int = 256,
        attention_heads: int = 4,
        linear_units: int = 2048,
        num_blocks: int = 6,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.0,
        input_layer: str = "linear",
        static_chunk_size: int = 0,
        use_cnn_module: bool = False,
        cnn_module_kernel: int = 15,
        **options: Any,
    ) -> None:
        super().__init__()
        self.refuse_unknown(options, input_layer)
        if use_cnn_module:
            self.refuse_convolution(static_chunk_size)
        self.static_chunk_size = static_chunk_size
        self.embed = InputEmbedding(input_size, output_size, dropout_rate, relu=input_layer == "linear_legacy")
        self.pos_dropout = nn.Dropout(positional_dropout_rate)
        self.after_norm = nn.LayerNorm(output_size, eps=1e-5)
        self.encoders = nn.ModuleList(
            EncoderLayer(
                output_size,
                RelPositionMultiHeadedAttention(attention_heads, output_size, attention_dropout_rate),
                PositionwiseFeedForward(output_size, linear_units, dropout_rate, self.activation()),
                dropout_rate,
                self.norm_names,
                ConvolutionModule(output_size, cnn_module_kernel) if use_cnn_module else None,
            )
            for _ in range(num_blocks)
        )

    def refuse_unknown(self, options: dict[str, Any], input_layer: str) -> None:
        for name, value in options.items():
            if name not in self.only_accepts:
                raise InputError(f"{type(self).__name__} knows no option {name}: remove it from the YAML")
            if value != self.only_accepts[name]:
                raise InputError(f"{type(self).__name__} implements {name}={self.only_accepts[name]} only, not {value}")
        if input_layer not in ("linear", "linear_legacy"):
            raise InputError(f"input_layer must be linear or linear_legacy, not {input_layer}")

    def refuse_convolution(self, static_chunk_size: int) -> None:
        if not self.convolves:
            raise InputError(f"{type(self).__name__} implements use_cnn_module=False only, not True")
        if static_chunk_size > 0:
            raise InputError(
                f"use_cnn_module sees ahead, which static_chunk_size {static_chunk_size} forbids: set that to 0, or "
                "use_cnn_module to False"
            )

    def output_size(self) -> int:
        """Channels of the output."""
        return self.after_norm.normalized_shape[0]

    def attend(self, x: Tensor, layers: nn.ModuleList, valid: Tensor, chunk_size: int) -> Tensor:
        """Pass x (B, T, C) through the layers. valid (B, 1, T) is False at padding; chunk_size 0 makes no chunks."""
        mask = add_optional_chunk_mask(x, valid, False, False, 0, chunk_size, -1)
        pos_emb = self.pos_dropout(self.positions(x, causal=chunk_size == 1))
        for layer in layers:
            x = layer(x, mask, pos_emb)
        return x

    @staticmethod
    def positions(x: Tensor, causal: bool = False) -> Tensor:
        """The distances that may occur in x (B, T, C), as (1, W, C): none below 0 where the stack is causal."""
        frames = x.size(1)
        last = 0 if causal else 1 - frames
        return relative_positions(frames - 1, last, x.size(2), x.device).to(x.dtype).unsqueeze(0)


class BaseEncoder(AttentionStack):
    """A stack whose frames come and leave at one rate."""

    def forward(
        self, xs: Tensor, xs_lens: Tensor, decoding_chunk_size: int = 0, num_decoding_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Encode a padded batch.

        xs: (B, T, input_size). xs_lens: (B,). The chunk arguments belong to the public signature; with a static chunk
        size they change nothing. Returns the output (B, T, output_size) and the mask of valid frames (B, 1, T).
        """
        valid = ~make_pad_mask(xs_lens, xs.size(1)).unsqueeze(1)
        return self.after_norm(self.attend(self.embed(xs), self.encoders, valid, self.static_chunk_size)), valid

    def new_cache(self, capacity: int = INITIAL_CACHE_FRAMES) -> list[AttentionCache]:
        """Return an empty cache, one part a block, for `forward_chunk` and `step_at`."""
        return [layer.self_attn.new_cache(capacity) for layer in self.encoders]

    def forward_chunk(self, xs: Tensor, cache: list[AttentionCache], starts: Tensor | None = None) -> Tensor:
        """Encode the next N frames of growing sequences causally, reusing all that `cache` holds.

        xs: (B, N, input_size). starts: (B,), where each sequence begins in a joined cache. The cache is extended.
        Returns (B, N, output_size), equal to the same frames of `forward` over the whole sequence in a causal stack.
        """
        mask = visible_rows(xs.size(1), cache[0].length + xs.size(1), starts, xs.device)
        x = self.embed(xs)
        for layer, layer_cache in zip(self.encoders, cache, strict=True):
            x = layer.step(x, mask, layer_cache)
        return self.after_norm(x)

    def step_at(self, x: Tensor, place: Tensor, cache: list[AttentionCache]) -> Tensor:
        """`forward_chunk` for one frame (1, 1, input_size) that becomes row `place` (1,) of the cache.

        All rows take part in each step, so that a CUDA graph can repeat it. Only the caller counts the rows.
        """
        rows = torch.arange(cache[0].capacity, device=x.device)
        seen = (rows <= place).view(1, 1, -1)
        nearest = len(rows) - 1  # the row of distance 0
        order = (rows + nearest - place).clamp(max=nearest)
        x = self.embed(x)
        for layer, layer_cache in zip(self.encoders, cache, strict=True):
            x = layer.feed(x + layer.self_attn.step_at(layer.normed(x, 0), place, seen, order, layer_cache))
        return self.after_norm(x)


class ConformerEncoder(BaseEncoder):
    """The stack of text encoder and flow encoder: SiLU, a convolution in each block where `use_cnn_module` says so."""

    activation = nn.SiLU
    norm_names = ("norm_mha", "norm_ff")
    convolves = True


class TransformerEncoder(BaseEncoder):
    """The stack of the language model: ReLU."""

    activation = nn.ReLU
    norm_names = ("norm1", "norm2")
    convolves = False
