#!/usr/bin/env python3
"""Which part of the text each speech token says, found from the phones whose times the engines told.

    examples/mini/align_text.py --dirs data/mini/voices/train data/mini/voices/dev

Reads wav.scp, text, and the .phones beside the recordings; writes .places beside them: for each token of 20 ms the
number of a word and the share of it that is over, which guides the language model's attention while it learns to read.
Letters and phones are aligned by a hidden Markov model over the letters (Vogel et al. 1996, "HMM-based word alignment
in statistical translation"), which is trained on all their texts at once.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz' "  # all others are one symbol more
MOST_SKIPPED = 6  # letters from one phone to the next, as in "thought"
ITERATIONS = 5
SPREAD = 0.06  # standard deviation, as a share of the text, of where the first iteration looks for a phone's letter
SMOOTHING = 0.1  # added to every count


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dirs", type=Path, nargs="+", required=True, help="Kaldi-style folders of make_corpus.py")
    options = parser.parse_args(argv)

    from tqdm import tqdm

    from cosyvoice.utils.errors import InputError
    from cosyvoice.utils.file_utils import atomic_write
    from cosyvoice.utils.frames import TOKEN_RATE_HZ
    from examples.mini.speech_tokenizer import phone_of_each, read_phones
    from tools.kaldi_folder import read_table

    texts = {}  # by recording: two corpora may say one sentence in one voice, under one name
    for folder in options.dirs:
        said = read_table(folder / "text")
        wavs = read_table(folder / "wav.scp")
        if unsaid := wavs.keys() - said.keys():
            raise InputError(f"{min(unsaid)} is in {folder}/wav.scp, but not in its text; run make_corpus.py again")
        texts |= {Path(wav): said[utt] for utt, wav in wavs.items()}
    if all(wav.with_suffix(".places").is_file() for wav in texts):
        print(f"{len(texts)} utterances: .places are there already; delete one to align anew")
        return
    phones = {wav: read_phones(wav.with_suffix(".phones")) for wav in texts}
    pairs = [(letter_numbers(text), phones[wav][1]) for wav, text in texts.items()]
    paths = align(pairs, lambda work: tqdm(work, desc="aligning", unit="pass", disable=None))
    for path, (wav, (ends, _)) in zip(paths, phones.items(), strict=True):
        places = word_places(texts[wav])[path[phone_of_each(ends, round(ends[-1] * TOKEN_RATE_HZ))]]
        with atomic_write(wav.with_suffix(".places")) as temporary:
            temporary.write_text(" ".join(f"{place:.4f}" for place in places) + "\n", encoding="utf-8")
    print(f"{len(texts)} utterances: .places are beside the recordings")


def letter_numbers(text: str) -> "np.ndarray":
    """One number for each byte of the text."""
    import numpy as np

    known = {ord(letter): number for number, letter in enumerate(LETTERS)}
    return np.array([known.get(byte, len(LETTERS)) for byte in text.lower().encode("utf-8")])


def word_places(text: str) -> "np.ndarray":
    """Return for each byte of the text its word's number plus the share of that word before the byte's middle."""
    import numpy as np

    from cosyvoice.tokenizer.tokenizer import get_byte_tokenizer

    sizes = map(len, get_byte_tokenizer(lowercase=True).encode_words(text))
    return np.concatenate([number + (np.arange(size) + 0.5) / size for number, size in enumerate(sizes)])


def align(
    pairs: "Sequence[tuple[np.ndarray, np.ndarray]]", progress: Callable[[Iterable[int]], Iterable[int]]
) -> "list[np.ndarray]":
    """For each (letters (T,), phones (P,)) the number of the letter that each phone belongs to, (P,), never falling.

    progress: wraps the numbers of the passes and shows how far they are.
    """
    import numpy as np

    sounds = 1 + max(phones.max() for _, phones in pairs)
    counts = np.full((len(LETTERS) + 1, sounds), SMOOTHING)
    for letters, phones in pairs:  # to begin with, a letter sounds like what is said at that share of the time
        shares = (np.arange(len(phones))[:, None] + 0.5) / len(phones) - (np.arange(len(letters)) + 0.5) / len(letters)
        near = np.exp(-(shares**2) / (2 * SPREAD**2))
        for phone, weights in zip(phones, near / near.sum(axis=1, keepdims=True), strict=True):
            np.add.at(counts[:, phone], letters, weights)
    jumps = np.ones(MOST_SKIPPED + 1)
    for _ in progress(range(ITERATIONS)):
        emit, jump = (np.log(table / table.sum(axis=-1, keepdims=True)) for table in (counts, jumps))
        paths = [best_path(emit[np.ix_(letters, phones)], jump) for letters, phones in pairs]
        counts, jumps = np.full_like(counts, SMOOTHING), np.full_like(jumps, SMOOTHING)
        for path, (letters, phones) in zip(paths, pairs, strict=True):
            np.add.at(counts, (letters[path], phones), 1)
            np.add.at(jumps, np.diff(path).clip(max=MOST_SKIPPED), 1)
    return paths


def best_path(emit: "np.ndarray", jump: "np.ndarray") -> "np.ndarray":
    """The likeliest letters of P phones, (P,): emit (T, P) and jump (MOST_SKIPPED + 1,) are logarithms (Viterbi).

    The first phone belongs to one of the first letters and the last to one of the last, as far as jumps reach.
    """
    import numpy as np

    letters, phones = emit.shape
    reach = max(len(jump), -(-letters // phones) + 1)  # a text of many silent letters needs longer jumps
    jump = np.pad(jump, (0, reach - len(jump)), constant_values=jump.min())
    score = np.full(letters, -np.inf)
    score[:reach] = jump[: min(reach, letters)] + emit[:reach, 0]
    came_by = np.zeros((phones, letters), dtype=int)
    for phone in range(1, phones):
        padded = np.concatenate([np.full(reach - 1, -np.inf), score])
        options = np.lib.stride_tricks.sliding_window_view(padded, reach)[:, ::-1] + jump  # (T, reach)
        came_by[phone] = options.argmax(axis=1)
        score = options.max(axis=1) + emit[:, phone]
    place = letters - 1 - score[::-1][:reach].argmax()
    path = [place]
    for phone in range(phones - 1, 0, -1):
        place -= came_by[phone, place]
        path.append(place)
    return np.array(path[::-1])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.utils.command import run

    run(main)
