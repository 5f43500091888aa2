"""Sizes that all models of this generation share, and how many mel frames belong to how many speech tokens."""

SAMPLE_RATE_HZ = 22_050
MEL_HOP_SAMPLES = 256  # one mel frame
MEL_BINS = 80
TOKEN_RATE_HZ = 50  # speech tokens
SPEAKER_DIMENSIONS = 192  # of a speaker vector
OVERLAP_TOKENS = 20  # neighbouring chunks of a stream share these


def mel_frames(tokens: int, token_rate_hz: int = TOKEN_RATE_HZ) -> int:
    """Whole mel frames that fit into the duration of the tokens, e.g. 1 for 1 token and 258 for 150."""
    return tokens * SAMPLE_RATE_HZ // (token_rate_hz * MEL_HOP_SAMPLES)
