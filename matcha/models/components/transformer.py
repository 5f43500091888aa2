"""The transformer block of the velocity network: self-attention without positions, then a feed-forward layer.

Parameter names and arithmetic are those of diffusers' `Attention` and `FeedForward`, which a test compares. They are
implemented here because importing any part of diffusers takes as long as importing torch itself.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from matcha.models.components.past import Past


class Attention(nn.Module):
    """Multi-head self-attention ("Attention Is All You Need", 3.2); heads * head_dim may differ from dim."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        inner_dim = heads * head_dim
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(dim, inner_dim, bias=False)
        self.to_v = nn.Linear(dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, mask: Tensor | None = None, past: Past | None = None) -> Tensor:
        """Attend within x (B, T, dim); mask, a boolean that broadcasts to (B, heads, T, T), is True at visible keys.

        past: the earlier frames of a stream, whose keys come before these, also in the mask.
        """
        query, key, value = (rearrange(y, "b t (h d) -> b h t d", h=self.heads) for y in self.project(x))
        if past is None:
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            out = past.attend(self, query, key, value, mask)
        return self.to_out(rearrange(out, "b h t d -> b t (h d)"))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, T, heads * head_dim), of x (B, T, dim)."""
        return self.to_q(x), self.to_k(x), self.to_v(x)


class GELU(nn.Module):
    """A linear layer followed by the exact GELU."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.proj(x))


class FeedForward(nn.Module):
    """Two linear layers, dim -> 4 dim -> dim, applied to each frame."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(GELU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, each added to its input.

    The names skip norm2, which in diffusers belongs to cross-attention.
    """

    def __init__(
        self, dim: int, num_attention_heads: int, attention_head_dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_attention_heads, attention_head_dim, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        """Transform (B, T, dim) to (B, T, dim). attention_mask and past are those of `Attention.forward`."""
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), attention_mask, past)
        return hidden_states + self.ff(self.norm3(hidden_states))
