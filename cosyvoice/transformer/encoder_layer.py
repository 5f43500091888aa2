"""One pre-norm block: self-attention, maybe a convolution, a feed-forward network, each with a residual."""

from torch import Tensor, nn

from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.attention import AttentionCache, RelPositionMultiHeadedAttention
from cosyvoice.transformer.convolution import ConvolutionModule


class PositionwiseFeedForward(nn.Module):
    """w_2(activation(w_1 x)) for every frame by itself."""

    def __init__(self, size: int, hidden: int, dropout_rate: float, activation: nn.Module) -> None:
        super().__init__()
        self.w_1 = nn.Linear(size, hidden)
        self.activation = activation
        self.dropout = nn.Dropout(dropout_rate)
        self.w_2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(self.activation(self.w_1(x))))


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    With a `conv_module`, x + convolution(norm_conv(x)) stands between the two, and `norm_final` ends the block.

    The two norms carry the names that the checkpoints give them: `norm_names` is (`norm_mha`, `norm_ff`) in conformer
    stacks and (`norm1`, `norm2`) in transformer stacks. A block's epsilon is 1e-12, unlike the stack's final norm's.
    """

    def __init__(
        self,
        size: int,
        self_attn: RelPositionMultiHeadedAttention,
        feed_forward: PositionwiseFeedForward,
        dropout_rate: float,
        norm_names: tuple[str, str],
        conv_module: ConvolutionModule | None = None,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout_rate)
        self.norm_names = norm_names
        self.conv_module = conv_module
        for name in norm_names if conv_module is None else (*norm_names, "norm_conv", "norm_final"):
            self.add_module(name, nn.LayerNorm(size, eps=1e-12))

    def forward(self, x: Tensor, mask: Tensor, pos_emb: Tensor) -> Tensor:
        """x: (B, T, C). mask: (B, 1 or T, T). pos_emb: (1, W, C). Returns (B, T, C).

        With a convolution the mask is (B, 1, T) and tells valid frames from padding.
        """
        x = x + self.dropout(self.self_attn(self.normed(x, 0), mask, pos_emb))
        if self.conv_module is None:
            return self.feed(x)
        x = x + self.dropout(self.conv_module(self.norm_conv(x), mask))
        return self.norm_final(self.feed(x))

    def step(self, x: Tensor, mask: Tensor | None, cache: AttentionCache) -> Tensor:
        """The same for N new frames (1, N, C) of a growing sequence; see `RelPositionMultiHeadedAttention.step`.

        Raises InputError for a block with a convolution, whose frames need later ones.
        """
        if self.conv_module is not None:
            raise InputError("a stack with use_cnn_module sees ahead and cannot go frame by frame; use its forward")
        return self.feed(x + self.self_attn.step(self.normed(x, 0), mask, cache))

    def normed(self, x: Tensor, which: int) -> Tensor:
        return getattr(self, self.norm_names[which])(x)

    def feed(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.feed_forward(self.normed(x, 1)))
