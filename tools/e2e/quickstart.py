"""`python -m tools.e2e.quickstart`: the whole method on the embedded data, one printed command after another.

Each stage is a command a user could type; this file only knows their order, times them, and stops at the first that
fails. PPO-ptx and plain PPO do not depend on each other and run side by side, each on half of the processor's cores.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FIT = "align.fit"
PLAIN_PPO = ("run_dir=runs/ppo", "module.ppo.ptx_coef=0", "data.pretraining_batch=0")


@dataclass(frozen=True)
class Command:
    """A `python -m` command, and the file its output goes to where it runs beside another."""

    words: tuple[str, ...]
    log: str | None = None


STAGES: tuple[tuple[str, tuple[Command, ...]], ...] = (
    ("data, tokenizer and a random model", (Command(("tools.e2e.prepare", "--out", "runs/data")),)),
    ("base model: pretraining on plain text", (Command((FIT, "configs/base.yaml", "overwrite=true")),)),
    ("SFT on demonstrations", (Command((FIT, "configs/sft.yaml", "overwrite=true")),)),
    ("4 answers a prompt from the SFT model", (Command(("align.sample", "configs/sample.yaml")),)),
    (
        "rankings: simulated labelers, and people",
        (
            Command(
                (
                    "tools.e2e.label", "runs/samples/samples.jsonl", "runs/data/rankings.train.jsonl.gz",
                    "--human", "runs/data/rankings.human.train.jsonl.gz",
                )
            ),
        ),
    ),
    ("reward model", (Command((FIT, "configs/reward.yaml", "overwrite=true")),)),
    (
        "PPO-ptx, and plain PPO beside it",
        (
            Command((FIT, "configs/ppo.yaml", "overwrite=true")),
            Command((FIT, "configs/ppo.yaml", *PLAIN_PPO, "overwrite=true"), log="runs/ppo.log"),
        ),
    ),
    ("evaluation", (Command(("align.evaluate", "configs/evaluate.yaml", "overwrite=true")),)),
    ("report", (Command(("tools.e2e.report", "--runs", "runs", "--out", "runs/report")),)),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns the exit code of the first that fails, or 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.e2e.quickstart", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--start", type=int, default=1, metavar="N", help=f"begin with stage N of {len(STAGES)}, on what is there"
    )
    first = parser.parse_args(argv).start
    begun = time.monotonic()
    times = []
    for number, (name, commands) in enumerate(STAGES, start=1):
        if number < first:
            continue
        print(f"\n[{number}/{len(STAGES)}] {name}  ({_clock(time.monotonic() - begun)} so far)", flush=True)
        start = time.monotonic()
        code = _run(commands)
        if code:
            print(f"stage {number} failed with exit code {code}; after mending it: --start {number}", file=sys.stderr)
            return code
        times.append((name, time.monotonic() - start))
    print("\n" + "\n".join(f"{_clock(seconds):>7}  {name}" for name, seconds in times))
    print(f"{_clock(time.monotonic() - begun):>7}  in all. Report: runs/report/report.md, plots beside it")
    return 0


def _run(commands: tuple[Command, ...]) -> int:
    """Runs the commands side by side; the first exit code that is not 0, else 0."""
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    running = []
    for command in commands:
        shown = shlex.join(("python", "-m", *command.words))
        print(f"$ {shown}" + (f" > {command.log}" if command.log else ""), flush=True)
        words = [sys.executable, "-m", *command.words]
        if command.log is None:
            running.append(subprocess.Popen(words, env=environment))
        else:
            Path(command.log).parent.mkdir(parents=True, exist_ok=True)
            with open(command.log, "w", encoding="utf-8") as log:
                running.append(subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in running]
    return next((code for code in codes if code), 0)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
