#!/usr/bin/env python3
"""Make a corpus of synthetic speech for CosyVoice-mini, in Kaldi-style folders.

    examples/mini/make_corpus.py --des_dir data/mini/texts --utterances 500

Writes wav/UTT.wav, wav/UTT.phones (lines "end_seconds phone", if the engine gives them), and train/ and dev/ with
wav.scp, text, utt2spk, spk2utt and make_corpus.failed. Every utterance of a run has its own sentence, and none is a
sentence of the evaluation. An utterance's name is a hash of its speaker and text, so a second run makes only what is
missing.
"""

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosyvoice.tokenizer.phones import PhoneTokenizer
    from examples.mini.voices import Voice

ROOT = Path(__file__).resolve().parents[2]
BATCH_UTTERANCES = 25  # a killed run loses at most this many per process
MIN_SECONDS = 0.3  # shorter: the engine gave up on the sentence
WARP_RANGE = (0.88, 1.14)  # on pitch and formants together, as between tall and short speakers
TEMPO_RANGE = (0.88, 1.15)


@dataclass(frozen=True)
class Speaker:
    """A voice, or a pseudo-speaker made from a voice."""

    name: str
    voice: str
    warp: float = 1.0  # factor on pitch and formants
    tempo: float = 1.0  # factor on the speaking rate

    @property
    def effects(self) -> list[str]:
        """Return the sox effects that turn the voice into the speaker; none if they are the same."""
        if self.warp == self.tempo == 1:
            return []
        return ["speed", f"{self.warp:.3f}", "tempo", "-s", f"{self.tempo / self.warp:.4f}"]  # speed changes both


@dataclass(frozen=True)
class Utterance:
    speaker: Speaker
    text: str

    @property
    def name(self) -> str:
        content = f"{self.speaker} {self.text}"
        return f"{self.speaker.name}_{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def main(argv: Sequence[str] | None = None) -> None:
    from cosyvoice.runtime.command import check_least
    from cosyvoice.tokenizer.phones import PhoneTokenizer
    from utils import add_seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--des_dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--utterances", type=int, default=500, help="to train on, per speaker (default: %(default)s)")
    parser.add_argument("--dev_utterances", type=int, default=10, help="held out, per speaker (default: %(default)s)")
    parser.add_argument("--voices", nargs="+", help="names of voices (default: all of flite, festival and espeak-ng)")
    parser.add_argument("--lexicon", type=Path, help="of make_lexicon.py; leaves out sentences with other words")
    parser.add_argument("--variants", type=int, default=0, help="pseudo-speakers per voice (default: %(default)s)")
    sources = ("grammar", "wordnet", "both")
    parser.add_argument("--sentences", choices=sources, default="grammar", help="default: %(default)s")
    parser.add_argument("--num_processes", type=int, default=2, help="engines at a time (default: %(default)s)")
    add_seed(parser)
    options = parser.parse_args(argv)
    for name in ("utterances", "dev_utterances", "num_processes"):
        check_least(f"--{name}", getattr(options, name))
    folder = options.des_dir.absolute()
    speakers = make_speakers(options.voices, options.variants, options.seed)
    total = len(speakers) * (options.dev_utterances + options.utterances)
    tokenizer = options.lexicon and PhoneTokenizer(options.lexicon)
    utterances = make_utterances(speakers, total, options.seed, options.sentences, tokenizer)
    failures = synthesise(utterances, folder / "wav", options.num_processes, tokenizer)
    held_out = len(speakers) * options.dev_utterances  # first, so that more utterances do not change which are held out
    for split, part in {"dev": utterances[:held_out], "train": utterances[held_out:]}.items():
        write_split(part, failures, folder, split)


def make_speakers(voices: Sequence[str] | None, variants: int, seed: int) -> list[Speaker]:
    """Return the voices and `variants` pseudo-speakers of each. Raises InputError for unknown or missing voices."""
    import random

    from examples.mini.voices import VOICES, check_program

    if variants:
        check_program("sox")
    speakers = []
    for voice in voices or VOICES:
        find_voice(voice).check()
        draw = random.Random(f"{seed} {voice}")  # per voice, so that a voice's variants do not depend on the others
        speakers.append(Speaker(voice, voice))
        for number in range(1, variants + 1):
            warp, tempo = round(draw.uniform(*WARP_RANGE), 3), round(draw.uniform(*TEMPO_RANGE), 3)
            speakers.append(Speaker(f"{voice}-{number}", voice, warp, tempo))
    return speakers


def find_voice(name: str) -> "Voice":
    """Return an engine's voice, one of Kokoro's, or mix1, mix2, ... Raises InputError for other names."""
    import re

    from cosyvoice.runtime.errors import InputError
    from examples.mini.kokoro import NAMES, Kokoro
    from examples.mini.voices import VOICES

    if name in NAMES or re.fullmatch(r"mix\d+", name):
        return Kokoro(name)
    if name not in VOICES:
        raise InputError(f"--voices {name} is not known. Use some of {', '.join((*VOICES, *NAMES))}, mix1, mix2, ...")
    return VOICES[name]


def make_utterances(
    speakers: Sequence[Speaker],
    total: int,
    seed: int,
    source: str = "grammar",
    tokenizer: "PhoneTokenizer | None" = None,
) -> list[Utterance]:
    """Return `total` different sentences, spoken by the speakers in turn.

    source: "grammar", "wordnet", or "both" in turn. tokenizer: leave out sentences with words that its lexicon lacks.
    """
    from examples.mini.sentences import JUDGED, Exclusion, draw_examples, draw_sentences, read_examples, read_sentences

    exclusion = Exclusion(read_sentences(JUDGED), tokenizer)
    drawn = []
    if source != "wordnet":
        drawn.append(draw_sentences(seed, exclusion))
    if source != "grammar":
        drawn.append(draw_examples(seed, exclusion, read_examples()))
    sentences = islice(chain.from_iterable(zip(*drawn, strict=False)), total)
    return [Utterance(speakers[number % len(speakers)], text) for number, text in enumerate(sentences)]


def synthesise(
    utterances: Sequence[Utterance], wavs: Path, processes: int, tokenizer: "PhoneTokenizer | None" = None
) -> dict[str, str]:
    """Make the missing recordings. Return {utterance: reason} of those that could not be made."""
    from tqdm import tqdm

    from utils import check_writable, in_parallel

    check_writable(wavs)
    by_speaker: dict[Speaker, list[Utterance]] = {}
    for utterance in utterances:
        if not (wavs / f"{utterance.name}.wav").is_file():
            by_speaker.setdefault(utterance.speaker, []).append(utterance)
    batches = [
        part[start : start + BATCH_UTTERANCES]
        for part in by_speaker.values()
        for start in range(0, len(part), BATCH_UTTERANCES)
    ]
    failures: dict[str, str] = {}
    missing = sum(map(len, batches))
    with tqdm(total=len(utterances), initial=len(utterances) - missing, unit="utt") as progress:
        spoken = in_parallel(lambda batch: speak(batch, wavs, tokenizer), batches, processes)
        for batch, failed in zip(batches, spoken, strict=True):
            failures |= failed
            progress.update(len(batch))
    return failures


def speak(batch: Sequence[Utterance], wavs: Path, tokenizer: "PhoneTokenizer | None" = None) -> dict[str, str]:
    """Write recordings and phones of one speaker's utterances. Return {utterance: reason} of those that failed."""
    import soundfile

    from examples.mini.voices import apply_effects

    speaker, failures = batch[0].speaker, {}
    with tempfile.TemporaryDirectory(dir=wavs, prefix=".speaking-") as temporary:
        texts = {utterance.name: utterance.text for utterance in batch}
        find_voice(speaker.voice).speak(texts, Path(temporary), tokenizer)
        for utterance in batch:
            wav = Path(temporary) / f"{utterance.name}.wav"
            if not wav.is_file() or soundfile.info(wav).duration < MIN_SECONDS:
                failures[utterance.name] = f"{speaker.voice} does not speak: {utterance.text}"
                continue
            apply_effects(wav, speaker.effects, speaker.tempo)
            phones = wav.with_suffix(".phones")
            if phones.is_file():
                phones.rename(wavs / phones.name)
            wav.rename(wavs / wav.name)  # last, so that an existing recording is complete
    return failures


def write_split(utterances: Sequence[Utterance], failures: dict[str, str], folder: Path, split: str) -> None:
    """Write the Kaldi-style tables of `folder`/`split` for all utterances that did not fail."""
    from tools.kaldi_folder import report_failures, write_tables

    of_split = {utterance.name: failures[utterance.name] for utterance in utterances if utterance.name in failures}
    report_failures(of_split, len(utterances), folder / split / "make_corpus.failed")
    good = sorted((u for u in utterances if u.name not in failures), key=lambda u: u.name)
    wavs = {u.name: str(folder / "wav" / f"{u.name}.wav") for u in good}
    texts, speakers = {u.name: u.text for u in good}, {u.name: u.speaker.name for u in good}
    count = write_tables(wavs, texts, speakers, folder / split)
    print(f"{folder / split}: {len(good)} utterances of {count} speakers")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
