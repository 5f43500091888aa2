#!/usr/bin/env python3
"""Write the pronunciation lexicon of CosyVoice-mini, from Debian's copy of the CMU dictionary.

    examples/mini/make_lexicon.py --output data/mini/lexicon.txt.gz

Each line is `word PHONE PHONE ...`, with one pronunciation per word. `a.` to `z.` are the names of the letters. Equal
dictionaries give equal bytes.
"""

import argparse
import gzip
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DICTIONARY = Path("/usr/share/festival/dicts/cmu/cmudict-0.4.out")  # from Debian's festlex-cmu
ENTRY = re.compile(r'\("([A-Za-z]+)" (\w+) \((.*)\)\)')  # ("abuse" v (((ax) 0) ((b y uw z) 1)))
SYLLABLE = re.compile(r"\(\(([a-z ]+)\) ([01])\)")

# Of two pronunciations the first is taken, the noun's, except for these words, whose verb is more frequent.
VERBS = """
aged close collect combine conduct confine converse convert compress dictate does excuse exploit extract houses
implement impress insert invite lead live lives permit proceed produce putting reading refuse reject suspect upset use
uses
"""
# Words that are unstressed in a sentence, but have the stress of isolated words in the dictionary.
UNSTRESSED = """
and or nor but if as than at by for in on with into am is are were be have has had will would can could should
i you he she it we they me him us them my your his its our their
"""
SPELLED_OUT = ("AI", "AM", "CIA", "ID", "IRA", "LED", "OS", "UN", "US")  # abbreviations that look like words
ADDED = """
a ax0
an ax0 n
the dh ax0
to t ax0
of ax0 v
from f r ax0 m
was w ax0 z
read r iy1 d
dr d aa1 k t er0
missus m ih1 s ax0 z
minute m ih1 n ax0 t
i'm ay1 m
you're y uh1 r
we're w ih1 r
they're dh eh1 r
i've ay1 v
you've y uw1 v
we've w iy1 v
they've dh ey1 v
who've hh uw1 v
could've k uh1 d ax0 v
would've w uh1 d ax0 v
should've sh uh1 d ax0 v
might've m ay1 t ax0 v
must've m ah1 s t ax0 v
i'll ay1 l
you'll y uw1 l
he'll hh iy1 l
she'll sh iy1 l
it'll ih1 t ax0 l
we'll w iy1 l
they'll dh ey1 l
who'll hh uw1 l
that'll dh ae1 t ax0 l
there'll dh eh1 r ax0 l
i'd ay1 d
you'd y uw1 d
he'd hh iy1 d
she'd sh iy1 d
it'd ih1 t ax0 d
we'd w iy1 d
they'd dh ey1 d
who'd hh uw1 d
that'd dh ae1 t ax0 d
there'd dh eh1 r d
how'd hh aw1 d
ain't ey1 n t
aren't aa1 r n t
can't k ae1 n t
couldn't k uh1 d ax0 n t
didn't d ih1 d ax0 n t
doesn't d ah1 z ax0 n t
don't d ow1 n t
hadn't hh ae1 d ax0 n t
hasn't hh ae1 z ax0 n t
haven't hh ae1 v ax0 n t
isn't ih1 z ax0 n t
mightn't m ay1 t ax0 n t
mustn't m ah1 s ax0 n t
needn't n iy1 d ax0 n t
shouldn't sh uh1 d ax0 n t
wasn't w aa1 z ax0 n t
weren't w er1 n t
won't w ow1 n t
wouldn't w uh1 d ax0 n t
o'clock ax0 k l aa1 k
ma'am m ae1 m
y'all y ao1 l
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to write: lexicon.txt.gz")
    options = parser.parse_args(argv)

    from cosyvoice.runtime.errors import InputError
    from cosyvoice.utils.file_utils import atomic_write

    if not DICTIONARY.is_file():
        raise InputError(f"{DICTIONARY} does not exist. Run: apt-get install festlex-cmu")
    lexicon = make_lexicon(DICTIONARY.read_text(encoding="latin-1").splitlines())
    lines = "".join(f"{word} {phones}\n" for word, phones in sorted(lexicon.items()))
    with atomic_write(options.output) as temporary:
        temporary.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))
    print(f"{options.output}: {len(lexicon)} entries, {options.output.stat().st_size / 1e6:.2f} MB")


def make_lexicon(dictionary: Iterable[str]) -> dict[str, str]:
    """Return each word's phones from the lines of Festival's dictionary. Lines of another form are skipped."""
    lexicon: dict[str, str] = {}
    verbs = set(VERBS.split())
    names: dict[str, str] = {}
    for word, tag, syllables in (found.groups() for found in map(ENTRY.fullmatch, dictionary) if found):
        word, phones = word.lower(), phones_of(syllables)
        if len(word) == 1:
            names[f"{word}."] = phones  # the noun "a", which is its name, comes after the article
        if word not in lexicon or (word in verbs and tag == "v"):
            lexicon[word] = phones
    lexicon |= {word: lexicon[word].replace("1", "0") for word in UNSTRESSED.split() if word in lexicon}
    added = dict(line.split(" ", 1) for line in ADDED.strip().splitlines())
    spelled_out = {word: " ".join(names[f"{letter}."] for letter in word.lower()) for word in SPELLED_OUT}
    return lexicon | names | added | spelled_out


def phones_of(syllables: str) -> str:
    """Return the phones of syllables: `ax0 b aw1 t` for `((ax) 0) ((b aw t) 1)`."""
    phones = []
    for sounds, stress in SYLLABLE.findall(syllables):
        phones += [sound + stress if sound[0] in "aeiou" else sound for sound in sounds.split()]
    return " ".join(phones)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
