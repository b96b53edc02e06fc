"""The ways to share a model: weights at rest in CPU memory, frozen models that stay whole. None changes a bit."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import several
import torch

from align import export, fit
from tools import crash_runs

OFFLOADED = "{_target_: align.strategy.FSDP, cpu_offload: true}"
KEPT = "{_target_: align.strategy.FSDP, keep_frozen: true}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and text."""
    folder = tmp_path_factory.mktemp("world")
    several.prepare(folder)
    return folder


def train(kind: str, world: Path, run: Path, strategy: str, *more: str) -> Path:
    """A short run on two processes; micro-batches so small that their numbers differ."""
    few = ["data.episodes=36"] if kind == "ppo-ptx" else ["trainer.max_epochs=1"]
    small = ["module.micro_batch_tokens=300", "trainer.devices=2", f"trainer.strategy={strategy}"]
    assert fit.main(several.command(kind, world, run, *few, *small, *more)) == 0
    return run


@pytest.fixture(scope="module")
def usual(world: Path):
    """The run of each kind that others are compared with; sharded as usual."""
    return functools.cache(lambda kind: train(kind, world, world / kind, several.SHARDED))


@pytest.mark.parametrize("kind", ["ppo-ptx"])
def test_weights_at_rest_in_cpu_memory_change_no_bit(world: Path, usual, kind: str, tmp_path: Path) -> None:
    run = train(kind, world, tmp_path / "run", OFFLOADED)
    assert crash_runs.differences(run, usual(kind)) == []
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (run / "hf" / "model.safetensors").read_bytes()
    several.go_back(run, 8)  # of PPO: in the middle of the second rollout
    train(kind, world, run, OFFLOADED)
    assert crash_runs.differences(run, usual(kind)) == []


def test_frozen_models_that_stay_whole_change_no_bit(world: Path, usual, tmp_path: Path) -> None:
    run = train("ppo-ptx", world, tmp_path / "run", KEPT)
    assert crash_runs.differences(run, usual("ppo-ptx")) == []
    several.go_back(run, 8)
    train("ppo-ptx", world, run, KEPT.replace("}", ", cpu_offload: true}"))
    assert crash_runs.differences(run, usual("ppo-ptx")) == []


def test_nor_do_they_in_the_precision_of_the_arithmetic(world: Path, tmp_path: Path) -> None:
    mixed, few = "trainer.precision=bf16-mixed", "data.episodes=18"
    runs = [train("ppo-ptx", world, tmp_path / name, value, mixed, few)
            for name, value in (("usual", several.SHARDED), ("kept", KEPT))]  # fmt: skip
    assert crash_runs.differences(*runs) == []
    first = crash_runs.metrics(runs[1])[0]
    assert float(first["rollout/kl"]) == 0.0 and float(first["policy/ratio_max"]) == 1.0


def test_a_single_process_can_offload(world: Path, tmp_path: Path) -> None:
    runs = []
    for name, strategy in (("plain", "auto"), ("offloaded", OFFLOADED)):
        words = several.command(
            "sft", world, tmp_path / name, "trainer.max_epochs=1", f"trainer.strategy={strategy}"
        )  # fmt: skip
        # In a process of its own: Lightning leaves its process group behind.
        assert subprocess.run([sys.executable, "-m", "align.fit", *words]).returncode == 0
        runs.append(tmp_path / name)
    several.assert_same(*runs)


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])])
def test_a_gpu_has_only_what_it_computes_with(device: str, tmp_path: Path) -> None:
    found = []
    for offload in ("false", "true"):
        script, out = Path(__file__).with_name("offload_ranks.py"), tmp_path / offload
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, script, out, device, offload], check=True, env=environment)
        found.append(torch.load(out, weights_only=True))
    usual, offloaded = found
    for name, weight in usual["weights"].items():
        torch.testing.assert_close(offloaded["weights"][name], weight, rtol=1e-4, atol=1e-5)
    if device == "cuda":  # at least the moments, which are twice as large as the weights
        freed = usual["peak"] - offloaded["peak"]
        assert freed > 2 * sum(weight.nbytes for weight in usual["weights"].values())
