"""Faults of style that anyone sees at a glance: repetition, doubled words, words that are none. Knows no facts.

What it cannot see is bad grammar made of good words.
"""

import functools
import itertools
import re
from collections import Counter

from tools.e2e.files import DATA, read_rows
from tools.e2e.instructions import NOT_STATED
from tools.e2e.patterns import plain, plain_without_places

_WORD = re.compile(r"[a-z]{2,}(?:'[a-z]+)?")
_PHRASE = 4
"""Words in a phrase that is a fault when it comes twice; place names count as one word."""


@functools.cache
def known_words() -> frozenset[str]:
    """Every word that people used at least twice in the texts of the training split, and those of `NOT_STATED`."""
    counts = Counter(
        word
        for row in read_rows(DATA / "demonstrations.train.jsonl.gz")
        for word in _WORD.findall(plain(row["response"]))
    )
    return frozenset(word for word, count in counts.items() if count >= 2) | set(_WORD.findall(plain(NOT_STATED)))


@functools.lru_cache(maxsize=65_536)
def faults(text: str) -> int:
    """Repeated sentences, repeated phrases (once a text), doubled words, and words nobody uses, counted together.

    An empty text has one fault.
    """
    clean = plain_without_places(text)
    words = clean.split()
    if not words:
        return 1
    sentences = [part.strip() for part in re.split(r"[.!?;]", clean) if part.strip()]
    repeated_sentences = len(sentences) - len(set(sentences))
    phrases = [tuple(words[i : i + _PHRASE]) for i in range(len(words) - _PHRASE + 1)]
    repeated_phrase = len(set(phrases)) < len(phrases)
    doubled = sum(first == second for first, second in itertools.pairwise(words))
    unknown = len(set(_WORD.findall(clean)) - known_words())
    return repeated_sentences + repeated_phrase + doubled + unknown
