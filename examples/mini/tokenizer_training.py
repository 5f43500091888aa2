"""Train the speech tokenizer, and measure how good its tokens are."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.command import seed_all
from cosyvoice.runtime.errors import InputError
from cosyvoice.transformer.convnext import ConvNeXtBlock
from cosyvoice.utils.audio import MAX_PROMPT_SECONDS, PROMPT_RATE_HZ, WHISPER_MELS, load_wav, whisper_log_mel
from cosyvoice.utils.frames import MEL_BINS, Rates
from examples.mini.encoder_files import export, round_weights
from examples.mini.encoder_training import Recording, Training, bfloat16_where_fast, draw, read_recordings
from examples.mini.speech_tokenizer import (
    CHANNELS,
    FIRST_BLOCKS,
    NUMBERS,
    WHISPER_RATE,
    Encoder,
    TokenizerFile,
    levels_of,
)
from examples.mini.whisper_encoder import BLOCKS, WIDTH, To80Bins, WhisperEncoder

CROP_SECONDS = 2.0
BATCH = 16
PEAK_RATE = 1.5e-3
MEL_MEAN, MEL_SPREAD = -6.0, 2.3  # of log-mel, about
SPEAKER_SIZE = 64
TEXT_BLOCKS, MEL_BLOCKS, FEATURE_BLOCKS = 2, 5, 3
FEATURE_WEIGHT = 0.3


@dataclass
class Utterance:
    """The outputs of the frozen networks for one whole recording, in float16."""

    start: Tensor  # (T, WIDTH), of Whisper's first blocks
    features: Tensor  # (T, WIDTH), of Whisper's whole encoder
    mel: Tensor  # (80, M)


class Corpus:
    """The recordings in memory; those too short for a crop are left out. Raises InputError if none is left."""

    def __init__(self, recordings: Sequence[Recording], recipe: ModelFolder) -> None:
        start, whole = whisper_start(), WhisperEncoder.pretrained(BLOCKS)
        to_80_bins, self.rates = To80Bins(), recipe.rates
        feat_extractor = recipe.parts(["feat_extractor"])["feat_extractor"]
        progress = tqdm(recordings, desc="features", unit="utt", disable=None)
        read = [
            (recording, listen(recording.wav, to_80_bins, start, whole, self.rates, feat_extractor))
            for recording in progress
        ]
        least = round(CROP_SECONDS * WHISPER_RATE)
        long_enough = [(recording, utterance) for recording, utterance in read if len(utterance.start) >= least]
        if not long_enough:
            raise InputError(f"no recording lasts {CROP_SECONDS:g} s. Give folders with longer ones")
        self.recordings, self.utterances = map(list, zip(*long_enough, strict=True))

    def draw_batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return crops: start and features (B, T, WIDTH), mel (B, 80, M), and mel of other places (B, 80, M)."""
        chosen = random.sample(self.utterances, min(BATCH, len(self.utterances)))
        crops = [crop(utterance, self.rates) for utterance in chosen]
        return tuple(torch.stack([part.float() for part in parts]) for parts in zip(*crops, strict=True))


def whisper_start() -> WhisperEncoder:
    """Return Whisper's first blocks with weights of 8 bits, as the tokenizer's file has them."""
    start = WhisperEncoder.pretrained(FIRST_BLOCKS)
    round_weights(start)
    return start


@torch.no_grad()
def listen(
    wav: Path,
    to_80_bins: To80Bins,
    start: WhisperEncoder,
    whole: WhisperEncoder,
    rates: Rates,
    feat_extractor: Callable[[Tensor], Tensor],
) -> Utterance:
    """Return the outputs of the frozen networks for the first 30 s, and the mel. Raises InputError for bad audio."""
    speech = load_wav(wav, PROMPT_RATE_HZ)[:, : MAX_PROMPT_SECONDS * PROMPT_RATE_HZ]
    log_mel = to_80_bins(whisper_log_mel(speech))
    with bfloat16_where_fast():  # what is only a target
        features = whole(log_mel)[0].half()
    return Utterance(start(log_mel)[0].half(), features, flow_mel(wav, feat_extractor, rates)[0].half())


def flow_mel(wav: Path, feat_extractor: Callable[[Tensor], Tensor], rates: Rates) -> Tensor:
    """Return the log-mel (1, 80, T) that the flow is to make, shifted and scaled to about unit variance."""
    return (feat_extractor(load_wav(wav, rates.sample_rate)) - MEL_MEAN) / MEL_SPREAD


def crop(utterance: Utterance, rates: Rates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same 2 s of start, features and mel, and a mel of 2 s from anywhere in the utterance."""
    tokens, frames_a_token = round(CROP_SECONDS * rates.token_rate), WHISPER_RATE // rates.token_rate
    frames = rates.mel_frames(tokens)
    first = random.randint(0, len(utterance.start) // frames_a_token - tokens)
    heard = slice(first * frames_a_token, (first + tokens) * frames_a_token)
    last = max(utterance.mel.shape[1] - frames, 0)
    begin, elsewhere = min(rates.mel_frames(first), last), random.randint(0, last)
    missing = max(frames - utterance.mel.shape[1], 0)
    mels = (F.pad(utterance.mel[:, at : at + frames], (0, missing)) for at in (begin, elsewhere))
    return utterance.start[heard], utterance.features[heard], *mels


class Model(nn.Module):
    """The tokenizer's encoder, and three networks that make its tokens tell what is said, and not by whom.

    `speaker` sums up another piece of the recording. `decoder` predicts the mel from tokens and speaker. `features`
    predicts the output of Whisper's whole encoder from the tokens alone.
    """

    def __init__(self, codes: int, token_rate: int) -> None:
        super().__init__()
        self.encoder = Encoder(levels_of(codes), token_rate)
        self.speaker = SpeakerSummary()
        self.decoder = MelDecoder(NUMBERS)
        self.features = nn.Sequential(
            nn.Linear(NUMBERS, CHANNELS),
            *(ConvNeXtBlock(CHANNELS) for _ in range(FEATURE_BLOCKS)),
            nn.Linear(CHANNELS, self.encoder.frames * WIDTH),
        )
        self.feature_norm = nn.BatchNorm1d(WIDTH, affine=False)

    def losses(self, start: Tensor, features: Tensor, mel: Tensor, elsewhere: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss, unweighted; shapes as Corpus.draw_batch gives them."""
        quantised = self.encoder(start)  # (B, N, D)
        target = self.feature_norm(features.transpose(1, 2)).transpose(1, 2)  # (B, T, WIDTH)
        # (B, N, F C) -> (B, N F, C), of which the last frames may lie behind the end
        predicted = self.features(quantised).unflatten(2, (-1, WIDTH)).flatten(1, 2)[:, : target.shape[1]]
        return {
            "mel": (self.decoder(quantised, self.speaker(elsewhere), mel.shape[2]) - mel).abs().mean(),
            "features": F.mse_loss(predicted, target),
            "change": (quantised[:, 1:] - quantised[:, :-1]).abs().mean(),
        }


class SpeakerSummary(nn.Module):
    """A vector of SPEAKER_SIZE numbers from a mel: two convolutions, mean and spread over time."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Sequential(nn.Conv1d(MEL_BINS, 128, 5), nn.GELU(), nn.Conv1d(128, 128, 5), nn.GELU())
        self.project = nn.Linear(256, SPEAKER_SIZE)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, 80, T) -> (B, SPEAKER_SIZE)."""
        hidden = self.frames(mel)
        return self.project(torch.cat([hidden.mean(dim=2), hidden.std(dim=2)], dim=1))


class MelDecoder(nn.Module):
    """Tokens and speaker to mel: blocks at the tokens' rate, then at the mel's."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dimensions, CHANNELS)
        self.tokens = nn.ModuleList(ConvNeXtBlock(CHANNELS, SPEAKER_SIZE) for _ in range(TEXT_BLOCKS))
        self.frames = nn.ModuleList(ConvNeXtBlock(CHANNELS, SPEAKER_SIZE) for _ in range(MEL_BLOCKS))
        self.to_mel = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, MEL_BINS))

    def forward(self, quantised: Tensor, speaker: Tensor, frames: int) -> Tensor:
        """(B, N, D) and (B, SPEAKER_SIZE) -> (B, 80, frames)."""
        hidden = self.embed(quantised)
        for block in self.tokens:
            hidden = block(hidden, speaker)
        hidden = F.interpolate(hidden.transpose(1, 2), frames, mode="linear").transpose(1, 2)  # (B, N, C) -> (B, T, C)
        for block in self.frames:
            hidden = block(hidden, speaker)
        return self.to_mel(hidden).transpose(1, 2)


def train(
    recipe: Path,
    data: Sequence[Path],
    dev: Sequence[Path],
    output: Path,
    utterances: int,
    steps: int,
    pull: float,
    seed: int,
) -> dict:
    """Train, write `output`, and return how good its tokens are on `dev`.

    recipe: the folder whose YAML tells how many tokens there are, and how many of them a second. pull: weight of the
    mean distance of neighbouring tokens in the loss. Raises InputError for bad corpora.
    """
    folder = ModelFolder(recipe)
    codes = folder.parts(["speech_token_size"])["speech_token_size"]
    train_corpus = Corpus(draw(read_recordings(data), utterances, seed), folder)
    dev_corpus = Corpus(read_recordings(dev), folder)
    seed_all(seed)
    model = Model(codes, folder.rates.token_rate)
    settings = {"codes": codes, "token_rate": folder.rates.token_rate, "pull": pull}
    training = Training(model, train_corpus.recordings, steps, seed, PEAK_RATE, output, settings)

    def batch_loss() -> Tensor:
        terms = model.losses(*train_corpus.draw_batch())
        return terms["mel"] + FEATURE_WEIGHT * terms["features"] + pull * terms["change"]

    def report() -> str:
        return ", ".join(f"dev {name} {value:.3f}" for name, value in measure(model, dev_corpus).items())

    training.run(batch_loss, report)
    round_weights(model.encoder)  # as the file has them
    file = TokenizerFile(whisper_start(), model.encoder)
    export(file, example_inputs, output, "indices", {"feats": {2: "T"}, "indices": {1: "N"}})
    training.checkpoint.unlink(missing_ok=True)
    return measure(model, dev_corpus) | speaker_leak(model, train_corpus, dev_corpus)


def example_inputs(frames: int) -> dict[str, Tensor]:
    return {
        "feats": torch.randn(1, WHISPER_MELS, frames, generator=torch.Generator().manual_seed(frames)),
        "feats_length": torch.tensor([frames], dtype=torch.int32),
    }


@torch.no_grad()
def codes_of(model: Model, utterance: Utterance) -> Tensor:
    """Return the codes (N,) of one recording."""
    model.eval()
    return model.encoder.quantiser.indices(model.encoder(utterance.start[None].float()))[0].long()


@torch.no_grad()
def measure(model: Model, corpus: Corpus) -> dict[str, float]:
    """Return the losses on whole recordings, the perplexity of the codes, and the share of codes that repeat."""
    model.eval()
    codes, terms = [], []
    for utterance in corpus.utterances:
        codes.append(codes_of(model, utterance))
        mel = utterance.mel[None].float()
        terms.append(model.losses(utterance.start[None].float(), utterance.features[None].float(), mel, mel))
    shares = torch.bincount(torch.cat(codes), minlength=model.encoder.quantiser.codes) / sum(map(len, codes))
    used = shares[shares > 0]
    repeats = sum(int((of_one[1:] == of_one[:-1]).sum()) for of_one in codes) / sum(len(of_one) - 1 for of_one in codes)
    means = {name: float(torch.stack([term[name] for term in terms]).mean()) for name in ("mel", "features")}
    return means | {"perplexity": math.exp(-float((used * used.log()).sum())), "repeats": repeats}


def speaker_leak(model: Model, train_corpus: Corpus, dev: Corpus) -> dict[str, float]:
    """Return how often the token alone tells the speaker on `dev`, and how often a blind guess would.

    The guess for a token is the speaker who says it most often in `train_corpus`.
    """
    speakers = sorted({recording.speaker for recording in train_corpus.recordings})
    counts = torch.zeros(model.encoder.quantiser.codes, len(speakers))
    for recording, utterance in zip(train_corpus.recordings, train_corpus.utterances, strict=True):
        codes = codes_of(model, utterance)
        counts[:, speakers.index(recording.speaker)] += torch.bincount(codes, minlength=len(counts))
    counts /= counts.sum(dim=0).clamp(min=1)  # every speaker as likely
    right, total = 0, 0
    for recording, utterance in zip(dev.recordings, dev.utterances, strict=True):
        guesses = counts[codes_of(model, utterance)].argmax(dim=1)
        right += sum(speakers[guess] == recording.speaker for guess in guesses.tolist())
        total += len(guesses)
    return {"speaker_from_token": right / total, "speaker_by_chance": 1 / len(speakers)}
