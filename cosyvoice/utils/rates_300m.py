"""The rates of CosyVoice-300M, for its own modules only. All others take theirs from the model folder."""

from cosyvoice.utils.frames import Rates

SAMPLE_RATE_HZ = 22_050
MEL_HOP_SAMPLES = 256  # one mel frame
TOKEN_RATE_HZ = 50  # speech tokens
OVERLAP_TOKENS = 20  # that neighbouring chunks of a stream share


def mel_frames(tokens: int, token_rate_hz: int = TOKEN_RATE_HZ) -> int:
    """Return how many whole mel frames fit into the duration of the tokens, for example 258 for 150 tokens."""
    return rates_at(token_rate_hz).mel_frames(tokens)


def rates_at(token_rate_hz: int) -> Rates:
    """Return the rates for the given number of speech tokens a second, the flow's `input_frame_rate`."""
    return Rates(SAMPLE_RATE_HZ, MEL_HOP_SAMPLES, token_rate_hz)
