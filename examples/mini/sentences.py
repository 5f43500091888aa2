"""Draws distinct English sentences from our own grammar or WordNet's examples, without those of the evaluation."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosyvoice.runtime.errors import InputError
from examples.mini.voices import PACKAGES

if TYPE_CHECKING:
    from cosyvoice.tokenizer.phones import PhoneTokenizer

FOLDER = Path(__file__).parent
GRAMMAR_FILE = FOLDER / "grammar.txt"
JUDGED = (
    FOLDER / "eval_sentences.txt", FOLDER / "tune_sentences.txt", *sorted((FOLDER.parent / "raw_audio").glob("*.txt")),
)  # fmt: skip
START = "sentence"
RUN_WORDS = 5  # a sentence that shares this many words in a row with a judged one is excluded
MAX_WORDS = 22  # longer ones strain the engines' voices, and take memory in training
MAX_ATTEMPTS = 1000  # draws for one new sentence; far fewer suffice until the grammar is exhausted
WORDNET = Path("/usr/share/wordnet")  # from Debian's wordnet-base
EXAMPLE_WORDS = range(4, 15)  # shorter ones are not sentences; two of these fit into one utterance
TWO_AT_ONCE = 0.5  # share of utterances with two examples, since most are short

SYMBOL = re.compile(r"<(\w+)>")
EXAMPLE = re.compile(r'"([^"]+)"')
PLAIN = re.compile(r"(?!.*[A-Z]{2})[A-Za-z'-]+(?:[,;:]? [A-Za-z'-]+)*[.?!]?")  # no figures, no abbreviations
ARTICLE = re.compile(r"\b([Aa])(?= (?:hour|honest|[aeio]|u(?!ni|se|su)))")  # a uniform, a useful, a usual


class Grammar:
    """A context-free grammar of named rules, whose alternatives have weights; <name> stands for a rule.

    Raises InputError if an alternative uses a rule that does not exist.
    """

    def __init__(self, text: str) -> None:
        self.rules: dict[str, tuple[list[str], list[int]]] = {}  # name -> alternatives, weights
        for line in text.splitlines():
            if line and not line.startswith("#"):
                self._read_line(line)
        for name, (alternatives, _) in self.rules.items():
            unknown = {symbol for text in alternatives for symbol in SYMBOL.findall(text)} - self.rules.keys()
            if unknown:
                raise InputError(f"grammar: rule {name} uses {', '.join(sorted(unknown))}. Add these rules")

    def _read_line(self, line: str) -> None:
        head = re.match(r"(\w+):\s*", line)
        if head:
            self.name = head[1]
            self.rules[self.name] = ([], [])
            line = line[head.end() :]
        alternatives, weights = self.rules[self.name]
        weight = re.match(r"(\d+) ", line)
        for alternative in filter(None, (part.strip() for part in line[weight.end() if weight else 0 :].split("|"))):
            alternatives.append(alternative)
            weights.append(int(weight[1]) if weight else 1)

    def expand(self, name: str, draw: random.Random) -> str:
        """Return a random expansion of a rule."""
        alternatives, weights = self.rules[name]
        [chosen] = draw.choices(alternatives, weights)
        return SYMBOL.sub(lambda symbol: self.expand(symbol[1], draw), chosen)


class Exclusion:
    """The set of sentences that must not be drawn: those that share RUN_WORDS words in a row with a judged one.

    A shorter judged sentence is excluded as a whole. With a tokenizer, sentences with a word that its lexicon lacks are
    excluded too.
    """

    def __init__(self, sentences: Iterable[str], tokenizer: "PhoneTokenizer | None" = None) -> None:
        self.runs = {run for sentence in sentences for run in word_runs(sentence)}
        self.tokenizer = tokenizer

    def __contains__(self, sentence: str) -> bool:
        unknown = self.tokenizer is not None and not self.tokenizer.knows(sentence)
        return unknown or not self.runs.isdisjoint(word_runs(sentence))


def word_runs(sentence: str) -> Iterator[tuple[str, ...]]:
    """Yield all runs of RUN_WORDS words, without case and punctuation; a shorter sentence is one run."""
    words = re.findall(r"[a-z']+", sentence.lower())
    for start in range(max(len(words) - RUN_WORDS, 0) + 1):
        yield tuple(words[start : start + RUN_WORDS])


def read_sentences(files: Iterable[Path]) -> list[str]:
    """Return the lines of text files. Raises InputError if one is missing, since its sentences would be trained on."""
    lines = []
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} does not exist. It lists sentences that must not be trained on, so put it back")
        lines += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines


def draw_sentences(seed: int, exclusion: Exclusion, grammar: Grammar | None = None) -> Iterator[str]:
    """Yield distinct sentences, the same for the same seed. Raises InputError when the grammar has no more."""
    grammar = grammar or Grammar(GRAMMAR_FILE.read_text(encoding="utf-8"))
    draw, seen = random.Random(seed), set()
    while True:
        for _ in range(MAX_ATTEMPTS):
            sentence = polish(grammar.expand(START, draw))
            if sentence not in seen and sentence not in exclusion and len(sentence.split()) <= MAX_WORDS:
                break
        else:
            raise InputError(f"the grammar gives no more than {len(seen)} sentences. Ask for fewer")
        seen.add(sentence)
        yield sentence


def polish(sentence: str) -> str:
    """Return the sentence with an initial capital, also after a quotation mark, and "an" before vowels."""
    return capitalize(ARTICLE.sub(r"\1n", sentence))


def capitalize(sentence: str) -> str:
    return re.sub(r"\w", lambda letter: letter[0].upper(), sentence, count=1)


def read_examples(folder: Path = WORDNET) -> list[str]:
    """Return WordNet's examples of how its words are used (Fellbaum 1998), as sentences.

    Their vocabulary is much larger than the grammar's. Raises InputError if WordNet is not installed.
    """
    examples = set()
    for part in ("noun", "verb", "adj", "adv"):
        file = folder / f"data.{part}"
        if not file.is_file():
            raise InputError(f"{file} does not exist; {PACKAGES}")
        for line in file.read_text(encoding="latin-1").splitlines():
            examples.update(EXAMPLE.findall(line.partition(" | ")[2]))
    good = (text for text in examples if PLAIN.fullmatch(text) and len(text.split()) in EXAMPLE_WORDS)
    return sorted({capitalize(text if text[-1] in ".?!" else f"{text}.") for text in good})


def draw_examples(seed: int, exclusion: Exclusion, examples: Sequence[str]) -> Iterator[str]:
    """Yield examples in random order, one or two at once. Raises InputError when all are drawn."""
    draw = random.Random(seed)
    remaining = draw.sample(examples, len(examples))
    while len(remaining) > 1:
        sentence = remaining.pop()
        if draw.random() < TWO_AT_ONCE:
            sentence = f"{sentence} {remaining.pop()}"
        if sentence not in exclusion and len(sentence.split()) <= MAX_WORDS:
            yield sentence
    raise InputError(f"there are no more than {len(examples)} examples. Ask for fewer sentences")
