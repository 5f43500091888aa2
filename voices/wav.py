"""Speech in wav files."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from cosyvoice.utils.wav_files import write_wav
from voices.lines import Line
from voices.synthesis import ReadyVoice


def speak_into_files(
    voice: ReadyVoice, lines: Sequence[Line], speed: float, seed: int, together: int
) -> Iterator[tuple[Line, float]]:
    """Speak each line into its file, and yield it with its seconds of speech. For the options see `ReadyVoice.speak`.

    A comment in the file says what is needed to speak it again.
    """
    rate_hz, how = voice.cosyvoice.sample_rate, f"speed {speed}, {voice.cosyvoice.model.precision}"
    for line, speech in voice.speak(lines, speed, seed, together):
        write_wav(line.output, speech, rate_hz, f"seed {seed}, line {line.number}, {how}")
        yield line, speech.size(1) / rate_hz


def stream_into_files(voice: ReadyVoice, line: Line, seed: int) -> Iterator[tuple[Path, float]]:
    """Write each piece of a line as soon as it is made, and yield its file with its seconds of speech.

    The pieces of out.wav are out.piece001.wav and so on; those of an earlier, longer speech are removed. The last file
    is out.wav itself, with all of them.
    """
    rate_hz, pieces = voice.cosyvoice.sample_rate, []
    comment = stream_comment(voice, line, seed)
    for number, speech in enumerate(voice.stream(line, seed), start=1):
        pieces.append(speech)
        write_wav(piece_path(line, number), speech, rate_hz, f"{comment}, piece {number}")
        yield piece_path(line, number), speech.size(1) / rate_hz
    for number in count(len(pieces) + 1):
        if not piece_path(line, number).exists():
            break
        piece_path(line, number).unlink()
    yield line.output, write_stream(voice, line, seed, pieces)


def write_stream(voice: ReadyVoice, line: Line, seed: int, pieces: list[Tensor]) -> float:
    """Write the pieces (1, samples) of a streamed line as one file, and return its seconds of speech."""
    rate_hz, whole = voice.cosyvoice.sample_rate, torch.cat(pieces, dim=1)
    write_wav(line.output, whole, rate_hz, stream_comment(voice, line, seed))
    return whole.size(1) / rate_hz


def stream_comment(voice: ReadyVoice, line: Line, seed: int) -> str:
    return f"seed {seed}, line {line.number}, streamed, {voice.cosyvoice.model.precision}"


def piece_path(line: Line, number: int) -> Path:
    return line.output.with_suffix(f".piece{number:03d}.wav")
