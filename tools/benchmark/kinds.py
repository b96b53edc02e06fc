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

CPU, CUDA = "cpu", "cuda"
"""Where the work is done; `--device` names one."""

MIXED = ", bf16"
"""How names of contenders in bfloat16 end."""

COMPILED = "compiled"
"""What a setting ends with where blocks are (`module.compile`)."""

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
        devices: Where it takes part.
    """

    name: str
    family: str
    module: str
    settings: tuple[str, ...] = ("",)
    requirement: str | None = None
    networks: float = 2
    precision: str = FLOAT32
    devices: tuple[str, ...] = (CPU,)


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


def _mixed(contender: Contender, *devices: str) -> Contender:
    """A contender in bfloat16."""
    return replace(contender, name=contender.name + MIXED, precision=BFLOAT16, devices=devices)


def _both(contender: Contender) -> tuple[Contender, Contender]:
    """A contender in float32, and behind it in bfloat16, in which ours take part on a GPU, too."""
    return contender, _mixed(contender, CPU, *((CUDA,) if contender.family == OURS else ()))


def _on_gpu(contender: Contender) -> Contender:
    return _mixed(contender, CUDA)


_LOOP = Contender(LOOP, PLAIN, "plain")


def _compared(count: int) -> Kind:
    return Kind(
        title=f"reward model, {count} answers a prompt",
        unit="pairs/s",
        contenders=(
            *_both(Contender("ours", OURS, "ours")),
            _LOOP,
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
            _on_gpu(Contender("ours, compiled", OURS, "ours", (COMPILED,))),
            _LOOP,
            _on_gpu(_LOOP),
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
            _on_gpu(Contender("ours, compiled", OURS, "ours", (f"decode, {COMPILED}",))),
            *_both(Contender("ours, by generate", OURS, "ours", ("generate",))),
            _LOOP,
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
            _on_gpu(Contender("ours, compiled", OURS, "ours", (f"separate networks, {COMPILED}",))),
            Contender("ours, one trunk", OURS, "ours", ("one trunk",), networks=1),
            *_both(Contender("ours, half frozen", OURS, "ours", ("half frozen",), networks=1)),
            _on_gpu(Contender("ours, half frozen, compiled", OURS, "ours", (f"half frozen, {COMPILED}",), networks=1)),
            *_both(Contender("ours, trunk half frozen", OURS, "ours", ("trunk half frozen",), networks=0.5)),
            _LOOP,
            *_both(Contender("TRL", TRL, "trl_ppo", ("defaults", "all at once"), PPO_TRL)),
        ),
        turns=3,
    ),
}

GROWTH, SCALING = "growth", "scaling"
"""What is measured of ours alone: speed over sizes, and over processes."""

ALL = (*KINDS, GROWTH, SCALING)
