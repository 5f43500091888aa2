"""One pre-norm block: self-attention, then a feed-forward network, each with a residual."""

from torch import Tensor, nn

from cosyvoice.transformer.attention import AttentionCache, RelPositionMultiHeadedAttention


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

    The two norms carry the names that the checkpoints give them: `norm_names` is (`norm_mha`, `norm_ff`) in conformer
    stacks and (`norm1`, `norm2`) in transformer stacks. Their epsilon is 1e-12, unlike the stack's final norm.
    """

    def __init__(
        self,
        size: int,
        self_attn: RelPositionMultiHeadedAttention,
        feed_forward: PositionwiseFeedForward,
        dropout_rate: float,
        norm_names: tuple[str, str],
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout_rate)
        self.norm_names = norm_names
        for name in norm_names:
            self.add_module(name, nn.LayerNorm(size, eps=1e-12))

    def forward(self, x: Tensor, mask: Tensor, pos_emb: Tensor) -> Tensor:
        """x: (B, T, C). mask: (B, 1 or T, T). pos_emb: (1, W, C). Returns (B, T, C)."""
        return self.feed(x + self.dropout(self.self_attn(self.normed(x, 0), mask, pos_emb)))

    def step(self, x: Tensor, mask: Tensor | None, cache: AttentionCache) -> Tensor:
        """The same for N new frames (1, N, C) of a growing sequence; see `RelPositionMultiHeadedAttention.step`."""
        return self.feed(x + self.self_attn.step(self.normed(x, 0), mask, cache))

    def normed(self, x: Tensor, which: int) -> Tensor:
        return getattr(self, self.norm_names[which])(x)

    def feed(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.feed_forward(self.normed(x, 1)))
