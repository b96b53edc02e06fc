"""The results as one picture: who is how fast, where PPO's time goes, who needs how much memory, and what grows how."""

import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from align.bootstrap import Interval
from tools.benchmark import results
from tools.benchmark.kinds import BFLOAT16, FLOAT32, KINDS, MIXED, twin
from tools.e2e.plots import INK, PALE, Draw, save

COLOURS: Mapping[str, str] = {
    "ours": "#1b8a6b", "ours, one trunk": "#7cc0aa", "ours, by generate": "#7cc0aa", "ours, half frozen": "#3f7fb5",
    "ours, trunk half frozen": "#9cc3e0", "ours, compiled": "#0f5c46", "ours, half frozen, compiled": "#24527c",
    "plain loop": "#9aa0a6", "TRL": "#e08a1e", "TRL, tuned": "#b04a5a",
}  # fmt: skip
"""A contender's, the same in all panels and in both precisions."""

HATCH = "/////"
"""Of bars in bfloat16."""

PHASES = (1.0, 0.7, 0.4)
"""Opacity of rollout, scoring and update."""

ROOM = 1.25
"""How far an axis reaches beyond what is drawn."""

WIDTH, HEIGHT = 10.0, 3.8
"""Of a panel, in inches: wide enough for the numbers above all bars."""

COLUMNS = 2
BAR, GAP = 0.92, 1
"""Width of a bar, of the room it has, and between groups, in bars."""


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Writes the picture; panels of what was not measured are left out."""
    kinds = {name: found["kinds"][name] for name in KINDS if found["kinds"].get(name, {}).get("contenders")}
    panels: list[Draw] = []
    if kinds:
        panels += [*_ratios(kinds), _memory(kinds)]
    if "ppo" in kinds:
        panels.append(_phases(results.phases(kinds["ppo"])))
    if any(_shares_of(kinds).values()):
        panels.append(_shares(kinds))
    growth = found.get("growth") or {}
    panels += [_line(axis, points) for axis, points in growth.items()]
    columns = min(COLUMNS, max(1, len(panels)))
    panels += [_empty] * (-len(panels) % columns)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    save(path, rows, (WIDTH * columns, HEIGHT * len(rows)))


def _ratios(kinds: Mapping[str, Mapping[str, Any]]) -> list[Draw]:
    """On a logarithmic axis, since some are a hundred times others; no panel where there is nobody to compare with."""
    every = {name: (results.baseline(name, kind), results.speedups(name, kind)) for name, kind in kinds.items()}
    found = {
        f"{name}\n{textwrap.fill(f'beside {base}', 14)}": ratios for name, (base, ratios) in every.items() if ratios
    }

    def panel(axes: Axes) -> None:
        axes.set_yscale("log")
        _bars(axes, found, "{:.1f}", bottom=1.0)
        axes.axhline(1.0, color=INK, linewidth=1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title("how many times as fast as the contender named below")

    return [panel] if found else []


def _memory(kinds: Mapping[str, Mapping[str, Any]]) -> Draw:
    found = {
        name: {own: results.exact(results.memory(item) / 1e9) for own, item in kind["contenders"].items()}
        for name, kind in kinds.items()
    }

    def panel(axes: Axes) -> None:
        _bars(axes, found, "{:.1f}")
        axes.set_title("memory for models and work, GB")

    return panel


def _shares_of(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Interval]]:
    """Kind -> contender -> its share of the limit, where it is known."""
    every = {
        name: {own: results.share_of_limit(kind, own) for own in kind["contenders"]} for name, kind in kinds.items()
    }
    return {name: {own: share for own, share in found.items() if share is not None} for name, found in every.items()}


def _shares(kinds: Mapping[str, Mapping[str, Any]]) -> Draw:
    found = _shares_of(kinds)

    def panel(axes: Axes) -> None:
        _bars(axes, {name: shares for name, shares in found.items() if shares}, "{:.0%}")
        axes.set_title("share of the limit")
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))

    return panel


def _bars(axes: Axes, found: Mapping[str, Mapping[str, Interval]], text: str, bottom: float = 0.0) -> None:
    """One group of bars a kind of work, one bar a contender, with its interval; all bars are of one width."""
    start, middles = 0, []
    for own in found.values():
        for place, (name, value) in enumerate(own.items(), start):
            axes.bar(place, value.mean - bottom, BAR, bottom=bottom, **_looks(name))
            if value.high > value.low:
                spread = [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
                axes.errorbar(place, value.mean, spread, color=INK, linewidth=1, capsize=2)
            axes.annotate(
                text.format(value.mean), (place, max(value.high, bottom)), (0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=7,
            )  # fmt: skip
        middles.append(start + (len(own) - 1) / 2)
        start += len(own) + GAP
    axes.set_xticks(middles, list(found))
    _name_bars(axes, {name for own in found.values() for name in own})
    _leave_room(axes)


def _name_bars(axes: Axes, present: Collection[str]) -> None:
    """The legend: colours by contender, and what is hatched."""
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in map(twin, present)]
    if any(name.endswith(MIXED) for name in present):
        handles.append(Patch(label=BFLOAT16, **_hatched(PALE)))
    axes.legend(handles=handles, frameon=False, loc="upper left", fontsize=8, ncols=5, borderpad=0)


def _leave_room(axes: Axes) -> None:
    """For the legend above the bars."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low, high * (high / low) ** (ROOM - 1))
    else:
        axes.set_ylim(0, ROOM * high)


def _phases(found: Mapping[str, Mapping[str, float]]) -> Draw:
    def panel(axes: Axes) -> None:
        for place, (name, seconds) in enumerate(found.items()):
            bottom = 0.0
            for (phase, own), opacity in zip(seconds.items(), PHASES, strict=True):
                axes.bar(place, own, 0.68, bottom=bottom, alpha=opacity, **_looks(name))
                bottom += own
                if place == 0:
                    axes.bar(0, 0, color=PALE, alpha=opacity, label=phase)
            axes.annotate(f"{bottom:.1f}", (place, bottom), (0, 2), textcoords="offset points", ha="center")
        axes.legend(frameon=False, loc="upper left", fontsize=8, ncols=3)
        axes.set_xticks(range(len(found)), [textwrap.fill(name, 10) for name in found], fontsize=8)
        axes.set_title("PPO: seconds a rollout")
        _leave_room(axes)

    return panel


def _line(axis: str, points: Mapping[str, Any]) -> Draw:
    def panel(axes: Axes) -> None:
        places = range(len(points["sizes"]))
        for place, rates in zip(places, points["rates"], strict=True):
            axes.plot([place] * len(rates), rates, "o", color=_colour("ours"), alpha=0.35, markersize=4)
        axes.plot(places, [median(rates) for rates in points["rates"]], color=_colour("ours"), linewidth=2.2)
        axes.set_xticks(places, [f"{size:,}" for size in points["sizes"]])
        axes.set_ylim(bottom=0)
        axes.set_title(f"SFT in {points.get('precision', FLOAT32)}: tokens a second")
        axes.set_xlabel(axis)

    return panel


def _empty(axes: Axes) -> None:
    axes.set_axis_off()


def _colour(name: str) -> str:
    return COLOURS.get(twin(name), "#5b4b8a")


def _looks(name: str) -> dict[str, Any]:
    """Of a bar: its colour, hatched where it is in bfloat16."""
    return _hatched(_colour(name)) if name.endswith(MIXED) else {"color": _colour(name)}


def _hatched(colour: str) -> dict[str, Any]:
    return {"facecolor": colour, "hatch": HATCH, "edgecolor": "white", "linewidth": 0}
