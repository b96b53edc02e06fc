"""`python -m tools.mutants`: makes each mistake of tests/mutants.txt in a copy of the package and runs its unit tests.

A mistake that no test notices has survived: the command prints it and ends with exit code 1. A mutant that does not
even run, or whose original is not found exactly once, is an error of the list, not a success of the tests. Each mutant
runs in a forked child, so torch is imported once for all of them. Needs a system with `fork`, such as Linux.
Takes about a minute for a hundred mutants.
"""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutants.txt"
IMPORTED_ONCE = ("beartype.claw", "jaxtyping", "torch.distributed.tensor", "torch.testing")
"""What the tests import beside torch, directly or through `assert_close`; children find it loaded."""

PASSED, FAILED = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED


@dataclass(frozen=True)
class Mutant:
    """One mistake: in `file` (relative to the repository) write `replacement` where `original` stands."""

    file: str
    original: str
    replacement: str

    @property
    def tests(self) -> str:
        """Folder of the unit tests that must notice, which mirrors the package: align/x/y.py -> tests/unit/x."""
        return str(Path("tests", "unit", *Path(self.file).parent.parts[1:]))

    def __str__(self) -> str:
        return f"{self.file}: {self.original} => {self.replacement}"


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """The mutants listed in a file of the format that tests/mutants.txt explains at its top.

    Raises:
        ValueError: a line is neither a file in brackets nor a replacement.
    """
    mutants, file = [], ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            file = line[1:-1]
            continue
        original, arrow, replacement = line.partition(" => ")
        if not (file and arrow):
            raise ValueError(f"{path.name}:{number}: expected '[file]' or 'original => replacement', got {line!r}")
        mutants.append(Mutant(file, original, replacement))
    return mutants


def mutated(mutant: Mutant, source: str) -> str:
    """The source with the mistake in it.

    Raises:
        ValueError: the original does not occur exactly once.
    """
    found = source.count(mutant.original)
    if found != 1:
        raise ValueError(f"{mutant.file}: expected {mutant.original!r} exactly once, found it {found} times")
    return source.replace(mutant.original, mutant.replacement)


@contextlib.contextmanager
def applied(mutant: Mutant, copy: Path) -> Iterator[None]:
    """The mistake stands in the copy of the repository inside the block and is gone after it."""
    path = copy / mutant.file
    source = path.read_text()
    path.write_text(mutated(mutant, source))
    try:
        yield
    finally:
        path.write_text(source)


def outcome(copy: Path, tests: str) -> int:
    """pytest's exit code for a folder of tests of the copy, run in a child process that shows nothing."""
    child = multiprocessing.get_context("fork").Process(target=_run, args=(copy, tests))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _run(copy: Path, tests: str) -> None:
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True  # two mutants of one length in one second would share a cached file
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os._exit(pytest.main(["-q", "-x", "-o", "addopts=", "--assert=plain", "-p", "no:cacheprovider", tests]))


def main() -> int:
    """Runs all mutants and prints a line for each that was not noticed. Returns the exit code."""
    torch.set_num_threads(1)
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    mutants, bad = read_mutants(), 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("align", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "golden", "e2e"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for tests in sorted({mutant.tests for mutant in mutants}):
            if (code := outcome(copy, tests)) != PASSED:
                print(f"{tests} does not pass without a mutant either: pytest ended with code {code}")
                return 1
        for mutant in track(mutants, "mutants"):
            with applied(mutant, copy):
                code = outcome(copy, mutant.tests)
            if code != FAILED:
                bad += 1
                print(f"survived: {mutant}" if code == PASSED else f"did not run (pytest code {code}): {mutant}")
    print(f"{len(mutants) - bad} of {len(mutants)} mutants were noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
