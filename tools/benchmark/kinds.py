"""The kinds of work, and who does them: which module in which environment, with which settings to choose from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

OURS, PLAIN, TRL = "ours", "plain", "trl"
"""Families of contenders; `--against` names some of the last two."""

CURRENT_TRL, PPO_TRL = "trl==1.16.0", "trl==1.12.0"
"""The current release, and the last one that has a PPO trainer."""

FLOAT32, BFLOAT16 = "float32", "bfloat16"
PRECISIONS = (FLOAT32, BFLOAT16)
"""In which products of matrices are computed; weights are float32 in both."""

TRAINERS: Mapping[str, str] = {FLOAT32: "32-true", BFLOAT16: "bf16-mixed"}
"""What Lightning's Trainer calls a precision."""

MIXED = ", bf16"
"""How names of contenders in bfloat16 end."""

LOOP = "plain loop"
"""All are compared with it where a kind's baseline was not measured."""


@dataclass(frozen=True)
class Contender:
    """Who does a kind of work.

    Attributes:
        name: As tables call it.
        family: `OURS`, `PLAIN` or `TRL`.
        module: In this package; its `prepare` loads what is needed.
        settings: What `prepare` may be told; the fastest of several is taken.
        requirement: What its environment has beside this one's packages; None: nothing.
        networks: Whose blocks learn in PPO; half of one's blocks are half a network.
        precision: One of `PRECISIONS`; takes part where the run has it.
    """

    name: str
    family: str
    module: str
    settings: tuple[str, ...] = ("",)
    requirement: str | None = None
    networks: float = 2
    precision: str = FLOAT32


@dataclass(frozen=True)
class Kind:
    """A kind of work.

    Attributes:
        title: As tables call it.
        unit: What is counted, in a second.
        contenders: In the order of the tables; without the first that takes part nothing is measured.
        turns: That count, one after the other; a run with `--turns` has another number.
        limited: Whether its floating-point operations are known, and compared with what the machine can do.
        baseline: The contender with which the others are compared.
    """

    title: str
    unit: str
    contenders: tuple[Contender, ...]
    turns: int
    limited: bool = True
    baseline: str = "TRL"


def twin(name: str) -> str:
    """The name of the contender that does the same in float32."""
    return name.removesuffix(MIXED)


def _both(contender: Contender) -> tuple[Contender, Contender]:
    """A contender in float32, and behind it in bfloat16."""
    return contender, replace(contender, name=contender.name + MIXED, precision=BFLOAT16)


def _compared(count: int) -> Kind:
    return Kind(
        title=f"reward model, {count} answers a prompt",
        unit="pairs/s",
        contenders=(
            *_both(Contender("ours", OURS, "ours")),
            Contender(LOOP, PLAIN, "plain"),
            *_both(Contender("TRL", TRL, "trl_trainers", ("defaults", "all at once"), CURRENT_TRL)),
        ),
        turns=5,
    )


KINDS: Mapping[str, Kind] = {
    "sft": Kind(
        title="SFT",
        unit="tokens/s",
        contenders=(
            *_both(Contender("ours", OURS, "ours")),
            Contender(LOOP, PLAIN, "plain"),
            *_both(Contender("TRL", TRL, "trl_trainers", ("defaults",), CURRENT_TRL)),
            *_both(
                Contender(
                    "TRL, tuned",
                    TRL,
                    "trl_trainers",
                    ("all at once", "grouped by length", "padding-free", "packed"),
                    CURRENT_TRL,
                )
            ),
        ),
        turns=5,
    ),
    "reward4": _compared(4),
    "reward9": _compared(9),
    "rollout": Kind(
        title="rollout",
        unit="response tokens/s",
        contenders=(
            *_both(Contender("ours", OURS, "ours", ("decode",))),
            *_both(Contender("ours, by generate", OURS, "ours", ("generate",))),
            Contender(LOOP, PLAIN, "plain"),
        ),
        turns=5,
        limited=False,
        baseline="ours, by generate",
    ),
    "ppo": Kind(
        title="PPO",
        unit="episodes/s",
        contenders=(
            *_both(Contender("ours", OURS, "ours", ("separate networks",))),
            Contender("ours, one trunk", OURS, "ours", ("one trunk",), networks=1),
            *_both(Contender("ours, half frozen", OURS, "ours", ("half frozen",), networks=1)),
            *_both(Contender("ours, trunk half frozen", OURS, "ours", ("trunk half frozen",), networks=0.5)),
            Contender(LOOP, PLAIN, "plain"),
            *_both(Contender("TRL", TRL, "trl_ppo", ("defaults", "all at once"), PPO_TRL)),
        ),
        turns=3,
    ),
}

GROWTH, SCALING = "growth", "scaling"
"""What is measured of ours alone: speed over sizes, and over processes."""

ALL = (*KINDS, GROWTH, SCALING)
