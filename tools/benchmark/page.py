"""The results as tables, and where they go: between the markers of docs/performance.md."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from align.atomic import write_text
from align.bootstrap import Interval
from tools.benchmark import goals, machine, results
from tools.benchmark.kinds import FLOAT32, KINDS, PRECISIONS
from tools.benchmark.protocol import BenchmarkError

MB, GIGA = 1e6, 1e9


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Puts the tables between the markers of a page, or makes a page of them.

    Raises:
        BenchmarkError: The page has no markers.
    """
    start, stop = markers(found)
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Performance\n\n{start}\n{stop}\n"
    before, begin, rest = text.partition(start)
    _, end, after = rest.partition(stop)
    if not begin or not end:
        raise BenchmarkError(
            f"{path}: got no {start} with {stop} behind it, expected both; add them where the tables shall be"
        )
    write_text(path, f"{before}{start}\n{tables(found)}{stop}{after}")


def markers(found: Mapping[str, Any]) -> tuple[str, str]:
    """Between which a page has these results: those of a GPU, and of each size there, have their own."""
    made = found["made"]
    name = f"results {made['size']} gpu" if made.get("gpu") else "results"
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def tables(found: Mapping[str, Any]) -> str:
    """All tables of a run, in Markdown."""
    parts = [_heading(found)]
    kinds = {name: found["kinds"][name] for name in KINDS if found["kinds"].get(name, {}).get("contenders")}
    if kinds:
        parts.append("\n".join(_speeds(kinds)))
    if "ppo" in kinds:
        parts.append("\n".join(_phases(kinds["ppo"])))
    if reached := list(goals.outcomes(kinds, found["made"].get("gpu", ""))):
        parts.append("\n".join(_goals(reached)))
    parts += [part for part in (_machine(found), _scaling(found), _growth(found), _left_out(found)) if part]
    return "\n\n".join(parts) + "\n"


def _heading(found: Mapping[str, Any]) -> str:
    made = found["made"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    precisions = " and ".join(made.get("precisions", [FLOAT32]))
    where = made.get("gpu") or f"{made['cpu']}, {made['threads']} threads of {made['cores']} cores"
    return (
        f"{made['date']}, commit {made['commit']}: {where}, {precisions}; {versions}. "
        f"Medians of turns; in brackets 95 % intervals.{_earlier(found)}"
    )


def _earlier(found: Mapping[str, Any]) -> str:
    """What is of other runs."""
    of: dict[str, list[str]] = {}
    for name, when in found.get("earlier", {}).items():
        of.setdefault(f"{when['date']}, commit {when['commit']}", []).append(
            KINDS[name].title if name in KINDS else name
        )
    return "".join(f" Of {when}: {'; '.join(names)}." for when, names in of.items())


def _speeds(kinds: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| work | who | speed | times as fast as | share of the limit | memory, MB |"
    yield "|---|---|---:|---:|---:|---:|"
    for name, kind in kinds.items():
        ratios, base = results.speedups(name, kind), results.baseline(name, kind)
        for number, (own, contender) in enumerate(kind["contenders"].items()):
            share = results.share_of_limit(kind, own)
            cells = (
                "" if number else KINDS[name].title,
                own + _setting(contender),
                f"{significant(median(results.rates(contender)))} {KINDS[name].unit}",
                times(ratios[own], f"× {base}") if own in ratios else "",
                f"{share.mean:.0%}" if share is not None else "",
                f"{results.memory(contender) / MB:,.0f}",
            )
            yield f"| {' | '.join(cells)} |"


def _setting(contender: Mapping[str, Any]) -> str:
    """Which of several settings was the fastest."""
    return f" ({contender['setting']})" if contender["trials"] else ""


def _phases(kind: Mapping[str, Any]) -> Iterator[str]:
    found = results.phases(kind)
    names = list(next(iter(found.values())))
    yield f"| PPO, seconds a rollout | {' | '.join(names)} |"
    yield f"|---|{'---:|' * len(names)}"
    for own, seconds in found.items():
        yield f"| {own} | {' | '.join(significant(seconds[name]) for name in names)} |"


def _goals(reached: Iterable[goals.Outcome]) -> Iterator[str]:
    """Ratios that reach their goal are bold."""
    yield "| goals | ours | against | goal | measured |"
    yield "|---|---|---|---:|---:|"
    for item in reached:
        goal, least = item.goal, "at most" if item.goal.about == goals.MEMORY else "at least"
        is_share = goal.about in (goals.SHARE, goals.MFU)
        bound = f"{goal.bound:.0%}" if is_share else f"{goal.bound:g} ×"
        shown = percent(item.found) if is_share else times(item.found)
        yield f"| {goal.work} | {goal.ours} | {item.against} | {least} {bound} | {_bold(shown, item.reached)} |"


def _bold(text: str, whether: bool) -> str:
    return f"**{text}**" if whether else text


def _machine(found: Mapping[str, Any]) -> str:
    limits = found.get("limits")
    if not limits:
        return ""
    parts = []
    for precision in PRECISIONS:
        names = machine.products(precision)
        if names[machine.BLOCKS] in limits:
            blocks, head = (median(limits[names[shape]]) / GIGA for shape in (machine.BLOCKS, machine.HEAD))
            parts.append(
                f"in {precision} {blocks:.0f} GFLOP/s in products of the blocks' shape, {head:.0f} in those of the "
                "output matrix"
            )
    copy = median(limits[machine.COPY]) / GIGA
    return f"The machine: {'; '.join(parts)}; copies move {copy:.1f} GB/s."


def _scaling(found: Mapping[str, Any]) -> str:
    scaling = found.get("scaling")
    if not scaling:
        return ""
    ratio = results.ratio_of_medians(scaling["2"], scaling["1"])
    one, two = (significant(median(scaling[processes])) for processes in ("1", "2"))
    precision = scaling.get("precision", FLOAT32)
    return (
        f"SFT in {precision} with one thread a process: {one} tokens/s by one process, {two} by two: {times(ratio)}, "
        "of 2 at best."
    )


def _growth(found: Mapping[str, Any]) -> str:
    growth = found.get("growth")
    if not growth:
        return ""
    rows = [
        [
            axis,
            *(f"{size:,}: {significant(median(own))}" for size, own in zip(item["sizes"], item["rates"], strict=True)),
        ]
        for axis, item in growth.items()
    ]
    width = max(len(row) for row in rows)
    precision = next(iter(growth.values())).get("precision", FLOAT32)
    lines = [[f"SFT in {precision}, tokens/s at", *[""] * (width - 1)], ["---", *["---:"] * (width - 1)], *rows]
    return "\n".join(f"| {' | '.join([*row, *[''] * (width - len(row))])} |" for row in lines)


def _left_out(found: Mapping[str, Any]) -> str:
    lines = [
        f"Left out: {name} at {KINDS[kind].title}: {why.splitlines()[0]}"
        for kind, content in found["kinds"].items()
        for name, why in content["left_out"].items()
    ]
    return "\n\n".join(lines)


def times(ratio: Interval, sign: str = "×") -> str:
    """A ratio with its interval: `1.84 × [1.80, 1.90]`."""
    shown = f"{ratio.mean:.2f} {sign}"
    return shown if ratio.low == ratio.high else f"{shown} [{ratio.low:.2f}, {ratio.high:.2f}]"


def percent(share: Interval) -> str:
    """A share with its interval: `59% [57%, 60%]`."""
    shown = f"{share.mean:.0%}"
    return shown if share.low == share.high else f"{shown} [{share.low:.0%}, {share.high:.0%}]"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many digits that mean something, thousands apart."""
    shown = f"{value:.{digits}g}"
    return f"{float(shown):,.0f}" if value >= 10 ** (digits - 1) else shown
