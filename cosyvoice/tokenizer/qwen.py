"""The text tokenizer of CosyVoice2: that of Qwen2, and special tokens for what else can be heard in speech."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cosyvoice.model_folder.blank_en import REMEDY, read_json, read_text
from cosyvoice.runtime.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

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
    from tokenizers import models, pre_tokenizers

    vocabulary = _vocabulary(folder / "vocab.json")
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys()
    if missing:
        raise InputError(f"{folder / 'vocab.json'} lacks {len(missing)} of the 256 bytes; {REMEDY}")
    return of_pairs(models.BPE(vocabulary, _merges(folder / "merges.txt", vocabulary)))


def of_pairs(pairs: "BPE") -> "Tokenizer":
    """Return a tokenizer that cuts text as Qwen2 does and has these pairs of pieces, but no special tokens yet."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(pairs)
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _vocabulary(path: Path) -> dict[str, int]:
    """Return the id of each piece of text; the ids are 0 and up, without gaps."""
    vocabulary = read_json(path)
    if not all(type(number) is int for number in vocabulary.values()):
        raise InputError(f"{path}: an id is not a whole number; {REMEDY}")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(f"{path}: the ids are not those from 0 to {len(vocabulary) - 1}; {REMEDY}")
    return vocabulary


def _merges(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that become one, the first before the others."""
    lines = [line for line in read_text(path).split("\n") if line and not line.startswith("#version")]
    pairs = [tuple(line.split(" ")) for line in lines]
    for pair, line in zip(pairs, lines, strict=True):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise InputError(f"{path}: {line!r:.80} is not a pair of pieces of vocab.json; {REMEDY}")
    return pairs


def _add_specials(tokenizer: "Tokenizer", path: Path) -> None:
    """Add Qwen2's special tokens, whose ids the file tells, and CosyVoice2's after them."""
    known = _special_tokens(path)
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([*known.values(), *SPOKEN_TOKENS])
    if list(known) != list(range(first, first + len(known))):
        raise InputError(f"{path}: the special tokens do not follow the {first} of vocab.json; {REMEDY}")


def _special_tokens(path: Path) -> dict[int, str]:
    """Return id and text of each, by id."""
    settings = read_json(path)
    try:
        tokens = {int(number): token["content"] for number, token in settings["added_tokens_decoder"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"{path} has no list of special tokens; {REMEDY}") from None
    if not all(isinstance(text, str) and text for text in tokens.values()):
        raise InputError(f"{path}: a special token is not a text; {REMEDY}")
    return dict(sorted(tokens.items()))
