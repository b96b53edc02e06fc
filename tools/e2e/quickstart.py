"""`python -m tools.e2e.quickstart`: the whole method on the embedded data, one printed command after another.

Each stage is a command a user could type; this file only knows their order, times them, and stops at the first that
fails. PPO-ptx and plain PPO do not depend on each other and run side by side, each on half of the processor's cores.
What was killed goes on when it is started again: with the stage it was in, and in that stage from its last checkpoint.

A command takes some seconds to import what it needs. On Linux that is done once, and each runs in a process forked from
this one.
"""

import argparse
import atexit
import gc
import importlib
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.atomic import write_text

FIT = "align.fit"
EVALUATE = "align.evaluate"

PROGRESS = Path("runs/quickstart.txt")
"""The number of the stage that has been begun and not ended."""

FORKS = sys.platform == "linux"
"""Elsewhere libraries that are loaded already may not survive a fork."""

NEEDED = ("align.fit", "align.sample", "align.evaluate", "transformers.models.llama.modeling_llama", "wandb")
"""What most stages import. No threads come of it but those of NumPy's OpenBLAS, which sees to forks itself."""

PLAIN_PPO = ("run_dir=runs/ppo", "module.ppo.ptx_coef=0", "data.pretraining_batch=0")


@dataclass(frozen=True)
class Command:
    """A `python -m` command, and the file its output goes to where it runs beside another."""

    words: tuple[str, ...]
    log: str | None = None


STAGES: tuple[tuple[str, tuple[Command, ...]], ...] = (
    ("data, tokenizer and a random model", (Command(("tools.e2e.prepare", "--out", "runs/data")),)),
    ("base model: pretraining on plain text", (Command((FIT, "configs/base.yaml")),)),
    ("SFT on demonstrations", (Command((FIT, "configs/sft.yaml")),)),
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
    ("reward model", (Command((FIT, "configs/reward.yaml")),)),
    (
        "PPO-ptx, and plain PPO beside it",
        (
            Command((FIT, "configs/ppo.yaml")),
            Command((FIT, "configs/ppo.yaml", *PLAIN_PPO), log="runs/ppo.log"),
        ),
    ),
    ("evaluation", (Command((EVALUATE, "configs/evaluate.yaml")),)),
    ("report", (Command(("tools.e2e.report", "--runs", "runs", "--out", "runs/report")),)),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns the exit code of the first that fails, or 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.e2e.quickstart", description=__doc__.split("\n")[0])
    parser.add_argument("--start", type=int, metavar="N", help=f"begin with stage N of {len(STAGES)}, on what is there")
    parser.add_argument("--anew", action="store_true", help="do not continue what was stopped")
    options = parser.parse_args(argv)
    continues = options.start is None and not options.anew and PROGRESS.exists()
    first = int(PROGRESS.read_text(encoding="utf-8")) if continues else options.start or 1
    if continues:
        print(f"continues with stage {first} of {len(STAGES)}; --anew begins again")
    begun = time.monotonic()
    times = []
    for number, (name, commands) in enumerate(STAGES, start=1):
        if number < first:
            continue
        print(f"\n[{number}/{len(STAGES)}] {name}  ({_clock(time.monotonic() - begun)} so far)", flush=True)
        start = time.monotonic()
        PROGRESS.parent.mkdir(exist_ok=True)
        write_text(PROGRESS, f"{number}\n")
        code = _run(commands, overwrite=not (continues and number == first))
        if code:
            print(f"stage {number} ended with exit code {code}; the same command continues here", file=sys.stderr)
            return code
        times.append((name, time.monotonic() - start))
    PROGRESS.unlink()
    print("\n" + "\n".join(f"{_clock(seconds):>7}  {name}" for name, seconds in times))
    print(f"{_clock(time.monotonic() - begun):>7}  in all. Report: runs/report/report.md, plots beside it")
    return 0


def _run(commands: tuple[Command, ...], *, overwrite: bool) -> int:
    """Runs the commands side by side; the first exit code that is not 0, else 0."""
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    waits = []
    for command in commands:
        words = list(command.words)
        if words[0] == EVALUATE or (overwrite and words[0] == FIT):
            words.append("overwrite=true")
        shown = shlex.join(("python", "-m", *words))
        print(f"$ {shown}" + (f" > {command.log}" if command.log else ""), flush=True)
        if command.log is not None:
            Path(command.log).parent.mkdir(parents=True, exist_ok=True)
            Path(command.log).write_bytes(b"")
        waits.append((_forked if FORKS else _started)(words, threads, command.log))
    codes = [wait() for wait in waits]
    return next((code for code in codes if code), 0)


def _started(words: Sequence[str], threads: int, log: str | None) -> Callable[[], int]:
    """Starts a command in a new process; what is returned waits for it and gives its exit code."""
    environment = {**os.environ, **_settings(threads)}
    out = os.open(log, os.O_WRONLY) if log is not None else None
    process = subprocess.Popen([sys.executable, "-m", *words], env=environment, stdout=out, stderr=out)
    if out is not None:
        os.close(out)
    return process.wait


def _forked(words: Sequence[str], threads: int, log: str | None) -> Callable[[], int]:
    """The same in a fork of this process, which imports for all."""
    for name in NEEDED:
        importlib.import_module(name)
    gc.freeze()
    process = multiprocessing.get_context("fork").Process(target=_become, args=(words, threads, log))
    process.start()

    def wait() -> int:
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    return wait


def _become(words: Sequence[str], threads: int, log: str | None) -> None:
    """Runs a command as if this process had been started for it."""
    import torch

    atexit._clear()  # what was imported before the fork is not this process's to clean up
    os.environ.update(_settings(threads))
    torch.set_num_threads(threads)  # it has read the environment when it was imported
    if log is not None:
        sys.stdout = sys.stderr = os.fdopen(os.open(log, os.O_WRONLY), "w", buffering=1, encoding="utf-8")
        for standard in (1, 2):  # what is not Python's, and processes that the command starts
            os.dup2(sys.stdout.fileno(), standard)
    sys.argv = list(words)
    try:
        sys.exit(importlib.import_module(words[0]).main())
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _settings(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
