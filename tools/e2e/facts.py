"""Which facts of its sheet a text leaves out and which it states wrongly or invents; the checker's own error rate.

`python -m tools.e2e.facts` measures the checker on what people wrote and on what people flagged.
"""

import functools
import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tools.e2e.files import DATA, read_rows
from tools.e2e.patterns import stated
from tools.e2e.sheets import SLOTS, SPLITS, parse

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
        "average": frozenset({"mid", "3/5", "~mid", "~good"}),
        "3 out of 5": frozenset({"mid", "3/5", "~mid", "~good"}),
        "high": frozenset({"high", "5/5", "~high", "~good"}),
        "5 out of 5": frozenset({"high", "5/5", "~high", "~good"}),
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
        against = frozenset(mark for mark in against if mark[-1].isdigit() or mark == "odd")
    if slot == "eat type" and expressed:
        # People call every place that serves food a restaurant; they mind only where it is no other kind as well.
        against -= {"restaurant"}
    return expressed, bool(against)


@dataclass(frozen=True)
class Detection:
    """How well one yes-or-no judgement of the checker agrees with people's."""

    texts: int
    """Texts that a majority of people judged one way."""
    precision: float
    recall: float
    accuracy: float
    """Against the majority."""
    accuracy_each: float
    """Against each person's judgement."""
    people: float
    """How often two people who judged the same text agree: no checker can be expected to do better."""


def detection(word: str) -> Detection:
    """Compares the checker with the human `flags` of the rankings: `word` is `missing` or `added`.

    Raises:
        ValueError: there is no such flag.
    """
    if word not in {"missing", "added"}:
        raise ValueError(f"Expected the flag 'missing' or 'added', got {word!r}.")
    votes: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in read_rows(DATA / "rankings.rankme.jsonl.gz"):
        for text, flag in zip(row["responses"], row["flags"], strict=True):
            if flag:
                votes[row["prompt"], text].append(word in flag)
    found = {key: bool(check(*key).missing if word == "missing" else check(*key).wrong) for key in votes}
    majority = {key: 2 * sum(said) > len(said) for key, said in votes.items() if 2 * sum(said) != len(said)}
    hits = sum(found[key] and truth for key, truth in majority.items())
    pairs = [a == b for said in votes.values() for a, b in itertools.combinations(said, 2)]
    return Detection(
        texts=len(majority),
        precision=hits / sum(found[key] for key in majority),
        recall=hits / sum(majority.values()),
        accuracy=statistics.mean(found[key] == truth for key, truth in majority.items()),
        accuracy_each=statistics.mean(found[key] == said for key, all_said in votes.items() for said in all_said),
        people=statistics.mean(pairs),
    )


def scores_by_errors(criterion: str) -> dict[int, list[float]]:
    """Number of errors the checker finds -> the scores people gave such texts by a criterion of the rankings."""
    scores: dict[int, list[float]] = defaultdict(list)
    for row in read_rows(DATA / "rankings.rankme.jsonl.gz"):
        if row["criterion"] == criterion:
            for text, score in zip(row["responses"], row["scores"], strict=True):
                scores[check(row["prompt"], text).errors].append(score)
    return dict(sorted(scores.items()))


def main() -> None:
    """Prints the checker's own error rate: against flags, against scores, and on what people wrote."""
    console = Console()
    table = Table("people flagged", "texts", "precision", "recall", "accuracy", "with each person", "two people")
    table.title = "Checker against human flags (majority of each text's judges)"
    for word in ("missing", "added"):
        result = detection(word)
        shares = (result.precision, result.recall, result.accuracy, result.accuracy_each, result.people)
        table.add_row(word, str(result.texts), *(f"{share:.3f}" for share in shares))
    console.print(table)
    table = Table("criterion", *(f"{count} errors" for count in range(4)), title="Mean human score by errors found")
    for criterion in ("informativeness", "quality", "naturalness"):
        scores = scores_by_errors(criterion)
        means = [f"{statistics.mean(scores[k]):.1f} ({len(scores[k])})" if k in scores else "-" for k in range(4)]
        table.add_row(criterion, *means)
    console.print(table)
    table = Table("split", "texts", "missing", "wrong", "no error", "most often missing, wrong")
    table.title = "Facts a human text leaves out or gets wrong"
    for split in SPLITS:
        rows = list(read_rows(DATA / f"demonstrations.{split}.jsonl.gz"))
        table.add_row(split, f"{len(rows):,}", *_summary([check(row["prompt"], row["response"]) for row in rows]))
    console.print(table)


def _summary(found: Sequence[Facts]) -> list[str]:
    missing = [slot for facts in found for slot in facts.missing]
    wrong = [slot for facts in found for slot in facts.wrong]
    clean = sum(facts.errors == 0 for facts in found) / len(found)
    worst = f"{statistics.mode(missing)}, {statistics.mode(wrong)}"
    return [f"{len(missing) / len(found):.3f}", f"{len(wrong) / len(found):.3f}", f"{clean:.3f}", worst]


if __name__ == "__main__":
    main()
