"""Rewrites forms that wetext's grammar misreads or fails on.

wetext reads $1,000 as "thousand dollars", 1980s as a number of seconds and 1.8m as minutes, and fails on a whole text
because of a single "#5". Everything that these rules do not match is left to the grammar.
"""

import re
import unicodedata
from collections.abc import Callable

from cosyvoice.utils.frontend_utils import MAX_NAMED_DIGITS

Speller = Callable[[str], str]  # spells the digits of a whole number in words

# Typographic characters, and the plain ones that people type for them
TYPED = str.maketrans({
    "‘": "'", "’": "'", "‚": "'", "′": "'", "“": '"', "”": '"', "„": '"', "″": '"',
    "…": "...", "−": "-", "‐": "-", "‑": "-",
})  # fmt: skip
FULL_WIDTH = str.maketrans({chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)} | {"\u3000": " "})
FULL_WIDTH_WORDS = {code: sign for code, sign in FULL_WIDTH.items() if sign.isalnum()}  # Chinese keeps its own stops
RANGE_DASH = re.compile(r"(?<=\d)\s*–\s*(?=[\d$£€])")
LONG_DASH = re.compile(r"\s*[–—―]+\s*")
LINK = re.compile(r"!?\[([^\]\n]*)\]\([^()\s]*\)")
LINE_MARKS = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]*|[-*+][ \t]+)", re.MULTILINE)
EMPHASIS = re.compile(r"(?<!\d)\*+|\*+(?!\d)|`+|~~|(?<!\w)_+(?=\w)|(?<=\w)_+(?!\w)|__+")
PICTURES = (range(0x2190, 0x2C00), range(0x1F000, 0x20000))

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
MONEY = re.compile(
    rf"([$£€])\s?({NUMBER})(?:\.(\d+))?(?:\s?-\s?[$£€]?({NUMBER})(?:\.(\d+))?)?"
    r"(?:\s?(thousand|million|billion|trillion|[kmb]n?)\b)?",
    re.IGNORECASE,
)
CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
}
SCALES = {"k": "thousand", "m": "million", "b": "billion", "mn": "million", "bn": "billion"}
TENS = ["hundreds", "tens", *(tens + "ties" for tens in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine"))]
DECADE = re.compile(r"\b(1[1-9]|20)(\d0)'?s\b")
SHORT_DECADE = re.compile(r"(?<!\w)'([2-9]0)s\b")
PHONE = re.compile(
    r"(?<![\w-])(?:\+?\d{1,3}[- .])?(?:\(\d{3}\)\s?|\d{3}[- .])?[2-9]\d{2}[-.]\d{4}(?![\w-])"
    r"|(?<!\w)\+\d[\d ]{6,}\d(?!\w)"
)
METERS = re.compile(rf"(?<![\w.])({NUMBER}(?:\.\d+)?)\s?m\b(?!\.\w)(?!²|³|\s*/)")
VERSION = re.compile(r"\b(v?)(\d+(?:\.\d{1,3}){2}|(?<=v)\d+\.\d+)(?!\.?\d)", re.IGNORECASE)
LONG = re.compile(rf"\d{{{MAX_NAMED_DIGITS + 1},}}")  # numbers without a name
GROUPED = re.compile(r"(?<![\w.,])(\d{1,3}(?:,\d{3})+)(?![\d,]*\d)")
PAIR = re.compile(r"(?<![\d/])(24/7|50/50|9/11)(?![\d/])")
NUMERO = re.compile(r"\b[Nn]os?\.\s?(?=\d)|#(?=\d)")
ABOUT = re.compile(r"[~≈]\s?(?=[$£€]?\d)")
CENTS = re.compile(r"(?<=\d)\s?¢")

CHINESE_DIGITS = dict(zip("0123456789", "零一二三四五六七八九", strict=True))
SERIAL = re.compile(
    r"((?:编号|号码|电话|手机|密码|验证码|学号|工号|房号|邮编|账号|卡号|单号)(?:[是为：: ]|号是?)?)(\d{3,})"
    r"|(?<![\d.])(\d{3,})(?=[A-Za-z])"
)
YUAN = re.compile(r"[¥￥](?=\s?[\d,.]+\s?(?:万|亿)?元)")


def cleaned(text: str, chinese: bool) -> str:
    """Return the text with plain quotes and dashes, without markup, emoji and zero-width characters.

    Full-width letters and digits become plain ones, and so do the other full-width characters unless `chinese`, which
    means that Chinese rules read the text. No letter or digit is lost.
    """
    text = text.translate(FULL_WIDTH_WORDS if chinese else FULL_WIDTH)
    if not chinese:
        text = LONG_DASH.sub(", ", RANGE_DASH.sub("-", text.translate(TYPED)))
    text = LINE_MARKS.sub("", LINK.sub(r"\1", text))
    text = EMPHASIS.sub(" ", text) if not chinese else text
    kept = (_plain(sign) for sign in text)
    return re.sub(r"[^\S\n]{2,}", " ", "".join(kept)).strip()


def _plain(sign: str) -> str:
    category = unicodedata.category(sign)
    if category == "Zs":
        return " "
    is_picture = category in ("So", "Sk") and any(ord(sign) in signs for signs in PICTURES) and not sign.isalnum()
    has_no_width = category == "Cf" or 0xFE00 <= ord(sign) <= 0xFE0F or (category == "Cc" and sign not in "\n\t")
    return "" if is_picture or has_no_width else sign


def english_words(text: str, spell: Speller) -> str:
    """Return the text with money, decades, metres, phone numbers, versions and the like in words."""

    def money(found: re.Match) -> str:
        sign, whole, cents, upper, upper_cents, scale = found.groups()
        one, many, cent, of_cents = CURRENCIES[sign]
        if upper or scale or (cents and len(cents) != 2):
            amounts = [_decimal(*amount, spell) for amount in ((whole, cents), (upper, upper_cents)) if amount[0]]
            scale = [SCALES.get(scale.lower(), scale.lower())] if scale else []
            return " ".join([" to ".join(amounts), *scale, many])
        parts = []
        if whole.strip("0") or not (cents or "").strip("0"):
            parts.append(f"{_whole(whole, spell)} {one if whole == '1' else many}")
        if cents and cents != "00":
            parts.append(f"{spell(cents.lstrip('0'))} {cent if cents == '01' else of_cents}")
        return " and ".join(parts)

    def decade(found: re.Match) -> str:
        century, years = found.groups()
        if found.group() == "2000s":
            return "two thousands"
        return f"{spell(century)} {TENS[int(years) // 10]}"

    def digit_by_digit(found: re.Match) -> str:
        groups = re.findall(r"\d+", found.group())
        return ", ".join(" ".join(map(spell, group)) for group in groups)

    def version(found: re.Match) -> str:
        letter, numbers = found.groups()
        return " ".join(filter(None, [letter, " point ".join(spell(number) for number in numbers.split("."))]))

    text = LONG.sub(digit_by_digit, text)
    text = NUMERO.sub("number ", ABOUT.sub("about ", CENTS.sub(" cents", text)))
    text = PAIR.sub(lambda found: " ".join(map(spell, found.group().split("/"))), text)
    text = MONEY.sub(money, text)
    text = SHORT_DECADE.sub(lambda found: TENS[int(found.group(1)) // 10], DECADE.sub(decade, text))
    text = PHONE.sub(digit_by_digit, text)
    text = VERSION.sub(version, text)
    text = METERS.sub(lambda found: f"{found.group(1)} {'meter' if found.group(1) == '1' else 'meters'}", text)
    return GROUPED.sub(lambda found: _whole(found.group(1), spell), text)


def _whole(digits: str, spell: Speller) -> str:
    return spell(digits.replace(",", ""))


def _decimal(whole: str, decimals: str | None, spell: Speller) -> str:
    return " ".join([_whole(whole, spell), *(["point", *map(spell, decimals)] if decimals else [])])


def chinese_words(text: str) -> str:
    """Return the text with serial numbers spelled digit by digit, and without a currency sign before 元."""

    def digits(found: re.Match) -> str:
        label, serial, before_letter = found.groups()
        return (label or "") + "".join(CHINESE_DIGITS[digit] for digit in serial or before_letter)

    return SERIAL.sub(digits, YUAN.sub("", text))
