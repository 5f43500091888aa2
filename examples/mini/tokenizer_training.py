"""Training of the speech tokenizer, and what its tokens are worth."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.utils.audio import WHISPER_MELS, whisper_log_mel
from cosyvoice.utils.command import seed_all
from cosyvoice.utils.errors import InputError
from examples.mini.encoder_training import (
    LN10,
    Recording,
    Training,
    augment,
    draw,
    export,
    load_features,
    read_recordings,
    wrapped,
)
from examples.mini.speech_tokenizer import CODES, STRIDE, ScalarQuantiser, Tokenizer, TokenizerFile, token_phones

CROP_TOKENS = 125  # 2.5 s
BATCH = 16
PEAK_RATE = 3e-3
WARP_RANGE = (0.92, 1.09)
NEPERS_PER_UNIT = 4 * LN10  # Whisper's features are (log10 power + 4) / 4


class Corpus:
    """Features and phones of the recordings, in memory."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self.recordings = recordings
        self.feats = [
            feats[:, : feats.shape[1] // STRIDE * STRIDE]  # whole tokens, (128, 2 N)
            for feats in load_features(recordings, lambda wav: whisper_log_mel(wav)[0])
        ]
        self.phones = [
            token_phones(recording.wav.with_suffix(".phones"), feats.shape[1] // STRIDE)  # (N,)
            for recording, feats in zip(recordings, self.feats, strict=True)
        ]

    def draw_batch(self) -> tuple[Tensor, Tensor]:
        """Crops of log-mel (B, 128, 2 N), changed as other voices and rooms would, and their phones (B, N)."""
        feats, phones = [], []
        for index in random.sample(range(len(self.feats)), min(BATCH, len(self.feats))):
            tokens = len(self.phones[index])
            start = random.randrange(tokens)
            feats.append(self.feats[index][:, wrapped(STRIDE * start, STRIDE * CROP_TOKENS, STRIDE * tokens)])
            phones.append(self.phones[index][wrapped(start, CROP_TOKENS, tokens)])
        log_mel = torch.stack(feats).float()
        warped = warp_bins(log_mel, torch.empty(len(feats)).uniform_(*WARP_RANGE))
        return augment(warped * NEPERS_PER_UNIT) / NEPERS_PER_UNIT, torch.stack(phones)


def train(data: Sequence[Path], dev: Sequence[Path], output: Path, utterances: int, steps: int, seed: int) -> dict:
    """Writes `output` and returns what its tokens are worth on `dev`."""
    train_corpus = Corpus(draw(labelled(data), utterances, seed))
    dev_corpus = Corpus(labelled(dev))
    seed_all(seed)
    model = Tokenizer()
    training = Training(model, train_corpus.recordings, steps, seed, PEAK_RATE, output)

    def batch_loss() -> Tensor:
        feats, phones = train_corpus.draw_batch()
        return F.cross_entropy(model(feats).transpose(1, 2), phones)  # (B, N, phones) -> (B, phones, N)

    def report() -> str:
        results = measure(model, dev_corpus)
        return f"dev phone accuracy {results['phone_accuracy']:.3f}, {results['codes_used']} codes in use"

    training.run(batch_loss, report)
    export(TokenizerFile(model), example_inputs, output, "indices", {"feats": {2: "T"}, "indices": {1: "N"}})
    training.checkpoint.unlink(missing_ok=True)
    return measure(model, dev_corpus) | speaker_leak(model, train_corpus, dev_corpus)


def labelled(folders: Sequence[Path]) -> list[Recording]:
    """Those that have .phones. Raises InputError where there are none."""
    recordings = [r for r in read_recordings(folders) if r.wav.with_suffix(".phones").is_file()]
    if not recordings:
        raise InputError(f"{', '.join(map(str, folders))}: no recording has .phones beside it; use make_corpus.py")
    return recordings


def example_inputs(frames: int) -> dict[str, Tensor]:
    return {
        "feats": torch.randn(1, WHISPER_MELS, frames, generator=torch.Generator().manual_seed(frames)),
        "feats_length": torch.tensor([frames], dtype=torch.int32),
    }


def warp_bins(feats: Tensor, factors: Tensor) -> Tensor:
    """(B, bins, T) with bin b taken from b times the item's factor (B,), as shorter or longer vocal tracts sound."""
    bins = feats.shape[1]
    source = (torch.arange(bins) * factors[:, None]).clamp(max=bins - 1)  # (B, bins)
    below = source.long().clamp(max=bins - 2)
    share = (source - below)[:, :, None]
    pick = below[:, :, None].expand(-1, -1, feats.shape[2])
    return feats.gather(1, pick) * (1 - share) + feats.gather(1, pick + 1) * share


@torch.no_grad()
def tokens_of(model: Tokenizer, feats: Tensor) -> tuple[Tensor, Tensor]:
    """Of one recording (128, T): codes (N,), and the phones (N,) that are read from them."""
    model.eval()
    quantised = model.encode(feats[None].float())  # (1, N, DIMENSIONS)
    return ScalarQuantiser.indices(quantised)[0], model.to_phones(quantised)[0].argmax(dim=1)


def measure(model: Tokenizer, corpus: Corpus) -> dict[str, float]:
    """Share of tokens whose phone is found, codes in use, and how many equally frequent ones would tell as much."""
    codes, found = map(torch.cat, zip(*(tokens_of(model, feats) for feats in corpus.feats), strict=True))
    counts = torch.bincount(codes, minlength=CODES)
    shares = counts[counts > 0] / counts.sum()
    return {
        "phone_accuracy": (found == torch.cat(corpus.phones)).float().mean().item(),
        "codes_used": int((counts > 0).sum()),
        "perplexity": math.exp(-(shares * shares.log()).sum().item()),
    }


def speaker_leak(model: Tokenizer, train_corpus: Corpus, dev: Corpus) -> dict[str, float]:
    """How often each token's most frequent speaker in `train_corpus` is right on `dev`, and what guessing gives."""
    speakers = sorted({recording.speaker for recording in train_corpus.recordings})
    counts = torch.zeros(CODES, len(speakers))
    for recording, feats in zip(train_corpus.recordings, train_corpus.feats, strict=True):
        codes, _ = tokens_of(model, feats)
        counts[:, speakers.index(recording.speaker)] += torch.bincount(codes, minlength=CODES)
    counts /= counts.sum(dim=0).clamp(min=1)  # every speaker as likely
    right, total = 0, 0
    for recording, feats in zip(dev.recordings, dev.feats, strict=True):
        codes, _ = tokens_of(model, feats)
        guesses = counts[codes.long()].argmax(dim=1)
        right += sum(speakers[guess] == recording.speaker for guess in guesses.tolist())
        total += len(codes)
    return {"speaker_from_token": right / total, "speaker_by_chance": 1 / len(speakers)}
