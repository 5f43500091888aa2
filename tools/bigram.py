"""A bigram language model of a few sentences, in ARPA format: it tells a recogniser which words may be said at all."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

START, END = "<s>", "</s>"
DISCOUNT = 0.5  # taken from every bigram's count; what it frees goes to words never seen in that place
NEVER = -99.0  # log10 of the probability of a sentence's start, which no word is followed by


class Bigram:
    """Absolute discounting, interpolated with the unigrams (Ney, Essen and Kneser 1994).

    p(w | h) = max(c(h, w) - D, 0) / c(h) + weight(h) p(w), where weight(h) = D n(h) / c(h) and n(h) is the number of
    different words seen after h.
    """

    def __init__(self, sentences: Iterable[Sequence[str]]) -> None:
        self.after: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for sentence in sentences:
            for history, word in pairwise([START, *sentence, END]):
                self.after[history][word] += 1
        counts = sum(self.after.values(), Counter())
        self.unigrams = {word: count / counts.total() for word, count in sorted(counts.items())}

    def backoff_weight(self, history: str) -> float:
        following = self.after[history]
        return DISCOUNT * len(following) / following.total()

    def probability(self, word: str, history: str) -> float:
        """p(word | history), for histories that occur."""
        following = self.after[history]
        seen = max(following[word] - DISCOUNT, 0) / following.total()
        return seen + self.backoff_weight(history) * self.unigrams[word]

    def arpa(self) -> str:
        """The model as text: log10 probabilities, and log10 back-off weights behind the words that have followers."""
        bigrams = [(history, word) for history in sorted(self.after) for word in sorted(self.after[history])]
        lines = ["\\data\\", f"ngram 1={len(self.unigrams) + 1}", f"ngram 2={len(bigrams)}", "", "\\1-grams:"]
        lines += [f"{NEVER} {START} {math.log10(self.backoff_weight(START)):.6f}"]
        for word, probability in self.unigrams.items():
            weight = "" if word == END else f" {math.log10(self.backoff_weight(word)):.6f}"
            lines.append(f"{math.log10(probability):.6f} {word}{weight}")
        lines += ["", "\\2-grams:"]
        lines += [f"{math.log10(self.probability(word, history)):.6f} {history} {word}" for history, word in bigrams]
        return "\n".join([*lines, "", "\\end\\", ""])
