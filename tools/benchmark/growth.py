"""How our speed changes with sizes, and with the number of processes. Nobody else takes part."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from align.precision import multiplies_bfloat16
from tools.benchmark.kinds import BFLOAT16, FLOAT32, GROWTH, TRAINERS
from tools.benchmark.measure import Say, Setup
from tools.benchmark.protocol import ROOT, BenchmarkError, environment, tail
from tools.benchmark.work import LEARNING_RATE, Size

ROUNDS = 2
"""Turns of every point of a growth curve, and runs of every number of processes."""

SCALED_EPOCHS = 2
SPEED = "speed/tokens_per_second"
"""The column of metrics.csv."""

Points = Mapping[str, Mapping[int, Mapping[str, int]]]


def axes(size: Size) -> Points:
    """What grows -> how large it is -> arguments of `tools.benchmark.ours.grow`.

    Tokens of a step stay about the same where something else grows.
    """
    few = max(1, size.batch // 4)
    tokens = 2 * size.positions
    return {
        "examples a step": {count: {"examples": count} for count in _parts(size.batch, (32, 8, 2, 1))},
        "tokens an example": {
            length: {"examples": max(1, tokens // length), "length": length}
            for length in _parts(size.positions, (32, 8, 2, 1))
        },
        "vocabulary": {size.vocab * k // 8: {"examples": few, "vocab": size.vocab * k // 8} for k in (1, 8, 32, 64)},
        "hidden units": {
            hidden: {"examples": few, "hidden": hidden, "inner": hidden * size.inner // size.hidden}
            for hidden in (size.hidden * k // 2 for k in (1, 2, 3, 4))
        },
    }  # fmt: skip


def grow(setup: Setup, say: Say) -> dict[str, Any]:
    """Axis -> `precision`, `sizes`, and the rates in tokens a second of every turn at each of them."""
    points, precision = axes(setup.work.size), fastest(setup.precisions)
    found = {axis: {size: [] for size in own} for axis, own in points.items()}
    with closing(setup.worker(GROWTH)) as worker:
        setup.prepare(worker, "ours", GROWTH, "", precision)
        worker.receive()
        for number in range(setup.turns or ROUNDS):
            for axis, own in points.items():
                for size, arguments in own.items():
                    say(f"growth, round {number + 1}: {axis} {size}")
                    found[axis][size].append(worker.turn(**arguments).rate)
    return {
        axis: {"precision": precision, "sizes": list(own), "rates": list(own.values())} for axis, own in found.items()
    }


def fastest(precisions: Collection[str]) -> str:
    """The one of these precisions in which this CPU is expected to be the fastest."""
    wanted = BFLOAT16 if multiplies_bfloat16() else FLOAT32
    return wanted if wanted in precisions else next(iter(precisions))


def scale(setup: Setup, say: Say) -> dict[str, Any]:
    """Processes -> tokens a second of every optimizer step but the first of `python -m align.fit`, a thread each.

    And `precision`. Runs of one and of two processes learn from the same batches, and take turns.

    Raises:
        BenchmarkError: A run has failed.
    """
    folder = setup.work.folder / "scaling"
    folder.mkdir(exist_ok=True)
    _write_config(folder, setup)
    found: dict[str, list[float]] = {"1": [], "2": []}
    for number in range(setup.turns or ROUNDS):
        for processes, rates in found.items():
            say(f"scaling, run {number + 1}: {processes} process{'es' if processes != '1' else ''}")
            rates += _speeds(folder, processes, setup.logs / f"scaling-{processes}.log")
    return {"precision": fastest(setup.precisions), **found}


def _speeds(folder: Path, processes: str, log: Path) -> list[float]:
    run = folder / f"run-{processes}"
    shutil.rmtree(run, ignore_errors=True)
    command = [
        sys.executable, "-m", "align.fit", str(folder / "sft.yaml"), f"run_dir={run}", f"trainer.devices={processes}"
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        code = subprocess.run(command, cwd=ROOT, env=environment(1), stdout=output, stderr=output).returncode
    if code:
        raise BenchmarkError(
            f"`{' '.join(command)}` ended with exit code {code}, expected 0. The end of {log}:\n{tail(log)}"
        )
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [float(row[SPEED]) for row in csv.DictReader(file) if row.get(SPEED)][1:]


def _write_config(folder: Path, setup: Setup) -> None:
    """The run that is made with one process and with two. JSON is YAML."""
    size, data = setup.work.size, folder / "demonstrations.jsonl"
    lines = [json.dumps(row) for row in setup.work.demonstrations]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "run_dir": str(folder / "run"),
        "seed": 0,
        "tokenizer": {"_target_": "align.models.load.load_tokenizer", "path": setup.work.policy},
        "data": {
            "_target_": "tools.benchmark.ours.Demonstrations", "tokenizer": "${tokenizer}", "train": str(data),
            "batch_size": max(2, size.batch // 2), "max_prompt_tokens": size.prompt.high,
            "max_response_tokens": size.response.high,
        },
        "module": {
            "_target_": "align.modules.sft.SFTModule", "tokenizer": "${tokenizer}",
            "model": {"_target_": "align.models.load.load_causal_lm", "path": setup.work.policy},
            "optim": {"_target_": "align.optim.Optim", "lr": LEARNING_RATE},
        },
        "trainer": {
            "accelerator": "cpu", "precision": TRAINERS[fastest(setup.precisions)], "max_epochs": SCALED_EPOCHS,
            "log_every_n_steps": 1,
        },
        "loggers": {"wandb": False},
    }  # fmt: skip
    (folder / "sft.yaml").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _parts(whole: int, divisors: tuple[int, ...]) -> list[int]:
    """Distinct parts of a whole, none less than one."""
    return list(dict.fromkeys(max(1, whole // divisor) for divisor in divisors))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
