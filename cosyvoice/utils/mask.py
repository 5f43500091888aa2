"""Boolean masks over time. True means "may be attended to", except in `make_pad_mask`, where it means padding."""

import torch
from torch import Tensor

from cosyvoice.runtime.errors import InputError


def make_pad_mask(lengths: Tensor, max_len: int = 0) -> Tensor:
    """Return a mask (B, T) that is True at the padded frames of a batch.

    lengths: (B,) valid frames of each item. max_len: least width of the mask, which is the longest length or more.
    """
    width = max(max_len, int(lengths.max()))
    frames = torch.arange(width, device=lengths.device)
    return frames >= lengths.unsqueeze(1)  # (T,) against (B, 1) -> (B, T)


def subsequent_chunk_mask(
    size: int, chunk_size: int, num_left_chunks: int = -1, device: torch.device | str = "cpu"
) -> Tensor:
    """Return a mask (size, size) in which frame i sees every frame up to the end of its chunk of `chunk_size` frames.

    Chunks of one frame give the lower triangle: frame i sees itself and the frames before it. `num_left_chunks` has no
    effect, as in the public code: all earlier chunks stay visible.
    """
    frames = torch.arange(size, device=device)
    chunk_end = (frames // chunk_size + 1) * chunk_size  # first frame that i may not see
    return frames < chunk_end.unsqueeze(1)


def mask_of_new_frames(new: int, total: int, chunk_size: int, device: torch.device | str = "cpu") -> Tensor | None:
    """Return the last `new` rows (1, new, total) of the mask of `total` frames in chunks of `chunk_size`.

    If the new frames share one chunk, each sees everything, and the result is None.
    """
    first = total - new
    if first // chunk_size == (total - 1) // chunk_size:
        return None
    return subsequent_chunk_mask(total, chunk_size, device=device)[None, first:]


def add_optional_chunk_mask(
    xs: Tensor,
    masks: Tensor,
    use_dynamic_chunk: bool,
    use_dynamic_left_chunk: bool,
    decoding_chunk_size: int,
    static_chunk_size: int,
    num_decoding_left_chunks: int,
) -> Tensor:
    """Combine a padding mask with the chunk mask of the settings.

    xs: (B, T, C), of which only the length is used. masks: (B, 1, T), True at valid frames. Returns (B, 1, T) without
    chunks, else (B, T, T). A row that would see nothing sees everything, so that an empty item gives finite numbers.
    """
    size = xs.size(1)
    if use_dynamic_chunk:
        if decoding_chunk_size == 0:
            raise InputError("dynamic chunks of random size are not implemented; set use_dynamic_chunk to False")
        chunk_size = size if decoding_chunk_size < 0 else decoding_chunk_size
    else:
        chunk_size = static_chunk_size
    if chunk_size <= 0:
        return masks
    chunks = subsequent_chunk_mask(size, chunk_size, num_decoding_left_chunks, xs.device)
    visible = masks & chunks  # (B, 1, T) & (T, T) -> (B, T, T)
    return visible | ~visible.any(dim=-1, keepdim=True)


def mask_to_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive form of a mask: 0 where it is True, -1e10 elsewhere (which overflows half precision)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -1.0e10)
