"""A tokenizer for models that learn from a few hours of speech, which writes known words as phones.

English spelling takes more speech to learn than a small model has. So the model folder has a pronunciation lexicon, a
gzip file of UTF-8 lines `word PHONE PHONE ...`. Words that are not in it are written in letters, and the model learns
to read them because training also spells some known words (Kastner et al. 2019, "Representation mixing for TTS
synthesis").
"""

import gzip
import re
import unicodedata
import zlib
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.tokenizer import BYTES, ByteTokenizer

# ARPAbet as in Festival's lexicons. A vowel carries the stress of its syllable; "ax" is never stressed.
VOWELS = ("aa", "ae", "ah", "ao", "aw", "ay", "eh", "er", "ey", "ih", "iy", "ow", "oy", "uh", "uw")
CONSONANTS = "b ch d dh f g hh jh k l m n ng p r s sh t th v w y z zh"
PHONES = ("ax0", *(vowel + stress for vowel in VOWELS for stress in "01"), *CONSONANTS.split())  # in the order of ids
PHONE_IDS = {phone: number for number, phone in enumerate(PHONES, len(BYTES))}

LETTER = r"[^\W\d_]"
# Single letters with full stops between them, or letters with apostrophes between them: "U.S", "don't"
WORD = re.compile(rf"((?<!{LETTER}){LETTER}(?:\.{LETTER})+(?!{LETTER})|{LETTER}+(?:'{LETTER}+)*)")
WITH_S = re.compile(r"(.+?)'?s|(.+)'S")  # Mary's, cyclists, TVs, MARY'S
ABBREVIATION = re.compile(r"[A-Z]{2,5}|[A-Za-z](?:\.[A-Za-z])+")  # a longer word in capitals is shouted
# Typographic characters and the plain ones that people type for them, which the training texts have.
TYPED = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": ",", "—": ",", "…": "."})
SIBILANTS = ("s", "z", "sh", "zh", "ch", "jh")
VOICELESS = ("p", "t", "k", "f", "th")


class PhoneTokenizer(ByteTokenizer):
    """The bytes of lowercase UTF-8 text as ids 0 to 255, and the 55 phones of PHONES after them.

    A run of letters becomes phones if the lexicon has it, as it is or in lower case, or without a final s or 's. Other
    abbreviations in capitals become the names of their letters, which are the lexicon's words `a.` to `z.`.
    Everything else stays bytes. Accents are dropped.

    Raises InputError if the lexicon cannot be read or has an unknown phone.
    """

    def __init__(self, lexicon: Path) -> None:
        super().__init__(lowercase=True)
        self.path = lexicon
        self.lexicon = read_lexicon(lexicon)

    def decode(self, ids: Iterable[int]) -> str:
        """Return text with the phones of a word between slashes: "/dh ax0/ zzyx"."""
        parts = []
        for are_phones, run in groupby(ids, lambda number: number >= len(BYTES)):
            numbers = list(run)
            phones = " ".join(PHONES[number - len(BYTES)] for number in numbers if are_phones)
            parts.append(f"/{phones}/" if are_phones else super().decode(numbers))
        return "".join(parts)

    def phones_of(self, word: str, spelled: bool = False) -> list[str]:
        """Return the phones of a run of letters; none if it is not known or `spelled` asks for letters."""
        phones = self._phones_without_s(word, spelled)
        if not phones and (found := WITH_S.fullmatch(word)):
            stem = self._phones_without_s(found[1] or found[2], spelled)
            phones = stem + _ending_s(stem[-1]) if stem else []
        return phones

    def _phones_without_s(self, word: str, spelled: bool) -> list[str]:
        if phones := self._entry(word) or self._entry(word.lower()):
            return [] if spelled else phones
        if ABBREVIATION.fullmatch(word):
            names = [self._entry(f"{letter}.") for letter in word.lower() if letter != "."]
            return [phone for name in names for phone in name] if all(names) else []
        return []

    def knows(self, text: str) -> bool:
        """Return whether every run of letters in the text becomes phones."""
        return not any(chr(BYTES[number]).isalnum() for number in self.encode(text) if number < len(BYTES))

    def unknown_letters(self, text: str) -> list[str]:
        """Return the letters of the text that no word of the lexicon has, such as Chinese ones, each once."""
        return list(dict.fromkeys(letter for letter in _plain(text) if letter.isalpha() and not letter.isascii()))

    def _entry(self, word: str) -> list[str]:
        phones = self.lexicon.get(word, "").split()
        for phone in phones:
            if phone not in PHONE_IDS:
                known = " ".join(PHONES)
                raise InputError(f"{self.path}: {word!r} has the unknown phone {phone!r}. Use those of {known}")
        return phones

    def _pieces(self, text: str) -> list[str]:
        return super()._pieces(" ".join(text.split()))

    def _units(self, piece: str, spelled: bool) -> list[int]:
        units = []
        for number, part in enumerate(WORD.split(_plain(piece))):
            phones = self.phones_of(part, spelled) if number % 2 else []  # the odd parts are the words
            units += [PHONE_IDS[phone] for phone in phones] or super()._units(part, spelled)
        return units


def get_phone_tokenizer(lexicon: Path) -> PhoneTokenizer:
    """Return the tokenizer of models with `text_token_size: 311`. lexicon: a file of the model folder."""
    return PhoneTokenizer(lexicon)


def read_lexicon(path: Path) -> dict[str, str]:
    """Return the phones of each word, separated by spaces. Raises InputError if the file is not a lexicon."""
    remedy = "Copy it again from the model's download, or write it with examples/mini/make_lexicon.py"
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
        lexicon = dict(line.split(" ", 1) for line in text.splitlines())
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path} is not a gzip file of lines `word PHONE PHONE ...`: {error}. {remedy}") from None
    if not lexicon or "" in lexicon or not all(map(str.strip, lexicon.values())):
        raise InputError(f"{path} has no words, or a line without a word or without phones. {remedy}")
    return lexicon


def _plain(word: str) -> str:
    """Return the word without accents and typographic characters. A word that is only accents stays as it is."""
    decomposed = unicodedata.normalize("NFD", word.translate(TYPED))
    return "".join(character for character in decomposed if unicodedata.category(character) != "Mn") or word


def _ending_s(phone: str) -> list[str]:
    """Return the phones of a plural or possessive ending after the phone."""
    if phone in SIBILANTS:
        return ["ax0", "z"]
    return ["s"] if phone in VOICELESS else ["z"]
