"""Speech engines with freely licensed voices: flite, festival and espeak-ng."""

import re
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosyvoice.runtime.errors import InputError

if TYPE_CHECKING:
    from cosyvoice.tokenizer.phones import PhoneTokenizer

PACKAGES = (
    "sudo apt-get install flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts "
    "festlex-cmu festlex-poslex espeak-ng sox wordnet-base"
)
HELD_OUT = "rms"  # the voice of the few-shot demonstration, which no model may have been trained on


@dataclass(frozen=True)
class Voice(ABC):
    """A voice, with the engine's name for it."""

    voice: str

    def __post_init__(self) -> None:
        assert HELD_OUT not in self.voice, f"the voice {self.voice} is held out of all training"

    @abstractmethod
    def check(self) -> None:
        """Raise InputError if the engine or this voice is not installed."""

    @abstractmethod
    def speak(self, texts: Mapping[str, str], folder: Path, tokenizer: "PhoneTokenizer | None" = None) -> None:
        """Write NAME.wav for each name in `texts`, and lines "end_seconds phone" in NAME.phones if the engine can.

        tokenizer: gives the phones to an engine that speaks phones. A sentence that it cannot speak gets no wav.
        """


class Flite(Voice):
    def check(self) -> None:
        if self.voice not in output_of("flite", "-lv").split():
            raise InputError(f"flite has no voice {self.voice}; {PACKAGES}")

    def speak(self, texts: Mapping[str, str], folder: Path, tokenizer: "PhoneTokenizer | None" = None) -> None:
        for name, text in texts.items():
            wav = str(folder / f"{name}.wav")
            segments = output_of("flite", "-voice", self.voice, "-psdur", "-t", text, "-o", wav)
            phones = [segment.split(":") for segment in segments.split()]  # pau:0.225 n:0.281 ...
            write_phones(folder / f"{name}.phones", [(float(end), phone) for phone, end in phones])


class Festival(Voice):
    def check(self) -> None:
        if self.voice not in re.findall(r"\w+", output_of("festival", "-b", "(print (voice.list))")):
            raise InputError(f"festival has no voice {self.voice}; {PACKAGES}")

    def speak(self, texts: Mapping[str, str], folder: Path, tokenizer: "PhoneTokenizer | None" = None) -> None:
        script = folder / "speak.scm"  # one script for all texts, since festival takes a second to start
        remaining = list(texts.items())
        while remaining:
            script.write_text(f"(voice_{self.voice})\n" + "".join(map(self._commands, remaining)), encoding="utf-8")
            subprocess.run(["festival", "-b", script.name], cwd=folder, stderr=subprocess.DEVNULL, check=False)
            unspoken = [(name, text) for name, text in remaining if not (folder / f"{name}.wav").is_file()]
            remaining = unspoken[1:]  # festival stops at the first text that it cannot speak
        for segments in folder.glob("*.segs"):
            lines = segments.read_text(encoding="utf-8").partition("#\n")[2].splitlines()
            phones = [(float(end), phone) for end, _, phone in map(str.split, lines)]
            write_phones(segments.with_suffix(".phones"), phones)

    @staticmethod
    def _commands(item: tuple[str, str]) -> str:
        name, text = item
        quoted = text.replace("\\", " ").replace('"', " ")  # neither character is spoken
        return (
            f'(set! utt (utt.synth (Utterance Text "{quoted}")))\n'
            f'(utt.save.wave utt "{name}.wav" \'riff)\n(utt.save.segs utt "{name}.segs")\n'
        )


class Espeak(Voice):
    def check(self) -> None:
        output_of("espeak-ng", "--version")

    def speak(self, texts: Mapping[str, str], folder: Path, tokenizer: "PhoneTokenizer | None" = None) -> None:
        for name, text in texts.items():
            output_of("espeak-ng", "-v", self.voice, "-w", str(folder / f"{name}.wav"), text)


def apply_effects(wav: Path, effects: list[str], tempo: float) -> None:
    """Apply sox effects, which speed a recording up by `tempo`, and adapt the times of its phones."""
    if not effects:
        return
    changed = wav.with_name(f"changed-{wav.name}")
    subprocess.run(["sox", "-D", "-G", str(wav), str(changed), *effects], check=True)  # -D: no random dither
    changed.rename(wav)
    phones = wav.with_suffix(".phones")
    if phones.is_file():
        lines = phones.read_text(encoding="utf-8").splitlines()
        write_phones(phones, [(float(end) / tempo, phone) for end, phone in map(str.split, lines)])


def check_program(program: str, packages: str = PACKAGES) -> None:
    """Raise InputError if the program is not installed."""
    if shutil.which(program) is None:
        raise InputError(f"{program} is not installed; {packages}")


def output_of(program: str, *arguments: str) -> str:
    """Return what the program prints. Raises InputError if it is not installed."""
    check_program(program)
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False).stdout


def write_phones(file: Path, phones: list[tuple[float, str]]) -> None:
    file.write_text("".join(f"{end:.3f} {phone}\n" for end, phone in phones), encoding="utf-8")


VOICES: dict[str, Voice] = {
    "slt": Flite("slt"),
    "awb": Flite("awb"),
    "kal16": Flite("kal16"),
    "kal": Festival("kal_diphone"),
    "ked": Festival("ked_diphone"),
    "slthts": Festival("cmu_us_slt_arctic_hts"),
    "f2": Espeak("en-us+f2"),
    "klatt4": Espeak("en-us+klatt4"),
}
