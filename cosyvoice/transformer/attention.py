"""Multi-head self-attention with relative positions, and the cache that makes decoding incremental."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.transformer.embedding import relative_positions
from matcha.models.components.past import KeyValueCache


@dataclass
class AttentionCache(KeyValueCache):
    """The keys and values of a layer with relative positions, and the projected distances that all its rows share.

    The positions, too, have `capacity` rows. All are enlarged by doubling.
    """

    positions: Tensor = field(kw_only=True)  # (1, H, capacity, D), distances capacity-1 .. 0: the last T serve T keys
    later: Tensor = field(kw_only=True)  # (1, H, L, D), distances -1 .. -L: of keys behind their query

    def first(self, rows: int) -> Self:
        return replace(super().first(rows), positions=self.positions[:, :, self.capacity - rows :])


def position_scores(query: Tensor, positions: Tensor, num_keys: int) -> Tensor:
    """Scores by key, of N queries (B, H, N, D) against projected distances (1, H, W, D). Returns (B, H, N, T).

    The products are by distance: column c of every row stands for the distance T - 1 - c of the *last* query. Row i,
    which is N - 1 - i frames earlier, therefore starts N - 1 - i columns later. One column that nothing reads makes
    the rows of the flattened matrix that far apart: after the first N - 1 entries it is the wanted matrix, as a view,
    whose gradient is one too. Where W stops at distance 0, keys after the query read an unrelated entry and must be
    masked.
    """
    num_queries, width = query.size(2), positions.size(2)
    if num_queries == 1:
        return (query @ positions.transpose(-2, -1))[..., :num_keys]
    scores = query @ F.pad(positions, (0, 0, 0, 1)).transpose(-2, -1)  # (B, H, N, W + 1)
    shifted = scores.flatten(-2)[..., num_queries - 1 : num_queries - 1 + num_queries * width]
    return shifted.unflatten(-1, (num_queries, width))[..., :num_keys]


class RelPositionMultiHeadedAttention(nn.Module):
    """Self-attention whose scores add a term of the distance between query and key (Dai et al., 2019, section 3.3).

    score(i, j) = ((q_i + u) k_j + (q_i + v) W_pos r_{i-j}) / sqrt(D), with learned u and v for each head.
    """

    def __init__(self, n_head: int, n_feat: int, dropout_rate: float) -> None:
        super().__init__()
        self.h = n_head
        self.d_k = n_feat // n_head
        self.linear_q = nn.Linear(n_feat, n_feat)
        self.linear_k = nn.Linear(n_feat, n_feat)
        self.linear_v = nn.Linear(n_feat, n_feat)
        self.linear_out = nn.Linear(n_feat, n_feat)
        self.linear_pos = nn.Linear(n_feat, n_feat, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(n_head, self.d_k))
        self.pos_bias_v = nn.Parameter(torch.empty(n_head, self.d_k))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)
        self.dropout_rate = dropout_rate

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.h, self.d_k)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, T, C), each (B, T, C)."""
        return self.linear_q(x), self.linear_k(x), self.linear_v(x)

    def forward(self, x: Tensor, mask: Tensor, pos_emb: Tensor) -> Tensor:
        """x: (B, T, C). mask: (B, 1 or T, T), True where attention is allowed.

        pos_emb: (1, W, C), distances T-1 down to 0 (causal masks only) or down to -(T-1). Returns (B, T, C).
        """
        query, key, value = self.project(x)
        positions = self.split_heads(self.linear_pos(pos_emb))
        return self.attend(query, self.split_heads(key), self.split_heads(value), positions, mask)

    def step(self, x: Tensor, mask: Tensor | None, cache: AttentionCache) -> Tensor:
        """Attend from N new frames to all frames so far, and remember them in `cache`.

        x: (B, N, C). mask: (1 or B, 1 or N, T) with T = cache.length + N, or None where all T are visible. Returns
        (B, N, C).
        """
        end = cache.length + x.size(1)
        if end > cache.capacity:
            self.enlarge(cache, max(end, 2 * cache.capacity))
        query, key, value = self.project(x)
        keys, values = cache.append(self.split_heads(key), self.split_heads(value))
        positions = cache.positions[:, :, cache.capacity - end :]
        if cache.later.size(2) > 0:
            positions = torch.cat((positions, cache.later), dim=2)
        return self.attend(query, keys, values, positions, mask)

    def step_at(self, x: Tensor, place: Tensor, seen: Tensor, order: Tensor, cache: AttentionCache) -> Tensor:
        """`step` for one frame (1, 1, C) that becomes row `place` (1,) of a cache, whose rows all take part.

        seen: (1, 1, T), the rows up to it. order: (T,), see `attend`.
        """
        query, key, value = self.project(x)
        keys, values = cache.put(place, self.split_heads(key), self.split_heads(value))
        return self.attend(query, keys, values, cache.positions, seen, order)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        order: Tensor | None = None,
    ) -> Tensor:
        """order: (T,), for each key the row of `positions` with its distance, where they are not in step."""
        query = query.unflatten(-1, (self.h, self.d_k))  # (B, N, C) -> (B, N, H, D)
        content_query = (query + self.pos_bias_u).transpose(1, 2)
        position_query = (query + self.pos_bias_v).transpose(1, 2) * self.d_k**-0.5
        bias = position_scores(position_query, positions, key.size(2))  # (B, H, N, T)
        if order is not None:
            bias = bias.index_select(-1, order)
        if mask is not None:
            bias = bias.masked_fill(~mask.unsqueeze(1), -torch.inf)
        dropout = self.dropout_rate if self.training else 0.0
        heads = F.scaled_dot_product_attention(content_query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.linear_out(heads.transpose(1, 2).flatten(2))  # (B, H, N, D) -> (B, N, C)

    def new_cache(self, capacity: int, ahead: int = 0) -> AttentionCache:
        """An empty cache with room for `capacity` frames, in the weights' type and place.

        ahead: how many frames behind itself a query may see, at most.
        """
        empty = self.pos_bias_u.new_empty(1, self.h, 0, self.d_k)
        later = self.projected_positions(-1, -ahead) if ahead else empty
        cache = AttentionCache(empty, empty, positions=empty, later=later)
        self.enlarge(cache, capacity)
        return cache

    def enlarge(self, cache: AttentionCache, capacity: int) -> None:
        """Give every buffer `capacity` rows."""
        cache.positions = self.grown_positions(cache.positions, capacity)
        cache.reserve(capacity)

    def grown_positions(self, positions: Tensor, capacity: int) -> Tensor:
        """Projected distances (1, H, W, D) from W - 1 down to 0, and before them those from `capacity` - 1 to W."""
        return torch.cat((self.projected_positions(capacity - 1, positions.size(2)), positions), dim=2)

    def projected_positions(self, first: int, last: int) -> Tensor:
        """(1, H, W, D): the projected distances from `first` down to `last`."""
        weight = self.linear_pos.weight
        distances = relative_positions(first, last, weight.size(1), weight.device).to(weight.dtype)
        return self.split_heads(self.linear_pos(distances.unsqueeze(0)))
