"""The language model from text to speech tokens (CosyVoice, Du et al., 2024, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.llm.speech_token_lm import Sampler, SpeechTokenLM
from cosyvoice.transformer.decoding import prepare_stack
from cosyvoice.transformer.encoder import ConformerEncoder, TransformerEncoder
from cosyvoice.transformer.precision import Convert
from cosyvoice.utils.common import IGNORE_ID, pad_list


class TransformerLM(SpeechTokenLM):
    """Predicts the speech tokens that follow: start, speaker, encoded text, task mark.

    Id `speech_token_size` ends the speech. The speaker vector is normalised before its projection.

    `takes` helps a model that loses its way now and then: of so many takes of a text the likeliest is spoken.
    """

    def __init__(
        self,
        text_encoder_input_size: int,
        llm_input_size: int,
        llm_output_size: int,
        text_token_size: int,
        speech_token_size: int,
        text_encoder: ConformerEncoder,
        llm: TransformerEncoder,
        sampling: Sampler,
        length_normalized_loss: bool = True,
        lsm_weight: float = 0.0,
        spk_embed_dim: int = 192,
        takes: int = 1,
    ) -> None:
        super().__init__(speech_token_size, 1, sampling, length_normalized_loss, lsm_weight, takes)
        self.text_embedding = nn.Embedding(text_token_size, text_encoder_input_size)
        self.text_encoder = text_encoder
        self.text_encoder_affine_layer = nn.Linear(text_encoder.output_size(), llm_input_size)
        self.llm_embedding = nn.Embedding(2, llm_input_size)
        self.llm = llm
        self.llm_decoder = nn.Linear(llm_output_size, speech_token_size + 1)
        self.speech_embedding = nn.Embedding(speech_token_size, llm_input_size)
        self.spk_embed_affine_layer = nn.Linear(spk_embed_dim, llm_input_size)

    def encode(self, text: Tensor, text_lengths: Tensor) -> Tensor:
        """text: (B, T) ids, text_lengths: (B,). Returns (B, T, C), the text as the language model reads it."""
        encoded, _ = self.text_encoder(self.text_embedding(text), text_lengths, decoding_chunk_size=1)
        return self.text_encoder_affine_layer(encoded)

    def project_speaker(self, embedding: Tensor) -> Tensor:
        """embedding: (B, 192) -> (B, 1, C). A zero vector stays zero before the projection."""
        dtype = self.spk_embed_affine_layer.weight.dtype
        return self.spk_embed_affine_layer(F.normalize(embedding, dim=1).to(dtype)).unsqueeze(1)

    def predictions(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of all N speech and end tokens: scores (N, V), the tokens (N,), their items of the batch (N,)."""
        text, text_lengths = batch["text_token"].to(device), batch["text_token_len"].to(device)
        speech, speech_lengths = batch["speech_token"].to(device), batch["speech_token_len"].to(device)
        text_embeddings = self.encode(text, text_lengths)
        speaker = self.project_speaker(batch["embedding"].to(device))
        lm_input, lm_lengths = self.join(text_embeddings, text_lengths, speaker, speech, speech_lengths)
        target = self.targets(text_lengths, speech, speech_lengths)
        lm_output, _ = self.llm(lm_input, lm_lengths)
        counted = target != IGNORE_ID  # the head is applied only where a token is asked
        return self.llm_decoder(lm_output[counted]).float(), target[counted], counted.nonzero()[:, 0]

    def join(
        self, text: Tensor, text_lengths: Tensor, speaker: Tensor, speech: Tensor, speech_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lay out each item as start, speaker, text, task mark, speech tokens, and pad anew.

        text: (B, T, C), speaker: (B, 1, C), speech: (B, S) ids. Returns (B, L, C) and lengths (B,) = 3 + text + speech.
        """
        sos, task = self.llm_embedding.weight.unsqueeze(1)  # (1, C) each
        speech_embeddings = self.speech_embedding(speech.clamp(min=0))
        items = [
            torch.cat((sos, speaker[i], text[i, : text_lengths[i]], task, speech_embeddings[i, : speech_lengths[i]]))
            for i in range(text.size(0))
        ]
        lengths = torch.tensor([len(item) for item in items], device=text.device)
        return pad_list(items, IGNORE_ID), lengths

    def targets(self, text_lengths: Tensor, speech: Tensor, speech_lengths: Tensor) -> Tensor:
        """(B, L): nothing is asked while the text is read; the task mark asks for the first speech token."""
        items = []
        for text_length, tokens, length in zip(text_lengths.tolist(), speech, speech_lengths.tolist(), strict=True):
            spoken = F.pad(tokens[:length].long(), (2 + text_length, 0), value=IGNORE_ID)
            items.append(F.pad(spoken, (0, 1), value=self.speech_token_size))
        return pad_list(items, IGNORE_ID)

    def prepare_stack(self, convert: Convert) -> None:
        prepare_stack(self.llm, convert)

    def inference_prefix(
        self, text: Tensor, prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor
    ) -> Tensor:
        """What is read before the first new token, (1, L, C); arguments as in `inference`."""
        whole_text = torch.cat((prompt_text, text), dim=1)
        encoded = self.encode(whole_text, torch.tensor([whole_text.size(1)], device=text.device))
        sos, task = self.llm_embedding.weight.view(2, 1, 1, -1)  # (1, 1, C) each
        speaker = self.project_speaker(embedding).transpose(0, 1)  # (0 or 1, 1, C) -> (1, 0 or 1, C)
        return torch.cat((sos, speaker, encoded, task, self.speech_embedding(prompt_speech_token)), dim=1)
