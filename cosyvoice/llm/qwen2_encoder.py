"""The Qwen2 language model under CosyVoice2's, trained by transformers' modules and decoded by our own steps."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cosyvoice.llm.qwen2_config import read_qwen2_config
from cosyvoice.llm.qwen2_decoding import DecodingBlock, decoding_blocks, rms_norm, rotation
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.cache import INITIAL_CACHE_FRAMES, visible_rows
from cosyvoice.transformer.precision import Convert
from matcha.models.components.past import KeyValueCache


class Qwen2Encoder(nn.Module):
    """A Qwen2 model that reads embeddings and returns its last hidden states. Its own head is not used.

    The weights start as random ones: those of a model folder's `llm.pt` hold all of them.
    """

    def __init__(self, pretrain_path: str) -> None:
        """pretrain_path: the folder CosyVoice-BlankEN, of which only `config.json` is read.

        Raises InputError if the folder or its configuration is missing, damaged or of another kind of model.
        """
        super().__init__()
        if not pretrain_path:
            raise InputError("no folder is given for pretrain_path; name the model's folder CosyVoice-BlankEN")
        config = read_qwen2_config(Path(pretrain_path))
        from transformers import Qwen2ForCausalLM  # 2 seconds

        self.model = Qwen2ForCausalLM(config)
        self.rotary_base = config.rope_parameters["rope_theta"]
        self.head_size = config.hidden_size // config.num_attention_heads
        self.key_heads = config.num_key_value_heads

    def output_size(self) -> int:
        """Return the channels of input and output."""
        return self.embed_tokens.embedding_dim

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, the first one first."""
        return self.model.model.layers

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The embedding of text tokens."""
        return self.model.model.embed_tokens

    def forward(self, xs: Tensor) -> Tensor:
        """Return the hidden states after the final norm, (B, T, C) like the input, of sequences padded at their end.

        No frame sees later ones, so padding needs no mask. What stands at padded places means nothing.
        """
        return self.model.model(inputs_embeds=xs, use_cache=False).last_hidden_state

    @torch.no_grad()
    def prepare_decoding(self, convert: Convert) -> None:
        """Give the blocks their decoding form, in place, one after the other. `forward` works no more."""
        for number in range(len(self.layers)):
            self.layers[number] = DecodingBlock(self.layers[number], convert)

    def new_cache(self, capacity: int = INITIAL_CACHE_FRAMES) -> list[KeyValueCache]:
        """Return an empty cache, one part a layer, for `forward_chunk` and `step_at`."""
        weight, sizes = self.embed_tokens.weight, (1, self.key_heads, capacity, self.head_size)
        return [KeyValueCache(weight.new_zeros(sizes), weight.new_zeros(sizes)) for _ in self.layers]

    def forward_chunk(self, xs: Tensor, cache: list[KeyValueCache], starts: Tensor | None = None) -> Tensor:
        """Read the next N frames of growing sequences, reusing all that `cache` holds.

        xs: (B, N, C). starts: (B,), where each sequence begins in a joined cache. The cache is extended. Returns
        (B, N, C), equal to the same frames of `forward` over the whole sequence.
        """
        total = cache[0].length + xs.size(1)
        places = torch.arange(cache[0].length, total, device=xs.device).unsqueeze(0)  # (1, N)
        if starts is not None:
            places = places - starts.unsqueeze(1)  # (B, N)
        mask = visible_rows(xs.size(1), total, starts, xs.device)
        return self.read(xs, places, mask, [layer_cache.append for layer_cache in cache])

    def step_at(self, x: Tensor, place: Tensor, cache: list[KeyValueCache]) -> Tensor:
        """`forward_chunk` for one frame (1, 1, C) that becomes row `place` (1,) of the cache.

        All rows take part in each step, so that a CUDA graph can repeat it. Only the caller counts the rows.
        """
        seen = (torch.arange(cache[0].capacity, device=x.device) <= place).view(1, 1, -1)
        return self.read(x, place.unsqueeze(0), seen, [partial(layer_cache.put, place) for layer_cache in cache])

    def read(self, x: Tensor, places: Tensor, mask: Tensor | None, keeps: list) -> Tensor:
        """Run the blocks over new frames (B, N, C) at `places` (B or 1, N); the rest as in `DecodingBlock.forward`."""
        turn = rotation(places, self.head_size, self.rotary_base)
        for block, keep in zip(decoding_blocks(self.layers), keeps, strict=True):
            x = block(x, turn, mask, keep)
        return rms_norm(x, self.model.model.norm)
