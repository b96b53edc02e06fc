"""Lets contenders take turns at a kind of work, each in a process that waits while others compute."""

import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmark import flops, machine, venvs
from tools.benchmark.kinds import CUDA, FLOAT32, Contender, Kind
from tools.benchmark.protocol import BenchmarkError, Worker
from tools.benchmark.work import Work

LONG = 10.0
"""Seconds of a first turn that say enough of a setting; after a shorter one, a second turn decides."""

LIMIT_TURNS = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """Of the whole run.

    Attributes:
        work: The common work.
        logs: Folder for what workers print.
        environments: Folder of the environments of contenders that need one.
        threads: Of each worker.
        turns: Instead of a kind's own number.
        families: Of contenders that take part.
        precisions: Likewise.
    """

    work: Work
    logs: Path
    environments: Path
    threads: int
    turns: int | None
    families: Collection[str]
    precisions: Collection[str]

    def worker(self, name: str, interpreter: str | Path = sys.executable) -> Worker:
        """Starts one; its log bears the name."""
        return Worker(interpreter, self.logs / f"{name.replace(' ', '-').replace(',', '')}.log", self.threads)

    @property
    def products(self) -> list[str]:
        """Names of the products of matrices whose speed is the machine's limit, in all precisions."""
        return [name for precision in self.precisions for name in machine.products(precision).values()]

    def limits(self, kind: Kind) -> list[str]:
        """Names of what limits a kind of work, as far as it is known."""
        if kind.limited:
            return self.products
        return [machine.COPY] if self.work.device == CUDA else []  # where writing is bound by reading

    def taking_part(self, kind: Kind) -> list[Contender]:
        """Whom of a kind's contenders this run has."""
        return [
            item
            for item in kind.contenders
            if item.family in self.families and item.precision in self.precisions and self.work.device in item.devices
        ]

    def prepare(self, worker: Worker, module: str, kind: str, setting: str, precision: str = FLOAT32) -> None:
        """Asks for preparation; `worker.receive` waits until it is done."""
        worker.send(
            do="prepare",
            module=f"tools.benchmark.{module}",
            kind=kind,
            setting=setting,
            work=str(self.work.folder),
            precision=precision,
            threads=self.threads,
        )


def compare(name: str, kind: Kind, setup: Setup, bench: Worker, say: Say) -> dict[str, Any]:
    """Measures a kind of work.

    Args:
        name: Of the kind.
        kind: What it is.
        setup: Of the run.
        bench: See there.
        say: Is told what happens.

    Returns:
        `contenders`: name -> precision, setting, turns, bytes of memory before (`base`) and at most (`peak`), versions,
        what was found of each setting that was tried, and operations that one turn needs (`flops`). `left_out`: name ->
        why. `limits`: operations a second of products of matrices, one number a turn; of writing, bytes of copies. On a
        GPU each contender has its own.

    Raises:
        BenchmarkError: Nobody takes part, or the first contender has failed, without which the others say little.
    """
    result: dict[str, Any] = {"contenders": {}, "left_out": {}}
    taking_part = setup.taking_part(kind)
    if not taking_part:
        raise BenchmarkError(
            f"nobody does this kind of work here: --device {setup.work.device}, --precision "
            f"{','.join(setup.precisions)}; on a GPU there is bfloat16 alone, so leave --precision out or name it"
        )
    # Models that fill a GPU do not wait in it for their turns; nor does anyone else compute on it meanwhile.
    for group in [[item] for item in taking_part] if setup.work.device == CUDA else [taking_part]:
        part = _in_turns(name, kind, group, setup, bench, say)
        limits = part.pop("limits", {})
        if setup.work.device == CUDA:  # of the same minutes
            part["contenders"] = {own: {**item, "limits": limits} for own, item in part["contenders"].items()}
        elif limits:
            result["limits"] = limits
        for what, own in part.items():
            result[what] |= own
        if (first := taking_part[0].name) in result["left_out"]:
            raise BenchmarkError(f"{first}, without which the others say little: {result['left_out'][first]}")
    return result


def _in_turns(
    name: str, kind: Kind, group: Sequence[Contender], setup: Setup, bench: Worker, say: Say
) -> dict[str, dict[str, Any]]:
    """See `compare`."""
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    limits: dict[str, list[float]] = {what: [] for what in setup.limits(kind)}
    running: dict[str, Worker] = {}
    with ExitStack() as stack:
        for contender in group:
            try:
                worker, found[contender.name] = _started(name, contender, setup, say)
            except BenchmarkError as error:
                left_out[contender.name] = str(error)
                continue
            running[contender.name] = stack.enter_context(closing(worker))
            if limits:
                found[contender.name]["flops"] = flops.of(name, setup.work, contender.networks)
        _each(running, left_out, lambda own, worker: found[own].update(_begun(worker.receive())))
        for number in range((setup.turns or kind.turns) + 1):
            for what, rates in limits.items():
                rates.append(bench.turn(what=what).rate)

            def measured(own: str, worker: Worker, number: int = number) -> None:
                say(f"{kind.title}: {own}, {f'turn {number}' if number else 'warming up'}")
                found[own]["turns"].append(worker.turn().asdict())

            _each(running, left_out, measured)
        _each(running, left_out, lambda own, worker: found[own].update(peak=worker.ask(do="end")["memory"]))
    for own in found.values():
        own["turns"] = own["turns"][1:]
    result = {"contenders": {own: item for own, item in found.items() if own in running}, "left_out": left_out}
    return {**result, "limits": {what: rates[1:] for what, rates in limits.items()}} if limits else result


def bench(setup: Setup) -> Worker:
    """A worker that measures the machine's limits; it is prepared while others are."""
    worker = setup.worker("machine")
    setup.prepare(worker, "machine", "", "")
    return worker


def limits(setup: Setup, bench: Worker) -> dict[str, list[float]]:
    """What the machine can do: operations a second of all products, and bytes a second of a copy."""
    every = (*setup.products, machine.COPY)
    return {what: [bench.turn(what=what).rate for _ in range(LIMIT_TURNS)] for what in every}


def _started(name: str, contender: Contender, setup: Setup, say: Say) -> tuple[Worker, dict[str, Any]]:
    """A contender's worker, which prepares the work in the fastest setting, and what is known of it so far."""
    interpreter = _interpreter(contender, setup, say)
    setting, trials = _setting(name, contender, setup, interpreter, say)
    worker = setup.worker(f"{name}-{contender.name}", interpreter)
    setup.prepare(worker, contender.module, name, setting, contender.precision)
    return worker, {"precision": contender.precision, "setting": setting, "trials": trials, "turns": []}


def _interpreter(contender: Contender, setup: Setup, say: Say) -> str | Path:
    if contender.requirement is None:
        return sys.executable
    say(f"an environment with {contender.requirement}")
    return venvs.python(setup.environments, contender.requirement)


def _setting(
    name: str, contender: Contender, setup: Setup, interpreter: str | Path, say: Say
) -> tuple[str, dict[str, Any]]:
    """The fastest of a contender's settings, and what was found of each: its rate, or why it does not run."""
    if len(contender.settings) == 1:
        return contender.settings[0], {}
    found: dict[str, Any] = {}
    for setting in contender.settings:
        say(f"{name}: {contender.name}, trying '{setting}'")
        with closing(setup.worker(f"{name}-{contender.name}-{setting}", interpreter)) as worker:
            try:
                setup.prepare(worker, contender.module, name, setting, contender.precision)
                worker.receive()
                turn = worker.turn()
                found[setting] = (turn if turn.seconds > LONG else worker.turn()).rate
            except BenchmarkError as error:
                found[setting] = str(error)
    rates = {setting: rate for setting, rate in found.items() if isinstance(rate, float)}
    if not rates:
        raise BenchmarkError("; ".join(f"{setting}: {error}" for setting, error in found.items()))
    return max(rates, key=lambda setting: rates[setting]), found


def _begun(answer: dict[str, Any]) -> dict[str, Any]:
    return {"base": answer["memory"], "versions": answer["versions"]}


def _each(running: dict[str, Worker], left_out: dict[str, str], do: Callable[[str, Worker], None]) -> None:
    """Does something with every worker, and leaves out those that have died."""
    for name, worker in list(running.items()):
        try:
            do(name, worker)
        except BenchmarkError as error:
            left_out[name] = str(error)
            del running[name]
