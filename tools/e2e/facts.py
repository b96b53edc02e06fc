"""Which facts of its sheet a text leaves out and which it states wrongly or invents; the checker's own error rate.

`python -m tools.e2e.facts` measures the checker on what people wrote and on what people flagged.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from tools.e2e.patterns import stated
from tools.e2e.sheets import SLOTS, parse

_FITS: Mapping[str, Mapping[str, frozenset[str]]] = {
    "price range": {
        "cheap": frozenset({"low", "<20"}),
        "less than £20": frozenset({"low", "<20"}),
        "moderate": frozenset({"mid", "20-25"}),
        "£20-25": frozenset({"mid", "20-25"}),
        "high": frozenset({"high", ">30"}),
        "more than £30": frozenset({"high", ">30"}),
    },
    "customer rating": {
        "low": frozenset({"low", "1/5"}),
        "1 out of 5": frozenset({"low", "1/5"}),
        "average": frozenset({"mid", "3/5"}),
        "3 out of 5": frozenset({"mid", "3/5"}),
        "high": frozenset({"high", "5/5"}),
        "5 out of 5": frozenset({"high", "5/5"}),
    },
}
"""A word and a number of the same level are one value: people write `cheap` for `less than £20` and the reverse."""

_GENERIC = frozenset({"restaurant"})
"""People call every place that serves food a restaurant, so the word contradicts no eat type."""


@dataclass(frozen=True)
class Facts:
    """What is the matter with a text, given its sheet."""

    missing: tuple[str, ...]
    """Slots of the sheet that the text does not express."""
    wrong: tuple[str, ...]
    """Slots of which the text states a value that the sheet contradicts or does not give."""

    @property
    def errors(self) -> int:
        """How many facts are missing or wrong."""
        return len(self.missing) + len(self.wrong)


def check(sheet: str, text: str) -> Facts:
    """Compares a text with its fact sheet (or the whole prompt: only the first line is read).

    A slot whose value is replaced by another one is both missing and wrong.
    """
    facts = parse(sheet)
    marks = stated(text)
    missing, wrong = [], []
    for slot in SLOTS:
        said = marks["name"] if slot == "near" else marks[slot]
        expressed, contradicted = _compare(slot, facts, said)
        if slot in facts and not expressed:
            missing.append(slot)
        if contradicted:
            wrong.append(slot)
    return Facts(tuple(missing), tuple(wrong))


def _compare(slot: str, facts: Mapping[str, str], said: frozenset[str]) -> tuple[bool, bool]:
    """Whether the sheet's value is among what was said of the slot, and whether something else is."""
    value = facts.get(slot)
    if slot == "name":
        return value in said, False
    if slot == "near":
        return value in said, bool(said - {value, facts.get("name")})
    fits = _FITS[slot][value] if slot in _FITS and value else frozenset({value} if value else ())
    strong = frozenset(mark for mark in said if not mark.startswith("~")) - _GENERIC
    expressed = bool(fits & frozenset(mark.lstrip("~") for mark in said))
    return expressed, bool(strong - fits)


@functools.lru_cache(maxsize=65_536)
def errors(sheet: str, text: str) -> int:
    """Missing and wrong facts together."""
    return check(sheet, text).errors
