"""Decodes text files and refuses wrong encodings."""

from cosyvoice.runtime.errors import InputError


def decode_lines(data: bytes, name: str) -> list[str]:
    """Return the lines of UTF-8 text with or without a byte-order mark.

    Raises InputError, naming the file `name`, for other encodings. UTF-16 without a mark is known by its NULs.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8; save it in that encoding") from error
    if "\0" in text:
        raise InputError(f"{name} is not UTF-8 text (it has NUL characters); save it in that encoding")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
