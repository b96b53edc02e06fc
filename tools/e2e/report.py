"""`python -m tools.e2e.report --runs runs --out runs/report`: pictures of the runs, and in words what they show.

Reads what `align.fit` and `align.evaluate` left behind. Every sentence is computed, and a target that was missed is
called missed. Knows the names of the default run's folders and models.
"""

import argparse
import csv
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from align import seeds
from align.atomic import write_text
from align.bootstrap import Interval, mean_intervals, ratio_intervals
from tools.e2e import plots
from tools.e2e.facts import check
from tools.e2e.files import read_rows

RUNS: Mapping[str, str] = {"PPO": "ppo", "PPO-ptx": "ppo-ptx"}
"""Model -> folder of the run that trained it."""
JUDGED = "PPO-ptx"
"""The model that the targets are about."""
FEWER, WON, LOSS = 0.40, 0.70, 0.10
"""Targets: share of errors saved, share of pairs won, nats a token above the reference on human text."""

OVER_STEPS: Mapping[str, str] = {
    "rollout/score": "Reward, mean of the rollouts",
    "rollout/kl": "KL to SFT, nats a text",
}
RESAMPLES = 1000


@dataclass(frozen=True)
class Evaluation:
    """What `align.evaluate` found."""

    reference: str
    temperatures: Mapping[str, float]
    found: Mapping[tuple[str, str, str], Interval]
    """By sampler, model and metric."""
    texts: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]
    """By sampler and model: prompt -> what was measured of the text."""
    table: str

    @property
    def models(self) -> list[str]:
        """In the order of the tables; people, where there are any, come last."""
        return list(dict.fromkeys(model for sampler, model, _ in self.found if sampler))


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation in a folder.

    Raises:
        ValueError: There is none.
    """
    if not (folder / "results.json").is_file():
        raise ValueError(f"{folder} holds no results.json; run python -m align.evaluate configs/evaluate.yaml first")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = {}
    for row in results["findings"]:
        value = Interval(row["mean"], row["low"], row["high"], row["n"])
        found[row["sampler"], row["model"], row["metric"]] = value
    texts: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for row in read_rows(folder / "texts.jsonl"):
        texts[row["sampler"], row["model"]][row["prompt"]] = row["numbers"]
    table = (folder / "table.md").read_text(encoding="utf-8")
    return Evaluation(results["reference"], results["temperatures"], found, texts, table)


def read_series(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run, in order; empty where the run or the metric is missing."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return []
    with open(file, encoding="utf-8", newline="") as lines:
        rows = [(row["step"], row.get(name)) for row in csv.DictReader(lines)]
    return sorted((int(step), float(value)) for step, value in rows if value)


def facts_over_training(folder: Path) -> dict[int, dict[str, Interval]]:
    """Step -> missing and wrong facts a description, from the run's samples.jsonl; empty where there is none."""
    file = folder / "samples.jsonl"
    counts: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in read_rows(file) if file.is_file() else ():
        if row["category"] == "describe":
            facts = check(row["sheet"], row["response"])
            counts[row["step"]].append((float(len(facts.missing)), float(len(facts.wrong))))
    found: dict[int, dict[str, Interval]] = {}
    for step, values in sorted(counts.items()):
        both = mean_intervals(torch.tensor(values, dtype=torch.float64), RESAMPLES, seeds.generator(0, "report", step))
        missing, wrong = (value for value in both if value is not None)
        found[step] = {"missing": missing, "wrong": wrong}
    return found


def fewer_errors(evaluation: Evaluation, sampler: str, model: str) -> Interval | None:
    """The share of the reference's missing and wrong facts that a model does not make, on the same prompts."""
    own, other = (
        {
            prompt: numbers["missing_or_wrong"]
            for prompt, numbers in evaluation.texts.get((sampler, name), {}).items()
            if "missing_or_wrong" in numbers
        }
        for name in (model, evaluation.reference)
    )
    shared = [prompt for prompt in own if prompt in other]
    if not shared or not any(other[prompt] for prompt in shared):
        return None
    errors = torch.tensor([[own[prompt], other[prompt]] for prompt in shared], dtype=torch.float64)
    (ratio,) = ratio_intervals(errors[:, :1], errors[:, 1:], RESAMPLES, seeds.generator(0, "report ratio"))
    return Interval(1.0 - ratio.mean, 1.0 - ratio.high, 1.0 - ratio.low, len(shared))


# The words.


def sentences(evaluation: Evaluation, runs: Path) -> list[str]:
    """What the numbers show, one statement each."""
    reference = evaluation.reference
    models = [name for name in evaluation.models if name not in ("base", "people", reference)]
    lines = []
    for model in sorted(models, key=lambda name: name != JUDGED):
        lines += [about_errors(evaluation, sampler, model) for sampler in evaluation.temperatures]
        lines += [about_wins(evaluation, sampler, model) for sampler in evaluation.temperatures]
        lines += [about_loss(evaluation, model), about_kl(evaluation, model)]
    lines += [about_hallucinations(evaluation, sampler) for sampler in evaluation.temperatures]
    lines += [about_answers(evaluation, sampler) for sampler in evaluation.temperatures]
    lines += [about_people(evaluation), about_agreement(evaluation), about_training(runs)]
    return [line for line in lines if line]


def about_errors(evaluation: Evaluation, sampler: str, model: str) -> str:
    """Missing and wrong facts against the reference's."""
    fewer = fewer_errors(evaluation, sampler, model)
    if fewer is None:
        return ""
    own, other = (evaluation.found[sampler, name, "missing_or_wrong"] for name in (model, evaluation.reference))
    share = f"{abs(fewer.mean):.0%} {'fewer' if fewer.mean >= 0 else 'more'}"
    return (
        f"{_when(evaluation, sampler)}, **{model} makes {share} missing or wrong facts a text than "
        f"{evaluation.reference}** ({other.mean:.2f} → {own.mean:.2f}; 95% CI of the change "
        f"{_signed(-fewer.high)} to {_signed(-fewer.low)})."
        + _verdict(model, fewer.mean >= FEWER, f"at least {FEWER:.0%} fewer")
    )


def about_wins(evaluation: Evaluation, sampler: str, model: str) -> str:
    """How often the checker prefers the model's text."""
    won = evaluation.found.get((sampler, model, "win"))
    if won is None:
        return ""
    values = [numbers["win"] for numbers in evaluation.texts[sampler, model].values() if "win" in numbers]
    told_apart = [value for value in values if value != 0.5]
    rest = (
        f"{statistics.mean(told_apart):.0%} of the {len(told_apart) / len(values):.0%} that are no tie"
        if told_apart
        else "all are ties"
    )
    return (
        f"{_when(evaluation, sampler)}, {model} wins {won.mean:.0%} of pairs against {evaluation.reference} by the "
        f"noise-free checker (95% CI {won.low:.0%} to {won.high:.0%}; ties count half; {rest})."
        + _verdict(model, won.mean >= WON, f"at least {WON:.0%}")
    )


def about_loss(evaluation: Evaluation, model: str) -> str:
    """What it costs on texts that people wrote."""
    above = evaluation.found.get(("", model, "loss/human_text/above"))
    if above is None:
        return ""
    plain = evaluation.found.get(("", model, "loss/plain_text/above"))
    also = f", and on plain text {_side(plain.mean, evaluation.reference)}" if plain is not None else ""
    return (
        f"The loss of {model} on human text is {_side(above.mean, evaluation.reference)} "
        f"(95% CI {above.low:+.3f} to {above.high:+.3f}){also}."
        + _verdict(model, above.mean <= LOSS, f"at most {LOSS:.2f} nats above")
    )


def about_kl(evaluation: Evaluation, model: str) -> str:
    """How far the model went."""
    for sampler in evaluation.temperatures:
        kl = evaluation.found.get((sampler, model, "kl"))
        if kl is not None:
            length = evaluation.found[sampler, model, "length"].mean
            return (
                f"{model} is {kl.mean:.1f} ± {kl.half_width:.1f} nats of KL a text from {evaluation.reference}; its "
                f"texts have {length:.0f} tokens."
            )
    return ""


def about_hallucinations(evaluation: Evaluation, sampler: str) -> str:
    """Texts with a fact that is wrong or made up."""
    shown = _listed(evaluation, sampler, "hallucination")
    return f"{_when(evaluation, sampler)}, texts that state something wrong or made up: {shown}." if shown else ""


def about_answers(evaluation: Evaluation, sampler: str) -> str:
    """Short answers to questions."""
    answered = _listed(evaluation, sampler, "right_answer")
    declined = _listed(evaluation, sampler, "rightly_not_stated")
    if not answered or not declined:
        return ""
    return (
        f"{_when(evaluation, sampler)}, questions answered rightly: {answered}; questions that the sheet does not "
        f"answer, rightly called so: {declined}."
    )


def about_people(evaluation: Evaluation) -> str:
    """How the best model compares with the references."""
    for sampler in evaluation.temperatures:
        people = evaluation.found.get((sampler, "people", "missing_or_wrong"))
        own = evaluation.found.get((sampler, JUDGED, "missing_or_wrong"))
        if people is not None and own is not None:
            apart = own.high < people.low or own.low > people.high
            word = ("fewer than" if own.mean < people.mean else "more than") if apart else "about as many as"
            return (
                f"People leave out or get wrong {people.mean:.2f} facts a text by the same checker; {JUDGED} "
                f"{_when(evaluation, sampler).lower()}: {own.mean:.2f}, {word} people."
            )
    return ""


def about_agreement(evaluation: Evaluation) -> str:
    """The reward model and people it never saw."""
    lines = []
    for (_, judge, metric), value in evaluation.found.items():
        if metric.startswith("agreement/") and judge == "reward model":
            longer = evaluation.found["", "longer is better", metric]
            lines.append(
                f"The reward model agrees with {metric.partition('/')[2]} it never saw in {value.mean:.0%} of "
                f"{value.n:,} pairs (95% CI {value.low:.0%} to {value.high:.0%}); preferring the longer text would in "
                f"{longer.mean:.0%}."
            )
    return " ".join(lines)


def about_training(runs: Path) -> str:
    """Where the first three stages ended."""
    wanted = {
        "base": ("valid/loss", "the base model's loss on held-out text ended at {:.2f} nats a token"),
        "sft": ("valid/loss", "SFT's on held-out demonstrations at {:.2f}"),
        "reward": ("valid/accuracy", "the reward model's accuracy on held-out rankings at {:.0%}"),
    }
    series = {run: read_series(runs / run, name) for run, (name, _) in wanted.items()}
    parts = [wanted[run][1].format(points[-1][1]) for run, points in series.items() if points]
    return f"Training: {'; '.join(parts)}." if parts else ""


def _when(evaluation: Evaluation, sampler: str) -> str:
    temperature = evaluation.temperatures[sampler]
    return "With greedy decoding" if temperature == 0 else f"At temperature {temperature:g}"


def _short(evaluation: Evaluation, sampler: str) -> str:
    temperature = evaluation.temperatures[sampler]
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _listed(evaluation: Evaluation, sampler: str, metric: str) -> str:
    values = {name: evaluation.found.get((sampler, name, metric)) for name in evaluation.models}
    return ", ".join(f"{name} {value.mean:.0%}" for name, value in values.items() if value is not None)


def _signed(share: float) -> str:
    return f"{share:+.0%}".replace("-", "−")


def _side(nats: float, reference: str) -> str:
    return f"{abs(nats):.3f} nats a token {'above' if nats >= 0 else 'below'} {reference}'s"


def _verdict(model: str, met: bool, target: str) -> str:
    if model != JUDGED:
        return ""
    return f" Target ({target}): {'met' if met else '**missed**'}."


# The pictures.


def draw(evaluation: Evaluation, runs: Path, out: Path) -> list[Path]:
    """Writes every picture there is data for, and returns their paths, the overview first."""
    series = {name: {model: read_series(runs / run, name) for model, run in RUNS.items()} for name in OVER_STEPS}
    facts = {model: facts_over_training(runs / run) for model, run in RUNS.items()}
    facts = {model: found for model, found in facts.items() if found}
    curves = [
        plots.over_steps({model: points for model, points in found.items() if points}, OVER_STEPS[name])
        for name, found in series.items()
        if any(found.values())
    ]
    if facts:
        curves.append(plots.facts_over_steps(facts, "Missing and wrong facts a text"))
    bars = [*_stacks(evaluation), _wins(evaluation)]
    pictures = {"evaluation.png": ([bars], 4.3 * len(bars))}
    if curves:
        pictures["training.png"] = ([curves], 4.3 * len(curves))
    if len(curves) == len(bars):
        pictures = {"overview.png": ([curves, bars], 4.3 * len(bars)), **pictures}
    for name, (rows, width) in pictures.items():
        plots.save(out / name, rows, (width, 3.7 * len(rows)), title=headline(evaluation) if len(rows) > 1 else "")
    return [out / name for name in pictures]


def headline(evaluation: Evaluation) -> str:
    """The main result in one line."""
    for sampler in reversed(list(evaluation.temperatures)):
        fewer = fewer_errors(evaluation, sampler, JUDGED)
        if fewer is not None:
            share = f"{abs(fewer.mean):.0%} {'fewer' if fewer.mean >= 0 else 'more'}"
            when = _when(evaluation, sampler).lower()
            return f"{JUDGED} makes {share} missing or wrong facts than {evaluation.reference} {when}"
    return "Models side by side"


def _stacks(evaluation: Evaluation) -> list[plots.Draw]:
    kinds = ("missing", "wrong", "missing_or_wrong")
    panels = {}
    for sampler in evaluation.temperatures:
        rows = {name: [evaluation.found.get((sampler, name, kind)) for kind in kinds] for name in evaluation.models}
        panels[sampler] = {name: tuple(row) for name, row in rows.items() if None not in row}
    others = [both.high for found in panels.values() for name, (_, _, both) in found.items() if name != "base"]
    top = 1.3 * max(others, default=1.0)
    return [
        plots.stacked(found, f"Missing and wrong facts a text, {_short(evaluation, sampler)}", top)
        for sampler, found in panels.items()
    ]


def _wins(evaluation: Evaluation) -> plots.Draw:
    rates = {
        _short(evaluation, sampler): {
            name: rate
            for name in evaluation.models
            if name != "base" and (rate := evaluation.found.get((sampler, name, "win"))) is not None
        }
        for sampler in evaluation.temperatures
    }
    return plots.win_rates(rates, f"Wins against {evaluation.reference}, ties half", WON)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 where the runs are missing."""
    parser = argparse.ArgumentParser(prog="python -m tools.e2e.report", description="Pictures and words on the runs.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder to write (default: runs/report)")
    options = parser.parse_args(arguments)
    try:
        evaluation = read_evaluation(options.runs / "evaluate")
    except ValueError as error:
        print(f"python -m tools.e2e.report: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = draw(evaluation, options.runs, options.out)
    shown = "\n".join(f"- {line}" for line in sentences(evaluation, options.runs))
    words = f"# What the runs show\n\n{shown}\n"
    images = "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    write_text(options.out / "report.md", f"{words}{images}\n{evaluation.table}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(Markdown(words))
    console.print(f"\nWritten to {options.out}: report.md, {', '.join(path.name for path in pictures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
