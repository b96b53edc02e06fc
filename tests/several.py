"""Runs of several processes, for tests: their commands, and how two of them are compared."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import checkpoints
from tools import crash_runs

SHARDED = "{_target_: align.strategy.FSDP}"

STEPS = {
    "sft": [
        "data.batch_size=16", "trainer.max_epochs=2", "module.model.dropout=0", "data.mix=null", "data.mix_fraction=0",
    ],
    "reward": ["data.batch_size=16", "trainer.max_epochs=2"],
    "ppo-ptx": ["data.episodes=72", "data.rollout_batch=18", "data.minibatch=6", "data.pretraining_batch=6"],
}  # fmt: skip
"""22 steps, the eleventh and the last of them of a single example; 24 of PPO, 6 a rollout.

Without dropout, whose draws depend on the number of processes.
"""


EXACT = "trainer.precision=32-true"
"""Where numbers shall be equal but for float32's rounding; `auto` would be bfloat16 on some CPUs."""


def prepare(folder: Path) -> None:
    """A tiny model and data; 161 examples of each kind, so that the last batch of 16 has a single one."""
    crash_runs.prepare(folder)
    for name in ("rows.jsonl", "ranked.jsonl"):
        rows = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join([*rows, rows[0]]))


def command(kind: str, world: Path, run: Path, *overrides: str) -> list[str]:
    """A run in float32 that keeps all its checkpoints."""
    keep = ["callbacks.checkpoints.keep=99", "overwrite=false", EXACT]
    return [*crash_runs.arguments(kind, world, 0), *STEPS[kind], *keep, f"run_dir={run}", *overrides]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run has trained."""
    return load_file(run / "hf" / "model.safetensors")


def assert_same(run: Path, other: Path) -> None:
    """Equal weights and logged numbers, but for rounding, and as many rows."""
    own, theirs = weights(run), weights(other)
    assert own.keys() == theirs.keys()
    assert_close(own, theirs)
    assert_same_metrics(run, other)


def assert_close(own: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal weights, but for rounding."""
    for name, weight in own.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def assert_same_metrics(run: Path, other: Path) -> None:
    """Equal logged numbers, but for rounding, and as many rows."""
    rows = [crash_runs.metrics(folder) for folder in (run, other)]
    assert len(rows[0]) == len(rows[1])
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert (value == "") == (two[name] == ""), name
            if value:
                assert float(value) == pytest.approx(float(two[name]), rel=1e-3, abs=2e-5), (one["step"], name)


def go_back(run: Path, step: int) -> None:
    """Leaves of a run what a kill shortly after a step would have left."""
    (run / "finished.json").unlink()
    for folder in (run / "hf", run / "hf-ema", *checkpoints.found(run / "checkpoints")):
        if folder.exists() and (folder.parent == run or checkpoints.step_of(folder) > step):
            shutil.rmtree(folder)
