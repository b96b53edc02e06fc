"""What an evaluation leaves behind: tables on the terminal and in Markdown, one line a number, one line a text.

Knows what was found (`align.measure.Results`), not how.
"""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from align import atomic
from align.bootstrap import Interval
from align.measure import Finding, Results
from align.sample import json_lines

ARROWS: Mapping[str, str] = {"higher": " ↑", "lower": " ↓"}

CONSTANT = 2
"""Decimals of a row without any spread."""

WIDTH = 100
"""Columns of the terminal, where the output is none."""


@dataclass(frozen=True)
class Side:
    """Findings side by side: metrics in rows, models in columns."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    """Label and one cell a column; empty where nothing was measured."""


def write(
    run_dir: Path, results: Results, *, reference: str, win_by: str | None, temperatures: Mapping[str, float]
) -> None:
    """Writes table.md, table.csv, texts.jsonl and results.json, and prints the tables.

    Args:
        run_dir: A folder that exists.
        results: What was found.
        reference: The model that KL and wins are measured against.
        win_by: What decides who wins.
        temperatures: Of the samplers, by name.
    """
    labels = _labels(results, reference)
    sides = _sides(results, labels, temperatures)
    note = "± is half the width of the 95 % confidence interval (bootstrap over prompts); ↑ higher is better, ↓ lower."
    if win_by is not None:
        note += f" Wins: share of prompts answered better than by {reference}, judged by {labels[win_by]}; ties half."
    atomic.write_text(run_dir / "table.md", "\n".join([*map(_markdown, sides), note, ""]))
    atomic.write_text(run_dir / "table.csv", _csv(results.findings))
    atomic.write_text(run_dir / "texts.jsonl", json_lines(_texts(results)))
    found = {
        "prompts": len(results.prompts.rows),
        "reference": reference,
        "win_by": win_by,
        "temperatures": dict(temperatures),
        "better": results.better,
        "findings": [_flat(finding) for finding in results.findings],
        "agreement": results.agreement,
    }
    atomic.write_text(run_dir / "results.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for side in sides:
        console.print(_rich(side))
    console.print(note, highlight=False)


def side_by_side(title: str, findings: Sequence[Finding], labels: Mapping[str, str]) -> Side:
    """Models in the order in which they appear, metrics in the order of `labels`."""
    cells: dict[str, dict[str, Interval]] = {}
    for finding in findings:
        cells.setdefault(finding.metric, {})[finding.model] = finding.value
    columns = list(dict.fromkeys(finding.model for finding in findings))
    rows = []
    for metric in (name for name in labels if name in cells):
        found = cells[metric]
        spread = [value.decimals for value in found.values() if value.half_width > 0.0]
        decimals = statistics.median_high(spread) if spread else CONSTANT
        rows.append((labels[metric], [found[name].shown(decimals) if name in found else "" for name in columns]))
    return Side(title, columns, rows)


def _labels(results: Results, reference: str) -> dict[str, str]:
    """What to call each metric in the tables, in their order."""
    named = {"win": f"wins against {reference}", "kl": f"KL to {reference}, nats", "length": "length, tokens"}
    labels = {
        name: named.get(name, name.replace("_", " ")) + ARROWS.get(way, "") for name, way in results.better.items()
    }
    for finding in results.findings:
        kind, _, rest = finding.metric.partition("/")
        if kind == "loss":
            corpus, _, above = rest.partition("/")
            name = corpus.replace("_", " ")
            labels[finding.metric] = f"above {reference}'s on {name} ↓" if above else f"on {name} ↓"
        elif kind == "agreement":
            labels[finding.metric] = f"with {rest} ↑"
    return labels


def _sides(results: Results, labels: Mapping[str, str], temperatures: Mapping[str, float]) -> list[Side]:
    prompts = len(results.prompts.rows)
    titles = {name: f"{name}: {prompts:,} prompts, temperature {warm:g}" for name, warm in temperatures.items()}
    parts = [(title, [f for f in results.findings if f.sampler == name]) for name, title in titles.items()]
    others = {"loss": "Loss in nats a token", "agreement": "Pairs ordered as labelers did"}
    parts += [
        (title, [f for f in results.findings if f.metric.startswith(f"{kind}/")]) for kind, title in others.items()
    ]
    return [side_by_side(title, findings, labels) for title, findings in parts if findings]


def _rich(side: Side) -> Table:
    table = Table(title=side.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in side.columns:
        table.add_column(name, justify="right")
    for label, cells in side.rows:
        table.add_row(label, *cells)
    return table


def _markdown(side: Side) -> str:
    lines = [
        ["", *side.columns],
        ["---", *("---:" for _ in side.columns)],
        *([label, *cells] for label, cells in side.rows),
    ]
    return f"## {side.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _flat(finding: Finding) -> dict[str, Any]:
    names = {"model": finding.model, "sampler": finding.sampler, "metric": finding.metric}
    return names | asdict(finding.value)


def _csv(findings: Sequence[Finding]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["model", "sampler", "metric", "mean", "low", "high", "n"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_flat(finding) for finding in findings)
    return text.getvalue()


def _texts(results: Results) -> list[dict[str, Any]]:
    """One row a text, those to one prompt together: the prompt's fields without its references, and the numbers."""
    rows = []
    spot = {
        key: {prompt: text for text, prompt in enumerate(texts.place.tolist())} for key, texts in results.texts.items()
    }
    numbers = {key: {name: values.tolist() for name, values in found.items()} for key, found in results.numbers.items()}
    for prompt, row in enumerate(results.prompts.rows):
        fields = {name: value for name, value in row.items() if name != "references"}
        for (sampler, model), texts in results.texts.items():
            at = spot[sampler, model].get(prompt)
            if at is None:
                continue
            known = {name: values[prompt] for name, values in numbers[sampler, model].items()}
            rows.append(
                {
                    **fields,
                    "model": model,
                    "sampler": sampler,
                    "response": texts.responses[at],
                    "finished": bool(texts.completions.finished[at]),
                    "numbers": {name: value for name, value in known.items() if value == value},
                }
            )
    return rows
