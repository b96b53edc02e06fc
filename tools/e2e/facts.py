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
        "cheap": frozenset({"low", "<20", "~low", "~fair", "~20"}),
        "less than £20": frozenset({"low", "<20", "~low", "~fair", "~20"}),
        "moderate": frozenset({"mid", "20-25", "~fair"}),
        "£20-25": frozenset({"mid", "20-25", "~fair"}),
        "high": frozenset({"high", ">30", "~high", "~30"}),
        "more than £30": frozenset({"high", ">30", "~high", "~30"}),
    },
    "customer rating": {
        "low": frozenset({"low", "1/5", "~low"}),
        "1 out of 5": frozenset({"low", "1/5", "~low"}),
        "average": frozenset({"mid", "3/5", "~mid"}),
        "3 out of 5": frozenset({"mid", "3/5", "~mid"}),
        "high": frozenset({"high", "5/5", "~high"}),
        "5 out of 5": frozenset({"high", "5/5", "~high"}),
    },
}
"""A word and a number of the same level are one value: people write `cheap` for `less than £20` and the reverse."""


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


@functools.lru_cache(maxsize=65_536)
def check(sheet: str, text: str) -> Facts:
    """Compares a text with its fact sheet (or the whole prompt: only the first line is read).

    A slot whose value is replaced by another one is both missing and wrong.

    Raises:
        ValueError: the sheet is not one (see `tools.e2e.sheets.parse`).
    """
    facts = parse(sheet)
    marks = stated(text)
    missing, wrong = [], []
    for slot in SLOTS:
        expressed, contradicted = _compare(slot, facts, marks)
        if slot in facts and not expressed:
            missing.append(slot)
        if contradicted:
            wrong.append(slot)
    return Facts(tuple(missing), tuple(wrong))


def _compare(slot: str, facts: Mapping[str, str], marks: Mapping[str, frozenset[str]]) -> tuple[bool, bool]:
    """Whether the sheet's value is among what was said of the slot, and whether something else is."""
    value = facts.get(slot)
    if slot == "name":
        # Another place's name is counted once, under `near`.
        return value in marks["name"], False
    if slot == "near":
        near_itself = facts.get("name") in marks["near"] - {value}
        return value in marks["name"], near_itself or bool(marks["name"] - {value, facts.get("name")})
    said = marks[slot]
    if value is None:
        return False, any(not mark.startswith("~") for mark in said - {"restaurant"})
    fits = _FITS[slot][value] if slot in _FITS else frozenset({value, f"~{value}"})
    against = frozenset(mark for mark in said - fits if not mark.startswith("~"))
    expressed = bool(said & fits)
    if slot in _FITS and any(mark[-1].isdigit() for mark in said & fits):
        # `an average price of more than £30`: the number says which, the word is no second statement.
        against = frozenset(mark for mark in against if mark[-1].isdigit())
    if slot == "eat type" and expressed:
        # People call every place that serves food a restaurant; they mind only where it is no other kind as well.
        against -= {"restaurant"}
    return expressed, bool(against)
