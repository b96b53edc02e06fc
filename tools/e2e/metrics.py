"""What `align.evaluate` measures on this task: facts in descriptions, and short answers. Independent of any model."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tools.e2e.facts import check
from tools.e2e.instructions import answer_is_right


class FactMetrics:
    """Missing and wrong facts of descriptions, and whether questions are answered rightly, text by text."""

    better: ClassVar[Mapping[str, str]] = {
        "missing": "lower",
        "wrong": "lower",
        "missing_or_wrong": "lower",
        "hallucination": "lower",
        "right_answer": "higher",
        "rightly_not_stated": "higher",
    }
    """Metric -> which way is better."""

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], responses: Sequence[str], finished: Sequence[bool]
    ) -> dict[str, list[float | None]]:
        """One value a text and metric; None where the metric does not apply to the row's category.

        Args:
            rows: prompt rows with `prompt`, `sheet` and `category`, one a response.
            responses: what a model answered, without EOS.
            finished: whether it ended with EOS. A text that was cut is judged by what it says.

        Raises:
            ValueError: the three differ in length, or a row's category is none of the task's.
        """
        if not len(rows) == len(responses) == len(finished):
            raise ValueError(
                f"Expected a response and a flag for each row, got {len(rows)} rows, {len(responses)} responses and "
                f"{len(finished)} flags."
            )
        values = [_of_text(row, text) for row, text in zip(rows, responses, strict=True)]
        return {name: [found.get(name) for found in values] for name in self.better}


def _of_text(row: Mapping[str, Any], text: str) -> dict[str, float]:
    category = row["category"]
    if category == "question":
        return {"right_answer": float(answer_is_right(row, text))}
    if category == "unanswerable":
        return {"rightly_not_stated": float(answer_is_right(row, text))}
    if category != "describe":
        raise ValueError(f"Expected the category describe, question or unanswerable, got {category!r}.")
    facts = check(row["sheet"], text)
    return {
        "missing": float(len(facts.missing)),
        "wrong": float(len(facts.wrong)),
        "missing_or_wrong": float(facts.errors),
        "hallucination": float(bool(facts.wrong)),
    }
