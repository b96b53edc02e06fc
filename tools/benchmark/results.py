"""What the numbers of a run say: medians, ratios with intervals, shares of the machine's limit.

Reads the content of `performance.json` as `tools.benchmark.command` writes it; measures nothing.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from align.bootstrap import LEVELS, Interval
from tools.benchmark import machine
from tools.benchmark.kinds import FLOAT32, KINDS, LOOP, MIXED
from tools.benchmark.protocol import Turn

RESAMPLES = 10_000
LEAST = 3
"""Turns below which an interval would say nothing."""


def turns(contender: Mapping[str, Any]) -> list[Turn]:
    """A contender's turns that count."""
    return [Turn(**turn) for turn in contender["turns"]]


def rates(contender: Mapping[str, Any]) -> list[float]:
    """Units a second of every turn."""
    return [turn.rate for turn in turns(contender)]


def ratio_of_medians(
    above: Sequence[float], below: Sequence[float], resamples: int = RESAMPLES, *, apart: bool = False
) -> Interval:
    """The ratio of two medians, with a 95 % interval by the bootstrap.

    Turns are drawn with replacement, the same for both, as those of one number stood side by side; others if `apart`.

    Args:
        above: One number a turn.
        below: Likewise.
        resamples: How often to draw as many turns as there are.

    Returns:
        The interval; as wide as the ratio alone where there are fewer than `LEAST` turns. `n` is the number of turns.
    """
    own, other = torch.tensor(above, dtype=torch.float64), torch.tensor(below, dtype=torch.float64)
    assert len(own) == len(other) > 0, "turns are paired"
    ratio = float(median(above) / median(below))
    if len(own) < LEAST:
        return Interval(ratio, ratio, ratio, len(own))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(own), (resamples, len(own)), generator=generator)
    others = torch.randint(len(own), (resamples, len(own)), generator=generator) if apart else drawn
    found = own[drawn].quantile(0.5, dim=1) / other[others].quantile(0.5, dim=1)
    low, high = found.quantile(torch.tensor(LEVELS, dtype=torch.float64)).tolist()
    return Interval(ratio, low, high, len(own))


def exact(value: float) -> Interval:
    """A number without an interval."""
    return Interval(value, value, value, 1)


def baseline(name: str, kind: Mapping[str, Any]) -> str | None:
    """With whom contenders are compared: the baseline of the kind of that name, or the plain loop in its absence."""
    known = (KINDS[name].baseline, LOOP)
    return next((one for one in (*known, *(base + MIXED for base in known)) if one in kind["contenders"]), None)


def speedups(name: str, kind: Mapping[str, Any]) -> dict[str, Interval]:
    """How many times as fast as the baseline each other contender is; nothing where there is no baseline."""
    found, base = kind["contenders"], baseline(name, kind)
    if base is None:
        return {}
    below, apart = rates(found[base]), "limits" in found[base]  # then turns did not stand side by side
    return {own: ratio_of_medians(rates(item), below, apart=apart) for own, item in found.items() if own != base}


def precision(contender: Mapping[str, Any]) -> str:
    """In which a contender computed; results that do not say it are in float32."""
    return contender.get("precision", FLOAT32)


def share_of_limit(kind: Mapping[str, Any], name: str) -> Interval | None:
    """Operations that the work needs, a second, as a share of what products of matrices reach in the same turns.

    The products are in the contender's precision; of both shapes the faster one counts.
    Of PPO it is the update's share. Of writing, bytes read as a share of copies. None where nothing is counted
    or no limit was measured.
    """
    contender = kind["contenders"][name]
    if "flops" not in contender:
        return None
    names = (*machine.products(precision(contender)).values(), machine.COPY)
    limits = contender.get("limits", kind.get("limits", {}))
    known = [limits[what] for what in names if what in limits]
    return share_of(contender, max(known, key=median)) if known else None


def share_of(contender: Mapping[str, Any], limit: float | Sequence[float]) -> Interval:
    """What a contender's work needs, a second, as a share of a limit, or of one of each turn; of PPO the update's."""
    seconds = [turn.phases.get("update", turn.seconds) for turn in turns(contender)]
    limits = [limit] * len(seconds) if isinstance(limit, float) else limit
    return ratio_of_medians([contender["flops"] / taken for taken in seconds], limits)


def phases(kind: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Contender -> median seconds of each phase of a turn."""
    found: dict[str, dict[str, float]] = {}
    for name, contender in kind["contenders"].items():
        own = turns(contender)
        found[name] = {phase: median(turn.phases[phase] for turn in own) for phase in own[0].phases}
    return found


def memory(contender: Mapping[str, Any]) -> float:
    """Bytes that a contender's process needed at most, beyond what it had before it loaded a model."""
    return contender["peak"] - contender["base"]
