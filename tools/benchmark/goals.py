"""What the project set out to reach, and what a run says of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from align.bootstrap import Interval
from tools.benchmark import results
from tools.benchmark.kinds import MIXED

SPEED, MEMORY, SHARE, MFU = "speed", "memory", "share", "mfu"
"""What a goal is about: how many times as fast, what part of the memory, what share of the limit, or of what a GPU's
datasheet promises (model FLOP utilisation)."""

DATASHEET = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""GPU -> operations a second in dense products of bfloat16."""


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        work: As the table calls it.
        kind: Of `tools.benchmark.kinds`.
        ours: The contender whose goal it is.
        against: With whom it is compared: the fastest of them. Nobody where a share is the goal.
        bound: Of memory the most that reaches the goal, of all else the least.
        about: `SPEED`, `MEMORY`, `SHARE` or `MFU`.
    """

    work: str
    kind: str
    ours: str
    against: tuple[str, ...]
    bound: float
    about: str = SPEED


@dataclass(frozen=True)
class Outcome:
    """What was measured of a goal.

    Attributes:
        goal: Which one.
        against: With whom it was compared; empty where a share is the goal.
        found: The ratio or the share.
    """

    goal: Goal
    against: str
    found: Interval

    @property
    def reached(self) -> bool:
        """Whether the number itself, whatever its interval, is on the right side of the bound."""
        return self.found.mean <= self.goal.bound if self.goal.about == MEMORY else self.found.mean >= self.goal.bound


OURS, OURS_MIXED, TRL, TRL_MIXED = "ours", f"ours{MIXED}", "TRL", f"TRL{MIXED}"
COMPILED = f"ours, compiled{MIXED}"
FROZEN, TRUNK = f"ours, half frozen{MIXED}", f"ours, trunk half frozen{MIXED}"
GENERATE = "ours, by generate"

GOALS = (
    Goal("PPO, four networks, same precision", "ppo", OURS, (TRL,), 5),
    Goal("PPO, four networks, same precision", "ppo", OURS_MIXED, (TRL_MIXED,), 5),
    Goal("PPO, best configuration of equal learning", "ppo", FROZEN, (TRL,), 15),
    Goal("PPO, best configuration of equal learning", "ppo", TRUNK, (TRL,), 15),
    Goal("PPO, memory", "ppo", OURS, (TRL,), 0.5, MEMORY),
    Goal("SFT, TRL's defaults", "sft", OURS, (TRL,), 4),
    Goal("SFT, TRL's defaults", "sft", OURS_MIXED, (TRL_MIXED,), 4),
    Goal("SFT, TRL's best setting", "sft", OURS_MIXED, ("TRL, tuned", f"TRL, tuned{MIXED}"), 2.5),
    Goal("reward model, 4 answers, same precision", "reward4", OURS, (TRL,), 8),
    Goal("reward model, 9 answers, same precision", "reward9", OURS, (TRL,), 25),
    Goal("reward model, 4 answers, each at its best precision", "reward4", OURS_MIXED, (TRL, TRL_MIXED), 14),
    Goal("reward model, 9 answers, each at its best precision", "reward9", OURS_MIXED, (TRL, TRL_MIXED), 40),
    Goal("rollout, same precision", "rollout", OURS, (GENERATE,), 3),
    Goal("rollout, each at its best precision", "rollout", OURS_MIXED, (GENERATE, f"{GENERATE}{MIXED}"), 5),
    *(
        Goal(f"{title}, share of the matrix limit", kind, ours, (), 0.6, SHARE)
        for title, kind in (("SFT", "sft"), ("PPO's update", "ppo"), ("reward model, 4 answers", "reward4"))
        for ours in (OURS, OURS_MIXED)
    ),
    *(
        Goal(f"{title}, share of the datasheet's operations (MFU)", kind, ours, (), 0.45, MFU)
        for title, kind in (("SFT", "sft"), ("PPO's update", "ppo"))
        for ours in (OURS_MIXED, COMPILED)
    ),
    *(
        Goal("rollout, share of the bandwidth of copies", "rollout", ours, (), 0.5, SHARE)
        for ours in (OURS_MIXED, COMPILED)
    ),
)


def outcomes(kinds: Mapping[str, Mapping[str, Any]], gpu: str = "") -> Iterator[Outcome]:
    """What was measured of each goal; a goal of which a contender is missing, or what it is of, is left out.

    Args:
        kinds: Name of a kind -> what a run found of it.
        gpu: On which, if on any.
    """
    for goal in GOALS:
        contenders = kinds.get(goal.kind, {}).get("contenders", {})
        if not {goal.ours, *goal.against} <= contenders.keys():
            continue
        if goal.about in (SHARE, MFU):
            share = _share(goal, kinds[goal.kind], gpu)
            if share is not None:
                yield Outcome(goal, "", share)
        else:
            against = max(goal.against, key=lambda name: median(results.rates(contenders[name])))
            yield Outcome(goal, against, _ratio(goal, contenders[goal.ours], contenders[against]))


def _share(goal: Goal, kind: Mapping[str, Any], gpu: str) -> Interval | None:
    if goal.about == SHARE:
        return results.share_of_limit(kind, goal.ours)
    peak = DATASHEET.get(gpu)
    return results.share_of(kind["contenders"][goal.ours], peak) if peak else None


def _ratio(goal: Goal, ours: Mapping[str, Any], other: Mapping[str, Any]) -> Interval:
    if goal.about == MEMORY:
        return results.exact(results.memory(ours) / results.memory(other))
    return results.ratio_of_medians(results.rates(ours), results.rates(other))
