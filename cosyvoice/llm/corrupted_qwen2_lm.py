"""CosyVoice2's language model in a training that makes it recover from its own mistakes."""

from typing import Any

from torch import Tensor

from cosyvoice.llm.corruption import checked_share, corrupted
from cosyvoice.llm.qwen2_lm import BISTREAM_SHARE, Qwen2LM


class CorruptedQwen2LM(Qwen2LM):
    """A `Qwen2LM` that reads mistakes while it trains. Its weights are those of a `Qwen2LM`."""

    def __init__(
        self, *arguments: Any, input_corruption: float, bistream_share: float = BISTREAM_SHARE, **options: Any
    ) -> None:
        """input_corruption: share of the speech tokens that are read as random ones in training.

        bistream_share: of the clips, in which text and speech take turns.
        """
        super().__init__(*arguments, **options)
        self.input_corruption = checked_share(input_corruption)
        self.bistream_share = bistream_share

    def heard(self, speech: Tensor) -> Tensor:
        return corrupted(speech, self.input_corruption if self.training else 0.0, self.speech_token_size)
