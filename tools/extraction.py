"""What a network says of every utterance of a corpus: in parallel, and taken up again where a run was killed.

Beside the result, NAME.pt, lie `.NAME.stamps`, which tells what each of its entries was made from, and while
a run is unfinished `.NAME.parts/`, entries with their stamps.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from cosyvoice.model_folder.fingerprints import fingerprint_file
from cosyvoice.runtime.errors import InputError
from cosyvoice.speech_encoders.encoders import SpeechEncoder
from cosyvoice.utils.audio import PROMPT_RATE_HZ, load_wav
from cosyvoice.utils.file_utils import save_tensors
from tools.engines import Spread
from tools.kaldi_folder import Numbers, file_stamp, read_numbers, read_table, report_failures, write_table

PART_UTTERANCES = 200  # a killed run loses at most the results of these


@dataclass(frozen=True)
class Attempt:
    """The work on one recording, which may be done in another process."""

    encoder: SpeechEncoder

    def __call__(self, wav: str) -> Numbers | str:
        """Return the encoder's numbers, or the reason why there are none."""
        try:
            return self.encoder(load_wav(wav, PROMPT_RATE_HZ))[0].tolist()
        except InputError as error:
            return str(error)


@dataclass
class Extraction:
    """The outputs of `encoder` for the utterances of `folder`/wav.scp, kept in `folder`/`name`.pt."""

    folder: Path
    name: str
    encoder: SpeechEncoder
    spread: Spread

    def run(self, failures_name: str) -> dict[str, Numbers]:
        """{utterance: list of numbers}, computed where no earlier run did, and written.

        Utterances that failed are missing and listed in `folder`/`failures_name`. Raises InputError where
        the network cannot be opened, or all utterances failed.
        """
        torch.set_num_threads(1)  # the workers are the parallelism
        wavs = read_table(self.folder / "wav.scp")
        self.encoder.open()
        network = fingerprint_file(self.encoder.path)
        stamps = {utt: f"{network} {file_stamp(Path(wav))}" for utt, wav in wavs.items()}
        results = self._recall(stamps)
        failures = self._compute(wavs, stamps, results)
        results = {utt: results[utt] for utt in wavs if utt in results}  # in the order of wav.scp
        report_failures(failures, len(wavs), self.folder / failures_name)
        self._finish(results, stamps)
        return results

    @property
    def _result_file(self) -> Path:
        return self.folder / f"{self.name}.pt"

    @property
    def _stamps_file(self) -> Path:
        return self.folder / f".{self.name}.stamps"

    @property
    def _parts_dir(self) -> Path:
        return self.folder / f".{self.name}.parts"

    def _recall(self, stamps: dict[str, str]) -> dict[str, Numbers]:
        """Entries of earlier runs, finished or not, that were made from what is there now."""
        results: dict[str, Numbers] = {}
        if self._stamps_file.is_file() and self._result_file.is_file():
            old_stamps = read_table(self._stamps_file)
            finished = read_numbers(self._result_file)
            results = {utt: finished[utt] for utt in finished.keys() & stamps if old_stamps.get(utt) == stamps[utt]}
        for part in sorted(self._parts_dir.glob("part-*.pt")):
            for utt, (stamp, *numbers) in read_numbers(part).items():
                if stamp == stamps.get(utt):
                    results[utt] = numbers
        return results

    def _compute(self, wavs: dict[str, str], stamps: dict[str, str], results: dict[str, Numbers]) -> dict[str, str]:
        """Add what is missing to `results`. Returns {utterance: reason} of those that failed."""
        todo = [utt for utt in wavs if utt not in results]
        outcomes = zip(todo, self.spread(Attempt(self.encoder), [wavs[utt] for utt in todo]), strict=True)
        failures: dict[str, str] = {}
        part: dict[str, list] = {}
        try:
            progress = tqdm(outcomes, self.name, len(wavs), initial=len(results), unit="utt", disable=None)
            for utt, outcome in progress:
                if isinstance(outcome, str):
                    failures[utt] = outcome
                    continue
                results[utt] = outcome
                part[utt] = [stamps[utt], *outcome]
                if len(part) == PART_UTTERANCES:
                    self._save_part(part)
                    part = {}
        finally:  # what was done before Ctrl-C is kept, too
            self._save_part(part)
        return failures

    def _save_part(self, part: dict[str, list]) -> None:
        if part:
            number = len(list(self._parts_dir.glob("*")))
            save_tensors(part, self._parts_dir / f"part-{number:06d}.pt")

    def _finish(self, results: dict[str, Numbers], stamps: dict[str, str]) -> None:
        """Killed between two of its steps, it leaves stamps that are right for the old result and for the new one."""
        before = read_table(self._stamps_file) if self._stamps_file.is_file() else {}
        if unchanged := before.items() & stamps.items():
            write_table(dict(unchanged), self._stamps_file)
        else:
            self._stamps_file.unlink(missing_ok=True)
        save_tensors(results, self._result_file)
        write_table({utt: stamps[utt] for utt in results}, self._stamps_file)
        shutil.rmtree(self._parts_dir, ignore_errors=True)
