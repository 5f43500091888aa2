"""Sizes that all models share, and how samples, mel frames and speech tokens convert."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from cosyvoice.runtime.errors import InputError

MEL_BINS = 80
SPEAKER_DIMENSIONS = 192  # of a speaker vector


class Durations(Protocol):
    """Counts of mel frames and speech tokens that last equally long: `Rates` gives them, and every flow."""

    def mel_frames(self, tokens: int) -> int:
        """Return how many whole mel frames fit into the duration of the tokens."""

    def whole_tokens(self, frames: int) -> int:
        """Return the most tokens whose mel frames number at most `frames`."""


@dataclass(frozen=True)
class Rates:
    """The rates of one model: samples and speech tokens a second, and samples a mel frame.

    CosyVoice-300M: 22050, 256 and 50, where a token lasts 1.72 frames, and conversions round. CosyVoice2: 24000, 480
    and 25, where a token lasts two frames exactly.

    Raises InputError for a rate that is not above zero, and where a token is no whole number of samples.
    """

    sample_rate: int  # Hz
    mel_hop: int  # samples
    token_rate: int  # Hz

    def __post_init__(self) -> None:
        if min(self.sample_rate, self.mel_hop, self.token_rate) <= 0:
            raise InputError(f"{self} is not possible. Give numbers above 0")
        if self.sample_rate % self.token_rate:
            raise InputError(
                f"{self.sample_rate} samples a second are no whole number for each of {self.token_rate} speech tokens. "
                "Look at sample_rate and token_frame_rate in the YAML"
            )

    @classmethod
    def of_yaml(cls, sample_rate: int, feat_extractor: Callable[..., Any], token_rate: int) -> "Rates":
        """Take the values from entries of a model's YAML.

        feat_extractor: the YAML's mel function with its settings, of which hop_size counts. token_rate: the entry
        token_frame_rate, or the flow's input_frame_rate. Raises InputError where the function has no hop_size.
        """
        settings = feat_extractor.keywords if isinstance(feat_extractor, partial) else {}
        if "hop_size" not in settings:
            raise InputError("feat_extractor in the YAML has no hop_size. Copy the entry from the model's download")
        return cls(sample_rate, settings["hop_size"], token_rate)

    @property
    def samples_per_token(self) -> int:
        return self.sample_rate // self.token_rate

    @property
    def token_mel_ratio(self) -> int | None:
        """Mel frames a token, None where that is no whole number."""
        ratio, rest = divmod(self.samples_per_token, self.mel_hop)
        return None if rest else ratio

    def mel_frames(self, tokens: int) -> int:
        """Return how many whole mel frames fit into the duration of the tokens.

        1 for 1 token and 258 for 150 of CosyVoice-300M; two a token for CosyVoice2.
        """
        return tokens * self.samples_per_token // self.mel_hop

    def whole_tokens(self, frames: int) -> int:
        """Return the most tokens whose mel frames number at most `frames`: the inverse of `mel_frames`."""
        return ((frames + 1) * self.mel_hop - 1) // self.samples_per_token

    def tokens(self, samples: int) -> int:
        """Return how many tokens cover the samples: the last one may begin with a few of them."""
        return -(-samples // self.samples_per_token)

    def token_samples(self, tokens: int) -> int:
        return tokens * self.samples_per_token

    def frame_samples(self, frames: int) -> int:
        return frames * self.mel_hop
