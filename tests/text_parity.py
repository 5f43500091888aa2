"""What is right where the reference's text rules fail on a text or distort it.

Each function works it out from the recorded result, and tells its reason. Everything else must be equal.
"""

import re
from collections.abc import Callable
from typing import Any

from cosyvoice.utils import frontend_utils

INDEX_ERROR = {"error": "IndexError"}
CIRCLED = {"①": "one", "②": "two", "③": "three", "④": "four", "⑤": "five"}


def right_blanks(text: str, recorded: Any) -> str:
    """`replace_blank` at both ends of a text.

    The blank at the end has no right neighbour, at which the reference fails; the one at the start gets the
    last character as its left neighbour. Neither stands between two characters: both go.
    """
    if recorded == INDEX_ERROR:
        assert text.endswith(" ")
        return frontend_utils.replace_blank(text.rstrip(" "))
    return recorded.lstrip(" ")


def right_numbers(text: str, recorded: Any, spell: Callable[[str], Any]) -> Any:
    """Squares and cubes are spelled as such, circled digits one by one.

    They are digits but no decimals: the reference makes one "zero" of each run of them.
    """
    if not any(mark.isdigit() and not mark.isdecimal() for mark in text):
        return recorded
    text = text.replace("²", " squared").replace("³", " cubed")
    return spell(re.sub("[①-⑤]+", lambda run: " ".join(CIRCLED[mark] for mark in run.group()), text))


def right_pieces(recorded: Any, comma_split: bool) -> Any:
    """A final comma gives way to the full stop, where the reference writes both.

    Of commas alone nothing is left. An empty text has no last character, at which the reference fails: it
    has no pieces.
    """
    if recorded == INDEX_ERROR:
        return []
    if comma_split or not recorded:
        return recorded
    last = re.sub("[,，、]+([.。])$", r"\1", recorded[-1])
    return [*recorded[:-1], *([last] if last not in ".。" else [])]
