"""The text tokenizer of CosyVoice2: that of Qwen2, and special tokens for what else can be heard in speech."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyvoice.utils.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# CosyVoice2 numbers them in this order, after the tokens of Qwen2.
SPOKEN_TOKENS = (
    "<|endofprompt|>",
    "[breath]",
    "<strong>",
    "</strong>",
    "[noise]",
    "[laughter]",
    "[cough]",
    "[clucking]",
    "[accent]",
    "[quick_breath]",
    "<laughter>",
    "</laughter>",
    "[hissing]",
    "[sigh]",
    "[vocalized-noise]",
    "[lipsmack]",
    "[mn]",
)
# The words of Qwen2: contractions, letters with a sign before them, single digits, signs, line ends, blanks.
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REMEDY = "copy the folder CosyVoice-BlankEN again from the model's download"


class QwenTokenizer:
    """Byte-pair encoding of NFC text. What is written like a special token is one, wherever it stands."""

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool) -> None:
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens

    def encode(self, text: str, allowed_special: str | set[str] = "all") -> list[int]:
        """Return ids. allowed_special belongs to every tokenizer's signature and changes nothing here."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids. What is not UTF-8 becomes replacement characters."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=self.skip_special_tokens)


def get_qwen_tokenizer(token_path: str, skip_special_tokens: bool) -> QwenTokenizer:
    """Return the tokenizer whose files are in the folder `token_path`: CosyVoice-BlankEN of a model folder.

    skip_special_tokens: whether `decode` leaves them out. Of the folder, vocab.json, merges.txt and
    tokenizer_config.json are read; nothing is run or downloaded. Raises InputError if one is missing or damaged.
    """
    if not token_path:
        raise InputError("no folder is given for the tokenizer's token_path; name the model's folder CosyVoice-BlankEN")
    folder = Path(token_path)
    tokenizer = _byte_pairs(folder)
    _add_specials(tokenizer, folder / "tokenizer_config.json")
    return QwenTokenizer(tokenizer, skip_special_tokens)


def _byte_pairs(folder: Path) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocabulary, merges):
        if not path.is_file():
            raise InputError(f"{path} does not exist, and the tokenizer needs it; {REMEDY}")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # noqa: BLE001 - the library raises no other class
        raise InputError(f"{vocabulary} and {merges.name} cannot be read: {_line(error)}; {REMEDY}") from None
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - tokenizer.get_vocab().keys()
    if missing:
        raise InputError(f"{vocabulary} lacks {len(missing)} of the 256 bytes, so some text has no ids; {REMEDY}")
    return tokenizer


def _add_specials(tokenizer: "Tokenizer", path: Path) -> None:
    """Add Qwen2's special tokens, whose ids the file tells, and CosyVoice2's after them."""
    known = _special_tokens(path)
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([*known.values(), *SPOKEN_TOKENS])
    if list(known) != list(range(first, first + len(known))):
        raise InputError(f"{path}: the special tokens do not follow the {first} of vocab.json; {REMEDY}")


def _special_tokens(path: Path) -> dict[int, str]:
    """Return id and text of each, by id."""
    if not path.is_file():
        raise InputError(f"{path} does not exist, and the tokenizer needs it; {REMEDY}")
    try:
        listed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["added_tokens_decoder"]
        tokens = {int(number): token["content"] for number, token in listed.items()}
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise InputError(f"{path} lists no special tokens that can be read: {_line(error)}; {REMEDY}") from None
    if not all(isinstance(text, str) and text for text in tokens.values()):
        raise InputError(f"{path}: a special token is no text; {REMEDY}")
    return dict(sorted(tokens.items()))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
