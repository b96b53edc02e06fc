"""`python -m tools.crash_test`: kills runs at random moments until each is done, and compares them with unbroken ones.

Every run is `align.fit` with a file of configs/ on a tiny model and real text. SIGKILL comes after a random time, or
inside a phase that was chosen: a rollout, an optimizer step, a checkpoint being written, the export. When a run has
ended at last, its weights, its last checkpoint, every logged number and every sample must equal, bit for bit, those of
a run that nobody disturbed. Speeds are the one exception. The figures are in docs/reliability.md.
"""

import argparse
import contextlib
import faulthandler
import importlib
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from tqdm import tqdm

from align import fit, interrupt, launch
from align.checkpoints import VerifiedCheckpointIO
from align.modules.base import AlignModule
from align.modules.ppo import PPOModule
from tools.crash_runs import arguments, differences, prepare

PHASES = ("start", "rollout", "step", "checkpoint", "export")
KINDS = ("sft", "reward", "ppo", "ppo-ptx")
GIVE_UP = 120.0
"""Seconds after which a run that should have ended counts as hanging."""

PATIENCE = 2.0
"""Seconds until ranks that outlive a killed one are ended, as `align.launch` does: they may wait for it to start."""


@dataclass
class Result:
    """What became of one kind of run."""

    kind: str
    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Variant:
    """What is run, and how it is disturbed."""

    kind: str
    workers: int = 0
    """Data loader processes."""
    optimizer: str = "adamw"
    processes: int = 1
    """Ranks. SIGKILL then comes to one of them or to all, as it happens."""
    sharded: bool = False
    """By FSDP."""
    by: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        ranks = f"{self.processes} processes{', FSDP' * self.sharded}" * (self.processes > 1 or self.sharded)
        parts = [self.kind, f"{self.workers} workers" * bool(self.workers), self.optimizer, ranks]
        return ", ".join(part for part in parts if part)


def crash(variant: Variant, world: Path, kills: int, seed: int = 0, tick: Callable[[], None] = lambda: None) -> Result:
    """Kills runs of a kind `kills` times in all, and compares each with an unbroken one when it is done."""
    draw = random.Random(f"{seed}/{variant}")
    command = [*arguments(variant.kind, world, variant.workers), f"module.optim.name={variant.optimizer}"]
    command += ["trainer.strategy={_target_: align.strategy.FSDP}"] * variant.sharded
    names = str(variant).replace(", ", "-").replace(" ", "-")
    if variant.optimizer != "adamw":
        importlib.import_module("bitsandbytes")  # takes seconds, which the forked processes need not spend
    reference, run = world / f"{names}-unbroken", world / f"{names}-killed"
    begun = time.monotonic()
    if _run([*command, f"run_dir={reference}"], variant, None, draw)[0] != 0:
        raise SystemExit(f"{variant}: the unbroken run failed:\n{(world / 'log.txt').read_text()[-3000:]}")
    took = time.monotonic() - begun
    result = Result(str(variant))
    while sum(result.kills.values()) < kills:
        result.runs += 1
        while True:
            enough = sum(result.kills.values()) >= kills
            moment = None if enough else _moment(draw, variant.kind, took)
            code, phase = _run([*command, f"run_dir={run}"], variant, moment, draw)
            if code is not None:
                break
            result.kills[phase] += 1
            tick()
        if code != 0:
            log = (world / "log.txt").read_text(encoding="utf-8")[-2000:]
            raise SystemExit(f"{variant}: exit code {code} after {sum(result.kills.values())} kills:\n{log}")
        result.different += differences(run, reference)
        shutil.rmtree(run)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tests; 0 if every run ended with the bits of an unbroken one."""
    parser = argparse.ArgumentParser(prog="python -m tools.crash_test", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="of each kind of run (default: 100)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of run (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="data loader processes (default: 0)")
    parser.add_argument("--processes", type=int, default=1, help="ranks of a run (default: 1)")
    parser.add_argument("--sharded", action="store_true", help="by FSDP")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="(default: adamw)")
    parser.add_argument("--signal", choices=("KILL", "TERM", "USR1"), default="KILL", help="(default: KILL)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(width=120)
    begun = time.monotonic()
    table = Table("run", "runs ended", "kills", *PHASES, "differences")
    failed = False
    with (
        tempfile.TemporaryDirectory() as name,
        Progress(console=console, transient=True, auto_refresh=False) as progress,
    ):
        # Without auto_refresh, since a process that is forked while another thread prints may wait for it forever.
        world = Path(name)
        prepare(world)
        for kind in options.kinds:
            task = progress.add_task(kind, total=options.kills)
            variant = Variant(
                kind, options.workers, options.optimizer, options.processes, options.sharded,
                signal.Signals[f"SIG{options.signal}"],
            )  # fmt: skip

            def tick(task: TaskID = task) -> None:
                progress.update(task, advance=1, refresh=True)

            result = crash(variant, world, options.kills, options.seed, tick)
            failed |= bool(result.different)
            for what, count in Counter(result.different).most_common(20):
                print(f"{result.kind}: {count} of {result.runs} runs differ in {what}")
            kills = [str(result.kills[phase]) for phase in PHASES]
            table.add_row(
                result.kind, str(result.runs), str(sum(result.kills.values())), *kills, str(len(result.different))
            )
    console.print(table)
    console.print(f"{time.monotonic() - begun:.0f} s")
    return int(failed)


@dataclass(frozen=True)
class _Moment:
    """When to kill: so long after the start, or after a phase has been entered so many times."""

    seconds: float
    phase: str | None = None
    entered: int = 1


def _moment(draw: random.Random, kind: str, took: float) -> _Moment:
    if draw.random() < 0.3:
        return _Moment(draw.uniform(0.0, took))
    possible = [phase for phase in PHASES if phase != "rollout" or kind.startswith("ppo")]
    phase = draw.choice(possible)
    return _Moment(draw.expovariate(1 / 0.004), phase, draw.randint(1, 4) if phase not in ("export", "start") else 1)


def _run(command: list[str], variant: Variant, moment: _Moment | None, draw: random.Random) -> tuple[int | None, str]:
    """Forks processes that train; returns the exit code, None when the signal ended them, and the last phase.

    Forking spares each start the seconds that importing PyTorch takes.
    """
    shared = mmap.mmap(-1, 4 * (1 + len(PHASES)))
    begun = time.monotonic()
    ranks = _forked(command, variant.processes, shared)
    codes: dict[int, int] = {}
    phase, killed = PHASES[0], False
    due: float | None = begun + moment.seconds if moment is not None and moment.phase is None else None
    while len(codes) < len(ranks):
        for rank in ranks - codes.keys():
            done, status = os.waitpid(rank, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        numbers = _numbers(shared)
        if moment is not None and due is None and numbers[1 + PHASES.index(moment.phase or "")] >= moment.entered:
            due = now + moment.seconds
        if not killed and due is not None and now >= due:
            phase, killed = PHASES[numbers[0]], True
            _send(variant.by, ranks, codes, draw)
        if killed and -variant.by in codes.values() and now >= (due or 0.0) + PATIENCE:
            with contextlib.suppress(ProcessLookupError):  # all have ended by now
                os.killpg(min(ranks), signal.SIGKILL)
        elif now - begun > GIVE_UP:
            os.killpg(min(ranks), signal.SIGKILL)
            raise SystemExit(f"hangs: {' '.join(command)}\n{(world_of(command) / 'log.txt').read_text()[-5000:]}")
        time.sleep(0.0005)
    if killed and {-variant.by, interrupt.AGAIN} & set(codes.values()):
        return None, phase
    return max(codes.values(), key=abs), phase


def _forked(command: list[str], processes: int, shared: mmap.mmap) -> set[int]:
    """Starts the ranks of a run, in one process group."""
    port = launch.free_port()
    ranks: list[int] = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.setpgid(0, ranks[0] if ranks else 0)  # worker processes die with it
            if processes > 1:
                os.environ.update(launch.variables(rank, processes, port))
            _train(command, shared, rank)
        ranks.append(child)
        with contextlib.suppress(PermissionError):  # it has done so itself
            os.setpgid(child, ranks[0])
    return set(ranks)


def _send(number: signal.Signals, ranks: set[int], ended: Mapping[int, int], draw: random.Random) -> None:
    """Sends the signal to one of several ranks, or to all and their workers."""
    left = sorted(ranks - ended.keys())
    if number is signal.SIGKILL and draw.random() < 1 / len(ranks):
        os.killpg(min(ranks), number)
    elif left:
        os.kill(draw.choice(left), number)


def _train(command: list[str], shared: mmap.mmap, rank: int) -> None:
    """The forked process: notes which phase it is in, trains, and never returns."""
    code = 1
    try:
        with open(world_of(command) / "log.txt", "a" if rank else "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            tqdm.set_lock(threading.RLock())  # tqdm's own is shared by forked processes: a killed one would keep it
            faulthandler.dump_traceback_later(GIVE_UP - 5.0, file=log)  # where it hangs
            if rank == 0:
                _noted(PPOModule, "collect", "rollout", shared)
                _noted(AlignModule, "accumulate", "step", shared)
                _noted(AlignModule, "step", "step", shared)
                _noted(VerifiedCheckpointIO, "save_checkpoint", "checkpoint", shared)
                _noted(fit, "export", "export", shared)
                _enter(shared, 0)
            code = fit.main(command)
            sys.stdout.flush()
    finally:
        sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else None  # type: ignore[arg-type]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def world_of(command: list[str]) -> Path:
    """The folder in which a run's folder is."""
    return Path(next(word.partition("=")[2] for word in command if word.startswith("run_dir="))).parent


def _noted(owner: Any, name: str, phase: str, shared: mmap.mmap) -> None:
    """Lets a function say that its phase has begun, and which one goes on when it is done."""
    original, number = getattr(owner, name), PHASES.index(phase)

    def noting(*arguments: Any, **keywords: Any) -> Any:
        before = _numbers(shared)[0]
        _enter(shared, number)
        try:
            return original(*arguments, **keywords)
        finally:
            shared[0:4] = before.to_bytes(4, "little")

    setattr(owner, name, noting)


def _enter(shared: mmap.mmap, number: int) -> None:
    place = 4 * (1 + number)
    shared[place : place + 4] = (_numbers(shared)[1 + number] + 1).to_bytes(4, "little")
    shared[0:4] = number.to_bytes(4, "little")


def _numbers(shared: mmap.mmap) -> list[int]:
    """The phase at present, and how often each was entered."""
    return [int.from_bytes(shared[place : place + 4], "little") for place in range(0, len(shared), 4)]


if __name__ == "__main__":
    sys.exit(main())
