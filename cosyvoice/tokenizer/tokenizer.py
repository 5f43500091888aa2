"""The text tokenizers that a `cosyvoice.yaml` may name.

CosyVoice-300M uses Whisper's multilingual vocabulary: 50257 byte-pair pieces and 1609 special tokens
(100 languages, tasks, timestamps). A small model that is trained from scratch does better with only the
first 256 ids, the single bytes, because most of the longer pieces are too rare to be learnt.
"""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from cosyvoice.runtime.errors import InputError

if TYPE_CHECKING:
    from whisper.tokenizer import Tokenizer

WHISPER_LANGUAGES = (99, 100)  # the second adds Cantonese: large-v3, and CosyVoice-300M
WHISPER_TASKS = (None, "transcribe", "translate")

# GPT-2 numbers the printable bytes of Latin-1 before all others (Radford et al., 2019), and so does Whisper.
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = bytes((*PRINTED, *(byte for byte in range(256) if byte not in PRINTED)))  # the byte of each id
BYTE_IDS = {byte: number for number, byte in enumerate(BYTES)}
PIECE = re.compile(r"^\s+\S*\s*|\S+\s*")  # a word and the blanks after it; the first word also takes those before it


def get_tokenizer(
    multilingual: bool,
    *,
    num_languages: int = 99,
    language: str | None = None,
    task: str | None = None,
) -> "Tokenizer":
    """Return Whisper's tokenizer, with `encode(text, allowed_special="all") -> list[int]` and `decode(ids) -> str`.

    Raises InputError for all but Whisper's multilingual vocabulary. Folders of the 25 Hz models name this function for
    a vocabulary of their own (60510 ids), which is not implemented.
    """
    known = multilingual and num_languages in WHISPER_LANGUAGES and task in WHISPER_TASKS
    if not known:
        raise InputError(
            f"there is no tokenizer for {multilingual=}, {num_languages=}, {task=}; only "
            "Whisper's multilingual one is supported: use a CosyVoice-300M folder, not a 25 Hz one"
        )
    import whisper.tokenizer  # takes 2.5 seconds, so only when text is tokenised

    try:
        return whisper.tokenizer.get_tokenizer(
            multilingual, num_languages=num_languages, language=language, task=task
        )
    except ValueError as error:  # an unknown language
        raise InputError(f"cosyvoice.yaml: tokenizer: {error}") from error


class ByteTokenizer:
    """The bytes of UTF-8 text as ids 0 to 255 of Whisper's vocabulary. There are no special tokens."""

    def __init__(self, lowercase: bool = False) -> None:
        self.lowercase = lowercase

    def encode(self, text: str, allowed_special: str | set[str] = "all") -> list[int]:
        """Return ids. allowed_special belongs to every tokenizer's signature and has no effect here."""
        return [number for word in self.encode_words(text) for number in word]

    def encode_words(self, text: str, spelled: Callable[[], bool] = lambda: False) -> list[list[int]]:
        """Return the ids of each word of `text.split()` and the blanks after it. Joined, they are those of `encode`.

        spelled: called once for each word; True spells it in letters, even if the tokenizer knows its phones.
        """
        return [self._units(piece, spelled()) for piece in self._pieces(text)]

    def _pieces(self, text: str) -> list[str]:
        return PIECE.findall(text)

    def _units(self, piece: str, spelled: bool) -> list[int]:
        plain = piece.lower() if self.lowercase else piece
        return [BYTE_IDS[byte] for byte in plain.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; invalid UTF-8 becomes replacement characters."""
        return bytes(BYTES[number] for number in ids).decode("utf-8", errors="replace")


def get_byte_tokenizer(lowercase: bool = False) -> ByteTokenizer:
    """Return the tokenizer of models with `text_token_size: 256`. lowercase: ignore case."""
    return ByteTokenizer(lowercase)
