#!/usr/bin/env python3
"""Find the text position of each speech token, from the phones and times that the speech engines wrote.

    examples/mini/align_text.py --lexicon data/mini/lexicon.txt.gz --dirs data/mini/texts/train data/mini/texts/dev

Reads wav.scp, text, and the .phones beside the recordings, and writes .places beside them: for each token of 20 ms the
index of a word plus the share of that word already spoken. They guide the language model's attention in training. The
phones that an engine spoke are aligned with those of the lexicon; few differ.
"""

import argparse
import sys
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SILENCE = "pau"
GAP_COST = 0.7  # of a phone that only one side has
SILENCE_COST = 0.1
SAME_CLASS_COST, OTHER_CLASS_COST = 0.5, 1.2  # of a vowel for a vowel or a consonant for a consonant, or for the other


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lexicon", type=Path, required=True, help="of make_lexicon.py")
    parser.add_argument("--dirs", type=Path, nargs="+", required=True, help="Kaldi-style folders of make_corpus.py")
    options = parser.parse_args(argv)

    from tqdm import tqdm

    from cosyvoice.model_folder.folder import ModelFolder
    from cosyvoice.runtime.errors import InputError
    from cosyvoice.tokenizer.phones import PhoneTokenizer
    from cosyvoice.utils.file_utils import atomic_write
    from tools.kaldi_folder import read_table

    tokenizer = PhoneTokenizer(options.lexicon)
    token_rate = ModelFolder(Path(__file__).parent).rates.token_rate
    texts = {}  # by recording, since two corpora may use the same utterance name
    for folder in options.dirs:
        said = read_table(folder / "text")
        wavs = read_table(folder / "wav.scp")
        if missing := wavs.keys() - said.keys():
            raise InputError(f"{min(missing)} is in {folder}/wav.scp, but not in its text. Run make_corpus.py again")
        texts |= {Path(wav): said[utt] for utt, wav in wavs.items()}
    for wav, text in tqdm(texts.items(), desc="aligning", unit="utt", disable=None):
        if wav.with_suffix(".places").is_file():
            continue
        ends, phones = read_phones(wav.with_suffix(".phones"))
        phone_places = align(phones, tokenizer.encode_words(text))
        centres = [(token + 0.5) / token_rate for token in range(round(ends[-1] * token_rate))]  # s
        places = [phone_places[min(bisect_right(ends, centre), len(phones) - 1)] for centre in centres]
        with atomic_write(wav.with_suffix(".places")) as temporary:
            temporary.write_text(" ".join(f"{place:.4f}" for place in places) + "\n", encoding="utf-8")
    print(f"{len(texts)} utterances: .places are beside the recordings")


def read_phones(path: Path) -> tuple[list[float], list[str]]:
    """Return the ends of a recording's phones in seconds, and the phones.

    Raises InputError if the file is missing or empty, or has a line that is not "end_seconds phone".
    """
    from cosyvoice.runtime.errors import InputError

    if not path.is_file():
        raise InputError(f"{path} does not exist. Run make_corpus.py again, with voices that write their phones")
    ends, phones = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            end, phone = line.split()
            ends.append(float(end))
            phones.append(phone)
        except ValueError:
            raise InputError(f'{path}, line {number}: "{line}" is not "end_seconds phone". Make it again') from None
    if not phones:
        raise InputError(f"{path} is empty. Delete it and its recording, and run make_corpus.py again")
    return ends, phones


def align(spoken: Sequence[str], words: Sequence[Sequence[int]]) -> list[float]:
    """Return for each spoken phone the index of its word plus the share of that word before the phone's middle.

    words: ids of the phone tokenizer. Silence belongs to the end of the word before it. The alignment minimises the
    cost of phones that differ or that only one side has (Levenshtein 1966).
    """
    from cosyvoice.tokenizer.phones import PHONES
    from cosyvoice.tokenizer.tokenizer import BYTES

    expected = [
        (word + (place + 0.5) / len(units), PHONES[unit - len(BYTES)].rstrip("01"))
        for word, units in enumerate(words)
        for place, unit in enumerate(units)
        if unit >= len(BYTES)
    ]
    said = [phone for _, phone in expected]
    costs = [[GAP_COST * column for column in range(len(said) + 1)]]
    for phone in spoken:
        above, row = costs[-1], []
        skipped = SILENCE_COST if phone == SILENCE else GAP_COST
        for column, cost in enumerate(above):
            best = cost + skipped
            if column:
                best = min(best, above[column - 1] + difference(phone, said[column - 1]), row[-1] + GAP_COST)
            row.append(best)
        costs.append(row)
    places = [0.0] * len(spoken)
    row, column = len(spoken), len(said)
    while row:
        phone, cost = spoken[row - 1], costs[row][column]
        if column and cost == costs[row - 1][column - 1] + difference(phone, said[column - 1]):
            places[row - 1] = expected[column - 1][0]
            row, column = row - 1, column - 1
        elif column and cost == costs[row][column - 1] + GAP_COST:
            column -= 1
        else:  # a phone that only the engine has
            if column and phone == SILENCE:
                word = int(expected[column - 1][0])
                places[row - 1] = word + 1 - 0.5 / len(words[word])
            elif column:
                places[row - 1] = expected[column - 1][0]
            row -= 1
    return places


def difference(spoken: str, said: str) -> float:
    """Return the cost of hearing one phone where the lexicon has the other."""
    if spoken == said:
        return 0.0
    if spoken == SILENCE:
        return 2 * GAP_COST  # never
    return SAME_CLASS_COST if (spoken[0] in "aeiou") == (said[0] in "aeiou") else OTHER_CLASS_COST


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
