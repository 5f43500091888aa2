"""The text tokenizer that `cosyvoice.yaml` names.

CosyVoice-300M speaks Whisper's multilingual vocabulary: 50257 byte-pair pieces and 1609 special tokens
(100 languages, tasks, timestamps).
"""

from typing import TYPE_CHECKING

from cosyvoice.utils.errors import InputError

if TYPE_CHECKING:
    from whisper.tokenizer import Tokenizer

WHISPER_LANGUAGES = (99, 100)  # the second adds Cantonese: large-v3, and CosyVoice-300M
WHISPER_TASKS = (None, "transcribe", "translate")


def get_tokenizer(
    multilingual: bool,
    *,
    num_languages: int = 99,
    language: str | None = None,
    task: str | None = None,
) -> "Tokenizer":
    """Whisper's tokenizer, with `encode(text, allowed_special="all") -> list[int]` and `decode(ids) -> str`.

    Folders of the 25 Hz models name this function for a vocabulary of their own (60510 ids), which is
    not implemented: anything but Whisper's multilingual vocabulary raises InputError.
    """
    known = multilingual and num_languages in WHISPER_LANGUAGES and task in WHISPER_TASKS
    if not known:
        raise InputError(
            f"no tokenizer for {multilingual=}, {num_languages=}, {task=}; only "
            "Whisper's multilingual one is supported: use a CosyVoice-300M folder, not a 25 Hz one"
        )
    import whisper.tokenizer  # 2.5 seconds: only where text is tokenised

    try:
        return whisper.tokenizer.get_tokenizer(
            multilingual, num_languages=num_languages, language=language, task=task
        )
    except ValueError as error:  # an unknown language
        raise InputError(f"cosyvoice.yaml: tokenizer: {error}") from error
