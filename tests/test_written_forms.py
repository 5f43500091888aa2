"""Written forms in words: what the grammar reads wrong, and that no letter is lost or invented."""

import random
import re
import string

import inflect
import pytest

from cosyvoice.cli.text_normalizer import TextNormalizer
from cosyvoice.text.written_forms import chinese_words, cleaned, english_words

SPELL = inflect.engine().number_to_words


def words_of(text: str) -> str:
    """In lower case, without punctuation, hyphens and the word "and"."""
    return " ".join(word for word in re.findall(r"[\w']+", text.lower().replace("-", " ")) if word != "and")


@pytest.fixture(scope="module")
def normalizer() -> TextNormalizer:
    pytest.importorskip("wetext")
    return TextNormalizer(lambda text: list(map(ord, text)))


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        # money
        ("That is $2,345.67.", "that is two thousand three hundred forty five dollars sixty seven cents"),
        ("$1 and £1.01", "one dollar one pound one penny"),
        ("$0.50 or $0", "fifty cents or zero dollars"),
        ("€7,000 for €3.5 million", "seven thousand euros for three point five million euros"),
        ("$20-30 or $5k", "twenty to thirty dollars or five thousand dollars"),
        ("It costs 50¢", "it costs fifty cents"),
        # decades
        ("in the 1980s", "in the nineteen eighties"),
        ("the 1900s, the 2000s and the '60s", "the nineteen hundreds the two thousands the sixties"),
        # units after numbers
        ("She is 1.6m tall and ran 400m.", "she is one point six meters tall ran four hundred meters"),
        # telephone numbers, versions, ordinals of lists
        ("Dial 555-9876.", "dial five five five nine eight seven six"),
        ("Dial (212) 555-0199", "dial two one two five five five zero one nine nine"),
        ("Dial +44 20 7946 0958", "dial four four two zero seven nine four six zero nine five eight"),
        ("100-2000 people", "one hundred to two thousand people"),
        ("Version 10.2.3 and v3.1", "version ten point two point three v three point one"),
        ("Nos. 7, No. 12 and #4", "number seven number twelve number four"),
        ("open 24/7, a 50/50 chance", "open twenty four seven a fifty fifty chance"),
        ("about ~30 cars", "about about thirty cars"),
        ("12,345,678 of them", "twelve million three hundred forty five thousand six hundred seventy eight of them"),
        # what the grammar reads right stays its own
        ("on 3/5/2024 at 3:30 pm", "on the fifth of march twenty twenty four at three thirty pm"),
        ("5% of 3 kg", "five percent of three kilograms"),
        # signs
        ("It’s a “test” – really…", "it's a test really"),
        ("pages 5–7", "pages five to seven"),
        ("ｆｕｌｌ １２", "full twelve"),
        ("**so** `it` goes __on__, snake_case", "so it goes on snake underscore case"),
        ("# Title\n- one\n> two", "title one two"),
        ("see [the page](https://example.org/a)", "see the page"),
        ("so\u200bft\u00adly 😀 ❤️ now", "softly now"),
        ("+ in 1999 ##", "in nineteen ninety nine"),  # a sign that the grammar fails at takes no number with it
    ],
)
def test_english(normalizer: TextNormalizer, text: str, spoken: str) -> None:
    assert words_of(normalizer.normalize(text)) == words_of(spoken)


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("共¥12.5元", "共十二点五元"),
        ("电话是13800138000", "电话是一三八零零一三八零零零"),
        ("型号303B", "型号三零三B"),
        ("我有12345个苹果", "我有一万二千三百四十五个苹果"),
        ("ＡＢＣ，好", "ABC，好"),
        ("好\u200b的👍", "好的"),
    ],
)
def test_chinese(normalizer: TextNormalizer, text: str, spoken: str) -> None:
    assert normalizer.normalize(text) == spoken


SIGNS = string.ascii_letters + " .,;:!?'\"-–—*_#>`~()[]{}/\\|@&%$£€¥+=<^°²③№™😀\u200b\u00a0\ufe0f\n\tçéßяλ中。，"


@pytest.mark.parametrize("chinese", [False, True])
def test_no_letter_is_lost_or_invented(chinese: bool) -> None:
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices(SIGNS, k=draw.randrange(30))).replace("](", "] (")  # a link's address is not said
        found = cleaned(text, chinese)
        found = chinese_words(found) if chinese else english_words(found, SPELL)
        assert [sign for sign in found if sign.isalnum()] == [sign for sign in text if sign.isalnum()]


def test_no_number_raises_or_stays_unread(normalizer: TextNormalizer) -> None:
    draw = random.Random(1)
    for _ in range(400):
        text = "a" + "".join(draw.choices(string.digits * 2 + " .,-/:$£€%#~mskv()'", k=draw.randrange(16)))
        assert not any(map(str.isdigit, normalizer.normalize(text))), text


def test_endless_digits_are_read_one_by_one_in_linear_time(normalizer: TextNormalizer) -> None:
    assert normalizer.normalize("9" * 20_000).split() == ["nine"] * 20_000


def test_plain_rules_stay_those_of_the_public_code() -> None:
    assert TextNormalizer(list, None).normalize("It’s **so** much") == "It’s **so** much"
