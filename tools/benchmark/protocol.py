"""What the benchmark and its workers say to each other: one line of JSON each way.

A worker is a process of its own, started with the Python of its contender's environment. It prepares one kind of work,
then measures a turn whenever it is asked to, and waits in between without computing anything, so contenders can take
turns on the same machine. Only the standard library is needed here, since every environment reads this file.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKER = "tools.benchmark.worker"
BYTECODE = ROOT / "runs" / "benchmark" / "bytecode"
LOG_LINES = 8
"""Of a worker's log, shown when it has died."""


class BenchmarkError(Exception):
    """Something outside the benchmark's power; the message says what, what was expected, and the remedy."""


@dataclass(frozen=True)
class Turn:
    """What one turn has measured.

    Attributes:
        seconds: Wall-clock time of the work, without preparation.
        units: How much was done, in the unit of its kind of work.
        phases: Seconds of parts of it, by name; they need not add up to all.
    """

    seconds: float
    units: float
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.units / self.seconds

    def asdict(self) -> dict[str, Any]:
        """As it is sent and kept."""
        return dataclasses.asdict(self)


class Worker:
    """The benchmark's end of the line to a worker.

    Args:
        python: The interpreter of its environment.
        log: Takes all that the worker's libraries print.
        threads: That it may compute with.
    """

    def __init__(self, python: str | Path, log: Path, threads: int) -> None:
        self.log = log
        self._unread = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", WORKER],
                cwd=ROOT,
                env=environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer; those to earlier requests are dropped.

        Raises:
            BenchmarkError: The worker has died.
        """
        self.send(**request)
        while self._unread > 1:
            self.receive()
        return self.receive()

    def send(self, **request: Any) -> None:
        """Sends a request, whose answer `receive` waits for."""
        assert self._process.stdin is not None
        self._unread += 1
        with contextlib.suppress(BrokenPipeError):  # what it died of is in the log
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to the first request that has not been answered yet.

        Raises:
            BenchmarkError: The worker has died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise BenchmarkError(
                f"a worker ended with exit code {code}, expected an answer. The end of {self.log}:\n{tail(self.log)}"
            )
        self._unread -= 1
        return json.loads(line)

    def turn(self, **arguments: Any) -> Turn:
        """Measures one turn."""
        return Turn(**self.ask(do="turn", arguments=arguments))

    def close(self) -> None:
        """Ends the worker, and waits until it has gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def environment(threads: int) -> dict[str, str]:
    """The variables of a worker: so many threads, nothing from the network, nothing reported to anyone.

    Where Python shall not write bytecode beside the sources, it goes to `BYTECODE`: workers start often, and compiling
    their libraries takes three times as long as importing them.
    """
    count = str(threads)
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_MODE": "disabled"}
    bars = {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    own = {**os.environ, **quiet, **bars, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    if own.pop("PYTHONDONTWRITEBYTECODE", ""):
        own.setdefault("PYTHONPYCACHEPREFIX", str(BYTECODE))
    return own


def tail(log: Path) -> str:
    """The last lines of a log, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(f"    {line}" for line in lines) or "    (nothing)"


def peak_bytes(usage: int) -> int:
    """`ru_maxrss` in bytes: Linux counts kilobytes, macOS bytes."""
    return usage if sys.platform == "darwin" else 1024 * usage
