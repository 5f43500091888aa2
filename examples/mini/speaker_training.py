"""Training of the speaker encoder, and how well its vectors tell speakers apart."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.utils.audio import KALDI_MELS, kaldi_fbank
from cosyvoice.utils.command import seed_all
from cosyvoice.utils.errors import InputError
from examples.mini.encoder_training import (
    Recording,
    Training,
    augment,
    draw,
    export,
    load_features,
    read_recordings,
    wrapped,
)
from examples.mini.speaker_encoder import AdditiveMarginSoftmax, SpeakerNetwork

FRAME_RANGE = (150, 300)  # of a crop, 10 ms each
BATCH = 32
PEAK_RATE = 2e-3
# Both moderate: speakers that sound alike shall stay near each other, for the sake of voices that come later.
MARGIN, SCALE = 0.1, 16.0


class Corpus:
    """Features of the recordings, in memory."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self.recordings = recordings
        self.speakers = sorted({recording.speaker for recording in recordings})
        self.numbers = [self.speakers.index(recording.speaker) for recording in recordings]
        self.fbanks = load_features(recordings, lambda wav: kaldi_fbank(wav, subtract_mean=False).T)  # (80, T) each

    def draw_batch(self) -> tuple[Tensor, Tensor]:
        """Crops of filterbank (B, T, 80) less its mean, from various rooms, and their speakers' numbers (B,)."""
        chosen = random.sample(range(len(self.fbanks)), min(BATCH, len(self.fbanks)))
        frames = random.randint(*FRAME_RANGE)
        crops = []
        for index in chosen:
            total = self.fbanks[index].shape[1]
            crops.append(self.fbanks[index][:, wrapped(random.randrange(total), frames, total)])
        heard = augment(torch.stack(crops).float())  # (B, 80, T)
        return centred(heard), torch.tensor([self.numbers[index] for index in chosen])


def centred(log_power: Tensor) -> Tensor:
    """(B, 80, T) -> (B, T, 80) less each bin's mean over time."""
    return (log_power - log_power.mean(dim=2, keepdim=True)).transpose(1, 2)


def train(data: Sequence[Path], dev: Sequence[Path], output: Path, utterances: int, steps: int, seed: int) -> dict:
    """Writes `output` and returns how well its vectors tell the speakers of `dev` apart."""
    corpus = Corpus(draw(read_recordings(data), utterances, seed))
    if len(corpus.speakers) < 2:
        raise InputError(f"{corpus.speakers[0]} is the only speaker there; at least 2 are needed")
    dev_corpus = Corpus(read_recordings(dev))
    seed_all(seed)
    network, classifier = SpeakerNetwork(), AdditiveMarginSoftmax(len(corpus.speakers), MARGIN, SCALE)
    model = nn.ModuleList([network, classifier])
    training = Training(model, corpus.recordings, steps, seed, PEAK_RATE, output)

    def batch_loss() -> Tensor:
        fbank, speakers = corpus.draw_batch()
        return classifier(network(fbank), speakers)

    def report() -> str:
        return ", ".join(f"dev {name} {value:.3f}" for name, value in measure(network, dev_corpus).items())

    training.run(batch_loss, report)
    export(network, example_inputs, output, "output", {"input": {1: "T"}})
    training.checkpoint.unlink(missing_ok=True)
    return measure(network, dev_corpus)


def example_inputs(frames: int) -> dict[str, Tensor]:
    return {"input": torch.randn(1, frames, KALDI_MELS, generator=torch.Generator().manual_seed(frames))}


@torch.no_grad()
def measure(network: SpeakerNetwork, corpus: Corpus) -> dict[str, float]:
    """Mean cosines of two recordings of the same and of different speakers, and the rate at which errors are equal."""
    network.eval()
    vectors = [F.normalize(network(centred(fbank[None].float())))[0] for fbank in corpus.fbanks]
    cosines = torch.stack(vectors) @ torch.stack(vectors).T  # (recordings, recordings)
    numbers = torch.tensor(corpus.numbers)
    same = numbers[:, None] == numbers
    pairs = torch.ones_like(same).triu(diagonal=1)
    alike, unlike = cosines[pairs & same], cosines[pairs & ~same]
    results = {"different_cosine": unlike.mean().item()}
    if len(alike):
        results |= {"same_cosine": alike.mean().item(), "equal_error_rate": equal_error_rate(alike, unlike)}
    return results


def equal_error_rate(alike: Tensor, unlike: Tensor) -> float:
    """Where as many pairs of one speaker lie below a threshold as pairs of two lie above it."""
    thresholds = torch.cat([alike, unlike]).sort().values
    missed = torch.searchsorted(alike.sort().values, thresholds) / len(alike)
    accepted = 1 - torch.searchsorted(unlike.sort().values, thresholds) / len(unlike)
    return torch.maximum(missed, accepted).min().item()
