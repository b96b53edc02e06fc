"""Starts the processes of a run on this machine, as `torchrun --standalone` would, and stays until all have ended.

What torchrun does not do: signals that announce an end (SIGTERM, SIGUSR1) reach every process, which then save and exit
with `interrupt.AGAIN`, and that exit code is passed on.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch

from align import cli, distributed, interrupt
from align.config import ConfigError

GRACE = 15.0
"""Seconds that the others have to end by themselves after one process has failed; none after a user's mistake, which
all find alike."""

PARENT = "ALIGN_PARENT_PIPE"
"""Environment variable: a file descriptor that is closed when the starting process dies."""


def processes(devices: Any, num_nodes: int = 1) -> int:
    """How many processes this one has to start for a run; 1: none, it is the run, or one of its ranks.

    Args:
        devices: As the Trainer takes them: a number, a list of GPUs, -1 for all GPUs, "auto" for one.
        num_nodes: Machines.

    Raises:
        ConfigError: There are several machines, which only their own launcher can reach.
    """
    if distributed.environment() is not None:
        return 1
    if num_nodes > 1:
        raise ConfigError(
            [
                f"trainer.num_nodes: got {num_nodes}, but this process runs alone; start the same command on every "
                "machine with torchrun, or in a Slurm job with srun"
            ]
        )
    return devices_of(devices)


def devices_of(devices: Any) -> int:
    """How many devices of a machine the Trainer's `devices` mean: see `processes`."""
    if isinstance(devices, str):
        named = [part for part in devices.split(",") if part.strip()]
        devices = named if "," in devices else int(devices) if devices.lstrip("-").isdigit() else 1
    if devices == -1:
        return torch.cuda.device_count()
    return devices if isinstance(devices, int) else len(devices)


def run(command: Sequence[str], processes: int) -> int:
    """Runs a command as so many ranks of one process group.

    Args:
        command: Program and arguments; the ranks are told apart by the environment variables of torchrun.
        processes: How many.

    Returns:
        0 if all ended well, otherwise the exit code of the first that did not; 128 + N for signal N.
    """
    alive, ends = os.pipe()
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    shared = {**os.environ, "OMP_NUM_THREADS": threads, PARENT: str(alive)}
    port = free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with _passing_on(ranks):
            for rank in range(processes):
                environment = {**shared, **variables(rank, processes, port)}
                ranks.append(subprocess.Popen(command, env=environment, pass_fds=(alive,)))
            return _outcome(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        os.close(alive)
        os.close(ends)


def variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment that tells a process its place among those on this machine; names and meanings are torchrun's."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "align",  # how Lightning and torch know these variables
    }


def die_with_parent() -> None:
    """Ends this process when the one that started it with `run` is gone; otherwise it would go on unseen."""
    if PARENT in os.environ:
        threading.Thread(target=_watch, args=(int(os.environ.pop(PARENT)),), daemon=True).start()


def _watch(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is ever written: it returns when the other end is closed
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _passing_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals to this process reach every rank. Ctrl-C does so by itself: the terminal sends it to all."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in ranks if number != signal.SIGINT or not sys.stdin.isatty() else ():
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (*interrupt.SIGNALS, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all; where one fails, the others have `GRACE` to notice."""
    failed, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in ranks]
        harmless = (0, interrupt.AGAIN, distributed.FOLLOWS)
        bad = [code for code in codes if code is not None and code not in harmless]
        if bad and not failed:
            failed = min(bad)  # a signal, where there was one: the others only lost the connection
            deadline = time.monotonic() + (0.0 if failed == cli.MISTAKE else GRACE)
            if failed < 0:
                name = signal.Signals(-failed).name
                print(f"rank {codes.index(failed)} was killed by {name}, which ends the run", file=sys.stderr)
        ended = [code for code in codes if code is not None]
        if len(ended) == len(codes):
            return 128 - failed if failed < 0 else failed or max(ended)
        if time.monotonic() >= deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.05)


def free_port() -> int:
    """A TCP port that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def again(path: str, overrides: Sequence[str]) -> list[str]:
    """The command line of this very command, `python -m align.fit`."""
    return [sys.executable, "-m", "align.fit", path, *overrides]
