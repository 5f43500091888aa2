"""The velocity network whose frames depend on earlier ones, and on later ones of their own chunk at most."""

from typing import Any

import torch
from torch import Tensor

from cosyvoice.flow.decoder import ConditionalDecoder
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.mask import add_optional_chunk_mask, mask_of_new_frames
from matcha.models.components.causal import CausalBlock1D, CausalConv1d
from matcha.models.components.past import Past, row_bytes
from matcha.models.components.transformer import Attention


class CausalConditionalDecoder(ConditionalDecoder):
    """A ConditionalDecoder of causal convolutions and norms over channels (CosyVoice 2, Du et al. 2024, section 2.4).

    With `streaming`, attention sees the frames up to the end of the own chunk of `static_chunk_size` frames; without,
    it sees all. Padding has no influence. There is one level: the frame rate does not change.
    """

    block = CausalBlock1D

    def __init__(self, static_chunk_size: int = 0, num_decoding_left_chunks: int = -1, **options: Any) -> None:
        """options: those of ConditionalDecoder, with a single entry in `channels`."""
        super().__init__(**options)
        if len(self.down_blocks) != 1:
            raise InputError(
                f"CausalConditionalDecoder: channels of {len(self.down_blocks)} levels are not implemented; give one"
            )
        if num_decoding_left_chunks >= 0:
            raise InputError(
                f"CausalConditionalDecoder: num_decoding_left_chunks {num_decoding_left_chunks} is not implemented; "
                "use -1, which lets a frame see all earlier chunks"
            )
        self.static_chunk_size = static_chunk_size  # frames

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        mu: Tensor,
        t: Tensor,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        streaming: bool = False,
    ) -> Tensor:
        """Return the velocity; see `ConditionalDecoder.forward`. streaming: attend by chunks."""
        visible = mask.bool()  # (B, 1, T), or (B, T, T) by chunks
        if streaming:
            frames = x.transpose(1, 2)  # (B, M, T) -> (B, T, M)
            visible = add_optional_chunk_mask(frames, visible, False, False, 0, self.static_chunk_size, -1)
        return self.velocity(x, mask, mu, t, spks, cond, lambda _: visible[:, None])

    def step(
        self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor | None, cond: Tensor | None, past: Past
    ) -> Tensor:
        """Return the velocity of the next N frames of a stream, as `forward` by chunks gives it over the whole.

        All inputs except t and spks are those of the N frames alone. `past` holds the frames before them, which end
        where a chunk does; see `Past` for what it keeps of this call.
        """
        new = x.size(2)
        visible = mask_of_new_frames(new, past.length + new, self.static_chunk_size, x.device)
        if visible is not None:
            visible = visible[:, None]  # (1, N, T) -> (1, 1, N, T)
        return self.velocity(x, mask, mu, t, spks, cond, lambda _: visible, past)

    def new_past(self, kept_type: torch.dtype) -> Past:
        """Return the past of a sequence that has not begun, for `step`, which keeps keys and values in `kept_type`."""
        return Past(self.static_chunk_size, len(self.attentions()), kept_type)

    def kept_bytes(self, kept_type: torch.dtype) -> int:
        """Return how many bytes `step` keeps of a frame."""
        return sum(2 * layer.heads * row_bytes(layer.head_dim, kept_type) for layer in self.attentions())

    def attentions(self) -> list[Attention]:
        """Return the layers that keep a key and a value of each frame and head."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    @staticmethod
    def same_rate(dim: int) -> CausalConv1d:
        return CausalConv1d(dim, dim, kernel_size=3)
