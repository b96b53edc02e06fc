"""The pictures of the report: PPO over its steps, facts over training, and the models side by side.

Draws what `tools.e2e.report` has read; computes nothing but a moving average.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from align.bootstrap import Interval

COLOURS: Mapping[str, str] = {
    "base": "#9aa0a6", "SFT": "#3b6fb6", "PPO": "#e08a1e", "PPO-ptx": "#1b8a6b", "people": "#5b4b8a",
}  # fmt: skip
OTHER_COLOUR = "#b04a5a"
INK, PALE, GRID = "#222222", "#8a8a8a", "#e6e6e6"
FADED = 0.45
"""Opacity of the second kind of fact in a stack."""
SMOOTHED = 9
"""Rollouts averaged for the thick line."""
DPI = 160

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}

Series = Sequence[tuple[int, float]]
Draw = Callable[[Axes], None]


def save(path: Path, rows: Sequence[Sequence[Draw]], size: tuple[float, float], title: str = "") -> None:
    """Writes a grid of panels as a PNG.

    Args:
        path: Of the picture.
        rows: What to draw in each panel; rows of equal length.
        size: Width and height in inches.
        title: Above all panels.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.05)  # type: ignore[union-attr]
        axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for row, places in zip(rows, axes, strict=True):
            for draw, place in zip(row, places, strict=True):
                draw(place)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
        figure.savefig(path)


def over_steps(runs: Mapping[str, Series], title: str) -> Draw:
    """One metric of several PPO runs: every rollout thin, their moving average thick, names at the lines' ends."""

    def draw(axes: Axes) -> None:
        for name, points in runs.items():
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, color=colour(name), alpha=0.25, linewidth=0.8)
            axes.plot(steps, moving_average(values), color=colour(name), linewidth=2.2)
        ends = {name: (points[-1][0], moving_average([v for _, v in points])[-1]) for name, points in runs.items()}
        _name_lines(axes, ends)
        axes.set_title(title)
        axes.set_xlabel("PPO step")

    return draw


def facts_over_steps(runs: Mapping[str, Mapping[int, Mapping[str, Interval]]], title: str) -> Draw:
    """Missing facts (solid) and wrong facts (dashed) a text, with 95 % intervals."""

    def draw(axes: Axes) -> None:
        ends = {}
        for name, found in runs.items():
            for kind, line in (("missing", "-"), ("wrong", "--")):
                steps, values = list(found), [facts[kind] for facts in found.values()]
                means = [value.mean for value in values]
                low, high = [value.low for value in values], [value.high for value in values]
                axes.fill_between(steps, low, high, color=colour(name), alpha=0.12, linewidth=0)
                axes.plot(steps, means, line, color=colour(name), linewidth=2.2, marker="o", markersize=3.5)
                if kind == "missing":
                    ends[name] = (steps[-1], means[-1])
        _name_lines(axes, ends)
        axes.plot([], [], "-", color=INK, label="missing")
        axes.plot([], [], "--", color=INK, label="wrong")
        axes.legend(frameon=False, loc="upper right")
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.set_xlabel("PPO step")

    return draw


def stacked(parts: Mapping[str, tuple[Interval, Interval, Interval]], title: str, top: float) -> Draw:
    """Missing facts with wrong ones on top for every model, and the interval of their sum.

    Args:
        parts: Model -> missing, wrong, and both together.
        title: Of the panel.
        top: Upper end of the axis; a taller bar is cut there.
    """

    def draw(axes: Axes) -> None:
        for place, (name, (missing, wrong, both)) in enumerate(parts.items()):
            axes.bar(place, missing.mean, 0.68, color=colour(name))
            axes.bar(place, wrong.mean, 0.68, bottom=missing.mean, color=colour(name), alpha=FADED)
            if both.high > top:
                _cut(axes, place, top, f"{both.mean:.2f}")
                continue
            _interval(axes, place, both, f"{both.mean:.2f}")
        axes.bar(0, 0, color=PALE, label="missing")
        axes.bar(0, 0, color=PALE, alpha=FADED, label="wrong")
        axes.legend(frameon=False, loc="upper right", reverse=True)
        axes.set_xticks(range(len(parts)), list(parts))
        axes.set_ylim(0, top)
        axes.set_title(title)

    return draw


def win_rates(rates: Mapping[str, Mapping[str, Interval]], title: str, target: float) -> Draw:
    """Wins of every model, one bar a sampler; the even chance and the target as lines.

    Args:
        rates: Sampler -> model -> share of pairs won.
        title: Of the panel.
        target: Share to be reached.
    """

    def draw(axes: Axes) -> None:
        models = list(dict.fromkeys(name for found in rates.values() for name in found))
        width = 0.76 / len(rates)
        for number, (sampler, found) in enumerate(rates.items()):
            opacity = 1.0 if number == 0 else FADED
            for name, rate in found.items():
                place = models.index(name) + (number - (len(rates) - 1) / 2) * width
                axes.bar(place, rate.mean, width * 0.94, color=colour(name), alpha=opacity)
                _interval(axes, place, rate, f"{rate.mean:.0%}")
            axes.bar(0, 0, color=PALE, alpha=opacity, label=sampler)
        for level, text in ((0.5, "even"), (target, "target")):
            axes.axhline(level, color=PALE, linewidth=1, linestyle=":")
            axes.annotate(
                text, (1, level), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                color=PALE, fontsize=9, va="center",
            )  # fmt: skip
        axes.legend(frameon=False, loc="upper left", ncols=len(rates), borderpad=0)
        axes.set_xticks(range(len(models)), models)
        axes.set_ylim(0, 1.15)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.set_title(title)

    return draw


def colour(name: str) -> str:
    """A model's, the same in all pictures."""
    return COLOURS.get(name, OTHER_COLOUR)


def moving_average(values: Sequence[float]) -> list[float]:
    """The mean of `SMOOTHED` values around each, of fewer towards the ends."""
    half = SMOOTHED // 2
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _name_lines(axes: Axes, ends: Mapping[str, tuple[int, float]]) -> None:
    """Writes each line's name at its end, moved apart where they would touch."""
    low, high = axes.get_ylim()
    least, below = (high - low) * 0.075, float("-inf")
    for name, (step, value) in sorted(ends.items(), key=lambda item: item[1][1]):
        below = max(value, below + least)
        axes.annotate(
            name, (step, below), (6, 0), textcoords="offset points", color=colour(name), fontweight="bold", va="center"
        )


def _interval(axes: Axes, place: float, value: Interval, text: str) -> None:
    """The whisker of a bar, and what is written above it."""
    spread = [[value.mean - value.low], [value.high - value.mean]]
    axes.errorbar(place, value.mean, spread, color=INK, linewidth=1.2, capsize=3)
    axes.annotate(text, (place, value.high), (0, 3), textcoords="offset points", ha="center", va="bottom")


def _cut(axes: Axes, place: float, top: float, text: str) -> None:
    """Marks a bar that reaches beyond the axis, and writes its height into it."""
    at = [0.86 * top, 0.885 * top]
    axes.plot([place - 0.4, place + 0.4], at, color="white", linewidth=4)
    axes.annotate(text, (place, 0.9 * top), (0, 2), textcoords="offset points", color="white", ha="center", va="bottom")
