#!/usr/bin/env python3
"""Part of run_dpo.sh: speech of the model's own for every text of a Kaldi-style folder, to be rejected in training.

    python local/prepare_reject_sample.py --src_dir data/train --des_dir data/train_reject --ref_model CosyVoice2-0.5B

Reads the tables and utt2speech_token.pt. The prompt of an utterance is the next one of its speaker. Writes
wavs/NAME.wav and tables like those of the source folder, which extract_speech_token.py reads, and
prepare_reject_sample.failed, which tells what could not be spoken. A second run speaks only what is new.
"""

import argparse
import hashlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cosyvoice.cli.base import FolderVoice

ROOT = Path(__file__).resolve().parents[4]


@dataclass(frozen=True)
class Utterance:
    """A text, and the recording in whose voice it is spoken."""

    name: str
    text: str
    prompt_text: str
    prompt_wav: Path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src_dir", type=Path, required=True, help="what the stages before wrote")
    parser.add_argument("--des_dir", type=Path, required=True, help="folder for the speech and its tables")
    parser.add_argument("--ref_model", type=Path, required=True, help="model folder that speaks")
    parser.add_argument("--seed", type=int, default=1986, help="seed of all random draws (default: %(default)s)")
    options = parser.parse_args(argv)

    from tqdm import tqdm

    from cosyvoice.cli.cosyvoice import AutoModel
    from cosyvoice.runtime.command import check_least
    from tools.kaldi_folder import read_table, report_failures, write_tables

    check_least("--seed", options.seed, 0)
    texts, speakers = (read_table(options.src_dir / name) for name in ("text", "utt2spk"))
    utterances = list(find_utterances(options.src_dir, texts, speakers))
    model = f"{weights_stamp(options.ref_model)} {options.seed}"
    voice = AutoModel(options.ref_model)
    failures = {}
    with Samples(options.des_dir, {each.name: stamp(model, each) for each in utterances}) as samples:
        for each in tqdm(utterances, desc="rejected samples", unit="utt", disable=None):
            if each.name not in samples.made and (problem := samples.make(voice, each, options.seed)):
                failures[each.name] = problem
    report_failures(failures, len(utterances), options.des_dir / "prepare_reject_sample.failed")
    wavs = {each.name: str(samples.wav(each.name)) for each in utterances if each.name not in failures}
    write_tables(wavs, {utt: texts[utt] for utt in wavs}, {utt: speakers[utt] for utt in wavs}, options.des_dir)


def find_utterances(folder: Path, texts: dict[str, str], speakers: dict[str, str]) -> Iterator[Utterance]:
    """Yield what training will use: the utterances that have tokens, a text and a speaker."""
    from tools.kaldi_folder import read_numbers, read_table

    wavs, tokens = read_table(folder / "wav.scp"), read_numbers(folder / "utt2speech_token.pt")
    of_speaker: dict[str, list[str]] = {}
    for utt in wavs:
        if tokens.get(utt) and texts.get(utt) and utt in speakers:
            of_speaker.setdefault(speakers[utt], []).append(utt)
    for utts in of_speaker.values():
        for utt, prompt in zip(utts, utts[1:] + utts[:1], strict=True):  # its own speech would be copied
            yield Utterance(utt, texts[utt], texts[prompt], Path(wavs[prompt]))


def weights_stamp(model_dir: Path) -> str:
    """Return what changes with the weights of the model."""
    from cosyvoice.model_folder.fingerprints import fingerprint_weights
    from cosyvoice.model_folder.folder import ModelFolder
    from cosyvoice.runtime.errors import InputError

    files = [ModelFolder(model_dir).weights(part) for part in ("llm", "flow", "hift")]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]} does not exist. Give a whole model folder with --ref_model")
    return hashlib.sha256("".join(map(fingerprint_weights, files)).encode()).hexdigest()


def stamp(model: str, utterance: Utterance) -> str:
    """Return what changes with anything that the sample depends on."""
    from tools.kaldi_folder import file_stamp

    texts = f"{utterance.text}\n{utterance.prompt_text}"
    return f"{model} {zlib.crc32(texts.encode())} {file_stamp(utterance.prompt_wav)}"


class Samples:
    """The samples of a folder. Beside them lies `.reject.stamps`, which tells what each was made from."""

    def __init__(self, folder: Path, stamps: dict[str, str]) -> None:
        """stamps: of all utterances, by name. Those of them whose sample is there already are in `made`."""
        self.folder, self.stamps = folder.absolute(), stamps
        self.made: dict[str, str] = {}

    def wav(self, utt: str) -> Path:
        return self.folder / "wavs" / f"{utt}.wav"

    def __enter__(self) -> "Samples":
        from tools.kaldi_folder import read_table, write_table

        path = self.folder / ".reject.stamps"
        before = read_table(path) if path.is_file() and path.stat().st_size else {}
        kept = self.stamps.items() & before.items()
        self.made = {utt: value for utt, value in kept if self.wav(utt).is_file()}
        write_table(self.made, path)
        self.file = path.open("a", encoding="utf-8")  # a line that a kill has torn fits no stamp
        return self

    def __exit__(self, *_error: object) -> None:
        self.file.close()

    def make(self, voice: "FolderVoice", utterance: Utterance, seed: int) -> str:
        """Speak an utterance into its file. Return why that failed, or nothing."""
        from cosyvoice.runtime.errors import InputError
        from voices.wav import write_wav

        try:
            speech = speak(voice, utterance, seed)
        except InputError as error:
            self.wav(utterance.name).unlink(missing_ok=True)
            return str(error)
        write_wav(self.wav(utterance.name), speech, voice.sample_rate, f"seed {seed}")
        print(utterance.name, self.stamps[utterance.name], file=self.file, flush=True)
        return ""


def speak(voice: "FolderVoice", utterance: Utterance, seed: int) -> "Tensor":
    """Return speech (1, samples). Its draws follow from seed and name. Raises InputError where there is none."""
    import torch

    from cosyvoice.runtime.draws import Draws
    from cosyvoice.runtime.errors import InputError
    from cosyvoice.utils.frontend_utils import nothing_to_speak

    with Draws(seed, zlib.crc32(utterance.name.encode())):
        prompt = utterance.prompt_text, utterance.prompt_wav
        spoken = voice.inference_zero_shot(utterance.text, *prompt, text_frontend=False)
        pieces = [piece["tts_speech"] for piece in spoken]
    if not pieces:
        raise InputError(nothing_to_speak(utterance.text))
    return torch.cat(pieces, dim=1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
