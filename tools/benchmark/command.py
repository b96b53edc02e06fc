"""`python -m tools.benchmark`: the same work by align, by TRL and by a loop written by hand, measured in turns.

Writes all numbers (performance.json), a picture (performance.png) and tables (performance.md). Environments with TRL
are made on the way; without a network, or without TRL, `--against plain` compares with the loop alone.
"""

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import logging

from align.atomic import write_text
from align.precision import multiplies_bfloat16
from tools.benchmark import growth, measure, page, pictures, work
from tools.benchmark.kinds import (
    ALL,
    BFLOAT16,
    CPU,
    CUDA,
    FLOAT32,
    GROWTH,
    KINDS,
    OURS,
    PLAIN,
    PRECISIONS,
    SCALING,
    TRL,
)
from tools.benchmark.protocol import ROOT, BenchmarkError

OUT = Path("docs")
RUNS = Path("runs/benchmark")
PACKAGES = ("torch", "transformers", "lightning")

console = Console(stderr=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the arguments name; returns the exit code: 1 where something was left out, 2 where it cannot be."""
    options = _parser().parse_args(argv)
    gpu = options.device == CUDA
    fast = (BFLOAT16,) if gpu else PRECISIONS if multiplies_bfloat16() else (FLOAT32,)
    for name, usual in (
        ("size", "1.4b" if gpu else "15m"),
        ("only", ",".join(KINDS if gpu else ALL)),
        ("against", PLAIN if gpu else f"{PLAIN},{TRL}"),
        ("precision", ",".join(fast)),
    ):
        if getattr(options, name) is None:
            setattr(options, name, usual)
    try:
        only = _names("--only", options.only, KINDS if gpu else ALL)
        families = _names("--against", options.against, (PLAIN, TRL))
        precisions = _names("--precision", options.precision, PRECISIONS)
        found = _read(options) if options.report_only else _measured(options, only, families, precisions)
        page.write(options.out / "performance.md", found)
    except BenchmarkError as error:
        console.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        return 2
    pictures.draw(options.out / f"{_stem(options)}.png", found)
    console.print(page.tables(found), markup=False, soft_wrap=True)
    left_out = [name for kind in found["kinds"].values() for name in kind["left_out"]] + list(found["failed"])
    if left_out:
        console.print(f"left out: {', '.join(dict.fromkeys(left_out))}; see above, and performance.json for why")
    return 1 if left_out else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", help=f"what to measure, of {','.join(ALL)} (default: all; on a GPU {','.join(KINDS)})"
    )
    parser.add_argument(
        "--against", help=f"whom to compare with, of {PLAIN},{TRL} (default: both; on a GPU {PLAIN} alone)"
    )  # fmt: skip
    parser.add_argument(
        "--precision",
        help=f"of {','.join(PRECISIONS)} (default: {FLOAT32}, and {BFLOAT16} on a CPU with units for it; on a GPU it "
        "alone)",
    )
    parser.add_argument("--turns", type=_positive, help="turns of each contender that count (default: 5, of PPO 3)")
    parser.add_argument(
        "--threads", type=_positive, default=growth.cores(), help="of each contender (default: all cores)"
    )
    parser.add_argument("--device", choices=(CPU, CUDA), default=CPU, help=f"where the work is done (default: {CPU})")
    parser.add_argument(
        "--size", choices=list(work.SIZES), help="of models and data (default: 15m; on a GPU 1.4b)"
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the results (default: {OUT})")
    parser.add_argument("--runs", type=Path, default=RUNS, help=f"folder of models, data and logs (default: {RUNS})")
    parser.add_argument("--venvs", type=Path, help="folder of environments with TRL (default: venvs in that of --runs)")
    parser.add_argument("--report-only", action="store_true", help="tables and picture again, from performance.json")
    return parser


def _measured(
    options: argparse.Namespace, only: list[str], families: list[str], precisions: list[str]
) -> dict[str, Any]:
    """Measures, and writes performance.json after every kind of work."""
    out, runs, size = options.out, options.runs.absolute(), work.SIZES[options.size]
    out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    with console.status("making models and data") as status, ExitStack() as stack:
        setup = measure.Setup(
            work=work.write(runs / "work" / size.name, size, device=options.device),
            logs=runs / "logs",
            environments=(options.venvs or runs / "venvs").absolute(),
            threads=options.threads,
            turns=options.turns,
            families=(OURS, *families),
            precisions=precisions,
        )
        made = _made(options, precisions)
        found: dict[str, Any] = {
            "made": made,
            "kinds": {},
            "failed": {},
            "limits": {},
            **kept(out / f"{_stem(options)}.json", made, only),
        }
        bench = stack.enter_context(closing(measure.bench(setup)))
        for name in only:
            begun = datetime.datetime.now()
            try:
                if name in KINDS:
                    found["kinds"][name] = measure.compare(name, KINDS[name], setup, bench, status.update)
                else:
                    found[name] = {GROWTH: growth.grow, SCALING: growth.scale}[name](setup, status.update)
            except BenchmarkError as error:
                found["failed"][name] = str(error)
            for what, rates in measure.limits(setup, bench).items():
                found["limits"].setdefault(what, []).extend(rates)
            _say_what_is_missing(name, found)
            write_text(out / f"{_stem(options)}.json", json.dumps(found, indent=1) + "\n")
            console.print(f"{name}: done in {(datetime.datetime.now() - begun).total_seconds():.0f} s")
    return found


def kept(path: Path, made: dict[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """What an earlier run whose results have the same name measured alike on the same machine, and this one will not.

    Alike: with models of the same size, as many threads, and in the same precisions.

    Returns:
        Results by kind of work, and under "earlier" when and of which commit they are.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"made": {}, "kinds": {}}
    earlier = {"precisions": [FLOAT32], "gpu": "", **before["made"]}  # results that do not say it were all like this
    if any(earlier.get(name) != made[name] for name in ("cpu", "gpu", "cores", "threads", "size", "precisions")):
        return {}
    own = {name: kind for name, kind in before["kinds"].items() if name not in only}
    others = {name: before[name] for name in (GROWTH, SCALING) if name in before and name not in only}
    when = {name: before["made"][name] for name in ("date", "commit")}
    known = before.get("earlier", {})
    return {"kinds": own, **others, "earlier": {name: known.get(name, when) for name in (*own, *others)}}


def _say_what_is_missing(name: str, found: dict[str, Any]) -> None:
    missing = dict(found["kinds"].get(name, {}).get("left_out", {}))
    if name in found["failed"]:
        missing[name] = found["failed"][name]
    for who, why in missing.items():
        console.print(
            f"{name}: {who} is left out, the others go on. {why}", markup=False, style="yellow", soft_wrap=True
        )


def _made(options: argparse.Namespace, precisions: list[str]) -> dict[str, Any]:
    """When, where and with what."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": options.device,
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if options.device == CUDA else "",
        "cores": growth.cores(),
        "threads": options.threads,
        "size": options.size,
        "precisions": precisions,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _commit() -> str:
    """The commit, with a plus sign where files differ from it."""
    asked = ["git", "describe", "--always", "--abbrev=8", "--dirty=+"]
    try:
        found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git
        found = ""
    return found or "unknown"


def _cpu() -> str:
    """Its name, where the system tells, and which of several kinds that have it, as virtual machines hide that."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    kind = [f"{name} {found[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in found]
    return f"{found['model name']} ({', '.join(kind)})" if kind else found["model name"]


def _stem(options: argparse.Namespace) -> str:
    """What files of results are called: results of a GPU stand beside those of a CPU."""
    return "performance" if options.device == CPU else f"performance_{options.size}"


def _read(options: argparse.Namespace) -> dict[str, Any]:
    path = options.out / f"{_stem(options)}.json"
    if not path.exists():
        raise BenchmarkError(
            f"--report-only: {path} is not there; run without it first, or name another folder by --out"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _names(flag: str, given: str, known: Collection[str]) -> list[str]:
    """A list with commas; each name once."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise BenchmarkError(f"{flag}: got {given!r}, expected names of {', '.join(known)}, with commas between them")
    return [name for name in known if name in names]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value
