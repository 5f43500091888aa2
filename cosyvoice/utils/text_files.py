"""Reading text files: the one place that knows what encodings are wrong."""

from cosyvoice.runtime.errors import InputError


def decode_lines(data: bytes, name: str) -> list[str]:
    """Return the lines of UTF-8 text with or without a byte-order mark.

    Raises InputError, by `name`, for other encodings. UTF-16 without its mark shows by its NUL characters.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8; save it in that encoding") from error
    if "\0" in text:
        raise InputError(f"{name} is not UTF-8 text (it holds NUL characters); save it in that encoding")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
