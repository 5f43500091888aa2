"""What the flows of both generations do alike: embed tokens and speaker, train with known mel at the start."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.precision import MANY_FRAMES, conversion
from cosyvoice.utils.mask import make_pad_mask

NO_PREFIX_PROBABILITY = 0.5
MAX_PREFIX_SHARE = 0.3  # of the clip's frames
BATCH_NAMES = ("speech_token", "speech_token_len", "speech_feat", "speech_feat_len", "embedding")


class TokenFlow(nn.Module, ABC):
    """Layers around an encoder of tokens and a decoder to mel; subclasses bring the two together."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        spk_embed_dim: int,
        output_type: str,
        vocab_size: int,
        encoder: nn.Module,
        decoder: nn.Module,
        input_frame_rate: int,
        only_mask_loss: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if output_type != "mel":
            raise InputError(f"{name}: output_type {output_type!r} is not implemented; use 'mel'")
        if not only_mask_loss:
            raise InputError(f"{name}: only_mask_loss False is not implemented; use True")
        self.input_frame_rate = input_frame_rate  # tokens a second
        self.input_embedding = nn.Embedding(vocab_size, input_size)
        self.spk_embed_affine_layer = nn.Linear(spk_embed_dim, output_size)
        self.encoder = encoder
        self.encoder_proj = nn.Linear(encoder.output_size(), output_size)
        self.decoder = decoder

    def prepare_inference(self, precision: str = "float32") -> None:
        """Give the weights that every step of the solver multiplies with their fastest form, once.

        precision: a name in `MANY_FRAMES`. Names of weights change: this is for a model that only speaks from now on.
        """
        self.decoder.prepare_inference(conversion(self, precision, MANY_FRAMES))

    def decoder_loss(
        self,
        mu: Tensor,
        feat: Tensor,
        feat_len: Tensor,
        embedding: Tensor,
        prefix_lengths: Sequence[int],
        **options: Tensor | bool | None,
    ) -> Tensor:
        """The decoder's loss over the valid mel cells; of clip i prefix_lengths[i] frames are known.

        mu and feat (B, T, 80). options: those of `ConditionalCFM.compute_loss`.
        """
        frames = feat.shape[1]
        unknown = make_pad_mask(torch.tensor(prefix_lengths, device=feat.device), frames)[:, :frames, None]
        loss, _ = self.decoder.compute_loss(
            x1=feat.transpose(1, 2),  # (B, T, M) -> (B, M, T)
            mask=~make_pad_mask(feat_len, frames)[:, None],
            mu=mu.transpose(1, 2),
            spks=self.project_speaker(embedding),
            cond=feat.masked_fill(unknown, 0.0).to(mu.dtype).transpose(1, 2),
            **options,
        )
        return loss

    @abstractmethod
    def mel_frames(self, tokens: int) -> int:
        """Return how many mel frames are made of the tokens."""

    @abstractmethod
    def whole_tokens(self, frames: int) -> int:
        """Return the most tokens of which at most `frames` mel frames are made."""

    def batch_options(self, draw: int | None = None) -> dict[str, bool]:
        """Return the options of `loss` that are the same for a whole batch; here there are none.

        They may be drawn from Python's generator. Of held-out clips `draw` counts the losses, and nothing is drawn.
        """
        return {}

    @staticmethod
    def check_inference_input(token: Tensor, prompt_token: Tensor, prompt_feat: Tensor) -> None:
        """Raise InputError for no tokens, half a prompt, or more than one utterance."""
        if token.shape[0] != 1:
            raise InputError(f"flow.inference takes one utterance at a time, not {token.shape[0]}")
        if token.shape[1] == 0:
            raise InputError("flow.inference got no speech tokens; there is nothing to synthesise")
        if (prompt_token.shape[1] == 0) != (prompt_feat.shape[1] == 0):
            raise InputError("flow.inference needs both prompt_token and prompt_feat, or neither")

    def embed(self, token: Tensor, token_len: Tensor) -> Tensor:
        """(B, N) ids, anything at padding -> (B, N, C), zero at padding."""
        padding = make_pad_mask(token_len, token.shape[1])[:, :, None]
        return self.input_embedding(token.clamp(min=0)).masked_fill(padding, 0.0)

    def project_speaker(self, embedding: Tensor) -> Tensor:
        """(B, 192) -> (B, 80); only the direction of the vector counts, and zeros leave the bias alone."""
        direction = F.normalize(embedding, dim=1)
        return self.spk_embed_affine_layer(direction.to(self.spk_embed_affine_layer.weight.dtype))


def draw_prefix_length(frames: int) -> int:
    """How many frames of a training clip are given as known: none half of the time, else up to 30 %."""
    if random.random() < NO_PREFIX_PROBABILITY:
        return 0
    return random.randint(0, int(MAX_PREFIX_SHARE * frames))
