"""Contenders compute in the precision they are asked for: ours, TRL by what it is told, the machine's products."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tools.benchmark import growth, machine, measure, ours, work
from tools.benchmark.kinds import BFLOAT16, CPU, CUDA, FLOAT32, KINDS, twin
from tools.benchmark.protocol import Turn

TINY = work.SIZES["tiny"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> work.Work:
    """The tiny work, written."""
    return work.write(tmp_path_factory.mktemp("work"), TINY)


def setup(precisions: list[str], device: str = CPU) -> measure.Setup:
    """A run without TRL, of which only who takes part is asked."""
    nowhere, nothing = Path("nowhere"), work.Work(Path("nowhere"), TINY, [], {}, [], [], device)
    return measure.Setup(nothing, nowhere, nowhere, 1, None, ("ours", "plain"), precisions)


@pytest.fixture
def dtypes() -> Iterator[set[torch.dtype]]:
    """Of all that linear layers with as many outputs as the blocks' inner size give."""
    seen: set[torch.dtype] = set()

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        if isinstance(module, nn.Linear) and module.out_features == TINY.inner:
            seen.add(output.dtype)

    with nn.modules.module.register_module_forward_hook(note):
        yield seen


CASES = [(kind, content.contenders[0].settings[0]) for kind, content in KINDS.items()]
CASES += [("rollout", "generate"), ("ppo", ours.TRUNK)]


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_ours_computes_in_the_precision_it_is_asked_for(
    kind: str, setting: str, precision: str, made: work.Work, dtypes: set[torch.dtype]
) -> None:
    assert ours.prepare(kind, setting, made, precision)().units > 0
    assert dtypes == {getattr(torch, precision)}


def test_growth_is_computed_in_the_precision_it_is_asked_for(made: work.Work, dtypes: set[torch.dtype]) -> None:
    ours.prepare("growth", "", made, BFLOAT16)(examples=2)
    assert dtypes == {torch.bfloat16}


def test_growth_takes_the_fastest_precision_that_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for units, expected in ((True, BFLOAT16), (False, FLOAT32)):
        monkeypatch.setattr(growth, "multiplies_bfloat16", lambda units=units: units)
        assert growth.fastest([FLOAT32, BFLOAT16]) == expected
        assert growth.fastest([FLOAT32]) == FLOAT32 and growth.fastest([BFLOAT16]) == BFLOAT16


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Arguments of TRL's classes in the order in which objects are made, though TRL is not installed here."""
    made: list[dict[str, Any]] = []

    def record(**arguments: Any) -> None:
        made.append(arguments)

    package, experimental, ppo = (ModuleType(name) for name in ("trl", "trl.experimental", "trl.experimental.ppo"))
    vars(package).update(dict.fromkeys(("RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer"), record))
    vars(ppo).update(PPOConfig=record, PPOTrainer=record, ppo_trainer=SimpleNamespace())
    for module in (package, experimental, ppo):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield made
    for name in ("trl_trainers", "trl_ppo"):
        sys.modules.pop(f"tools.benchmark.{name}", None)


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "rollout"])
def test_trl_is_told_its_precision(
    kind: str, made: work.Work, trl: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are float32 in both; PPO's accelerator reads an environment variable instead of `bf16`."""
    contenders = [item for item in KINDS[kind].contenders if item.family == "trl"]
    assert {item.precision for item in contenders} == {FLOAT32, BFLOAT16}
    for item in contenders:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        module = importlib.import_module(f"tools.benchmark.{item.module}")
        module.prepare(kind, item.settings[0], made, item.precision)
        arguments, trainer = sorted(trl[-2:], key=lambda found: "model" in found)
        mixed = item.precision == BFLOAT16
        assert arguments["bf16"] is mixed and arguments["use_cpu"] is True
        assert trainer["model"].dtype == torch.float32
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == ("bf16" if mixed and kind == "ppo" else "no")


def test_contenders_in_bfloat16_do_what_their_twins_do() -> None:
    """The same module, settings and networks; and they take part only where the run has their precision."""
    for kind in KINDS.values():
        by_name = {item.name: item for item in kind.contenders}
        for item in kind.contenders:
            if CPU not in item.devices:
                continue
            own = by_name[twin(item.name)]
            assert (item.name == own.name) == (item.precision == FLOAT32)
            assert (item.module, item.settings, item.networks) == (own.module, own.settings, own.networks)
    assert [item.name for item in setup([FLOAT32]).taking_part(KINDS["sft"])] == ["ours", "plain loop"]
    assert [item.name for item in setup([FLOAT32, BFLOAT16]).taking_part(KINDS["sft"])] == [
        "ours", "ours, bf16", "plain loop"
    ]  # fmt: skip


def test_a_gpu_has_contenders_of_its_own() -> None:
    on_gpu = setup([FLOAT32, BFLOAT16], CUDA)
    names = {name: [item.name for item in on_gpu.taking_part(kind)] for name, kind in KINDS.items()}
    assert names["sft"] == ["ours, bf16", "ours, compiled, bf16", "plain loop, bf16"]
    assert names["rollout"] == ["ours, bf16", "ours, compiled, bf16", "ours, by generate, bf16"]
    assert all(found[0] == "ours, bf16" for found in names.values())
    assert on_gpu.limits(KINDS["rollout"]) == ["copy"] and on_gpu.limits(KINDS["sft"]) == on_gpu.products


def test_the_machine_multiplies_in_each_precision(made: work.Work, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(machine, "repeated", lambda do, units, device=CPU: seen.append(do().dtype) or Turn(1.0, units))
    turn = machine.prepare("", "", made, FLOAT32)
    names = setup([FLOAT32, BFLOAT16]).products
    assert names == ["blocks", "head", "blocks, bfloat16", "head, bfloat16"] and setup([FLOAT32]).products == names[:2]
    units = [turn(name).units for name in names]
    assert seen == [torch.float32] * 4 + [torch.bfloat16] * 2  # float32 by either library
    assert units == [2 * machine.ROWS[CPU] * TINY.hidden * width for width in (TINY.inner, TINY.vocab)] * 2
