"""Sizes that all models share, and conversions between samples, mel frames and speech tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from cosyvoice.runtime.errors import InputError

MEL_BINS = 80
SPEAKER_DIMENSIONS = 192  # of a speaker vector


class Durations(Protocol):
    """A conversion between mel frames and speech tokens of equal duration, which `Rates` and every flow have."""

    def mel_frames(self, tokens: int) -> int:
        """Return how many whole mel frames fit into the duration of the tokens."""

    def whole_tokens(self, frames: int) -> int:
        """Return the most tokens whose mel frames number at most `frames`."""


@dataclass(frozen=True)
class Rates:
    """The rates of one model: samples per second, samples per mel frame and speech tokens per second.

    CosyVoice-300M has 22050, 256 and 50: a token lasts 1.72 frames, and conversions round. CosyVoice2 has 24000, 480
    and 25: a token lasts exactly two frames.

    Raises InputError if a rate is not above zero, or if a token is not a whole number of samples.
    """

    sample_rate: int  # Hz
    mel_hop: int  # samples
    token_rate: int  # Hz

    def __post_init__(self) -> None:
        if min(self.sample_rate, self.mel_hop, self.token_rate) <= 0:
            raise InputError(f"{self} is not possible. Give numbers above 0")
        if self.sample_rate % self.token_rate:
            raise InputError(
                f"{self.sample_rate} samples a second cannot be divided into {self.token_rate} speech tokens. "
                "Correct sample_rate or token_frame_rate in the YAML"
            )

    @classmethod
    def of_yaml(cls, sample_rate: int, feat_extractor: Callable[..., Any], token_rate: int) -> "Rates":
        """Return the rates of a model's YAML.

        feat_extractor: the YAML's mel function with its settings, of which hop_size is used. token_rate: the entry
        token_frame_rate, or the flow's input_frame_rate. Raises InputError if the function has no hop_size.
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
        """Return the mel frames per token, or None if that is not a whole number."""
        ratio, rest = divmod(self.samples_per_token, self.mel_hop)
        return None if rest else ratio

    def mel_frames(self, tokens: int) -> int:
        """Return how many whole mel frames fit into the duration of the tokens.

        For CosyVoice-300M that is 1 for 1 token and 258 for 150; for CosyVoice2 two per token.
        """
        return tokens * self.samples_per_token // self.mel_hop

    def whole_tokens(self, frames: int) -> int:
        """Return the most tokens whose mel frames number at most `frames`: the inverse of `mel_frames`."""
        return ((frames + 1) * self.mel_hop - 1) // self.samples_per_token

    def tokens(self, samples: int) -> int:
        """Return how many tokens cover the samples; the last one may be covered only in part."""
        return -(-samples // self.samples_per_token)

    def token_samples(self, tokens: int) -> int:
        return tokens * self.samples_per_token

    def frame_samples(self, frames: int) -> int:
        return frames * self.mel_hop
