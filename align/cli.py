"""What the commands of the package share: the command line, the run folder, and errors that a user can act on.

A user's mistake ends a command with a readable message and exit code 2; everything else keeps its traceback.
"""

import argparse
import gc
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from align import atomic, distributed
from align.allocator import keep_freed_memory
from align.atomic import write_text
from align.config import ConfigError
from align.errors import RunError

MARK = "# Written by align"
"""How a `config.yaml` begins that makes its folder a run folder, which `overwrite` may delete."""

MISTAKE = 2
"""The exit code of a user's mistake; argparse uses the same."""


def run(
    body: Callable[[str, list[str]], int | None],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    epilog: str,
) -> int:
    """Runs a command `PROG CONFIG [key=value ...]` and returns its exit code.

    Args:
        body: Does the work, given the path of the YAML and the overrides; may return an exit code.
        argv: Without the program's name; None takes the process's own.
        prog: As a user types it, such as `python -m align.fit`.
        description: What the command does, for `--help`.
        epilog: Overrides explained and examples, for `--help`.

    Returns:
        What the body returned, 0 for nothing; 2 after a user's mistake, 1 after a failure of the machine, both printed
        to stderr.
    """
    config, overrides = parse(argv, prog=prog, description=description, epilog=epilog)
    return guarded(lambda: body(config, overrides), f"{prog} {config}")


def guarded(body: Callable[[], int | None], what: str) -> int:
    """Calls a command's body; a user's mistake or a failure of the machine is printed and becomes an exit code.

    Args:
        body: See `run`.
        what: The command, for the message.
    """
    keep_freed_memory()
    if not gc.isenabled():  # `align/__init__.py` has seen to that
        gc.freeze()  # what has been imported stays
        gc.enable()
    try:
        return body() or 0
    except RunError as error:
        _print_mistake(what, error)
        return 1
    except (ValueError, FileNotFoundError, MisconfigurationException) as error:
        if not is_users_mistake(error):
            raise
        _print_mistake(what, error)
        return MISTAKE


def parse(argv: Sequence[str] | None, *, prog: str, description: str, epilog: str) -> tuple[str, list[str]]:
    """The path of the YAML and the overrides, in the order given, whichever of the two forms they have."""
    known, overrides = parser(prog=prog, description=description, epilog=epilog).parse_known_args(argv)
    return known.config, overrides


def parser(*, prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Knows the YAML, and leaves all else to be overrides."""
    found = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} CONFIG [key=value ...]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("config", metavar="CONFIG", help="the YAML file of the run")
    return found


def is_users_mistake(error: BaseException) -> bool:
    """True: the message is meant for the user. The package and Lightning raise ValueError for nothing else."""
    if isinstance(error, ConfigError | MisconfigurationException):
        return True
    return _module_that_raised(error.__traceback__).partition(".")[0] in ("align", "lightning")


class RunFolder:
    """The folder `run_dir` of a checked configuration, with the resolved configuration in it, for a `with` block.

    Unless the run has begun, an error that ends the block leaves everything as it was: a folder that was made is gone,
    and an earlier run that `overwrite` was to delete is back. So nothing is lost to a mistake that only building the
    objects or reading the data can show.

    A folder that holds nothing but an earlier `config.yaml` is used again: that run never began.

    Args:
        config: With `run_dir` and perhaps `overwrite`.
        continues: The folder holds a run that is continued: all of it is kept.

    Attributes:
        path: As the configuration gives it.

    Raises:
        ConfigError: The folder is in use and `overwrite` is not set, or is not a run's folder, so is not deleted.
    """

    def __init__(self, config: DictConfig, *, continues: bool = False) -> None:
        self.path = Path(config.run_dir)
        self._text = OmegaConf.to_yaml(config, resolve=True)
        try:
            self._replaces = not continues and _must_be_replaced(self.path, bool(config.get("overwrite", False)))
            self._config = (self.path / "config.yaml").read_text(encoding="utf-8") if continues else None
        except OSError as error:
            raise ConfigError([f"run_dir: {str(self.path)[:80]} cannot be looked up: {error.strerror}"]) from error
        self._earlier: Path | None = None
        self._made: list[Path] = []
        self._begun = False

    def __enter__(self) -> "RunFolder":
        real = self.path.resolve()
        try:
            if self._replaces:
                self._earlier = Path(tempfile.mkdtemp(prefix=_aside(real), dir=real.parent))
                real.rename(self._earlier)  # onto an empty folder, which makes it one step
            self._made = [folder for folder in (real, *real.parents) if not folder.exists()]
            real.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._undo()
            raise ConfigError([f"run_dir: {self.path} cannot be made: {error.strerror}"]) from error
        note = f"{MARK}: the configuration of this run, references resolved.\n"
        write_text(real / "config.yaml", note + self._text)
        return self

    def begun(self) -> None:
        """The run does its work now: from here on what it writes is kept, and an earlier run is deleted."""
        self._begun = True
        if self._earlier is not None:
            atomic.remove(self._earlier)
            self._earlier = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.begun()
        elif not self._begun:
            self._undo()

    def _undo(self) -> None:
        real = self.path.resolve()
        if self._config is not None:
            write_text(real / "config.yaml", self._config)
            return
        if self._earlier is not None:
            shutil.rmtree(real, ignore_errors=True)
            self._earlier.rename(real)
            return
        for item in list(real.iterdir()) if real.is_dir() else []:
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def put_back_earlier(folder: Path) -> None:
    """Undoes what a `RunFolder` did whose process was killed before the run began."""
    real = folder.resolve()
    if real.is_dir() and all(re.fullmatch(r"\.config\.yaml\.\w{8}", item.name) for item in real.iterdir()):
        atomic.sweep(real, "config.yaml")  # killed while it wrote that
    if not real.parent.is_dir():
        return
    for earlier in real.parent.glob(f"{_aside(real)}*"):
        if is_run(earlier):  # it takes this name and this content in one step
            shutil.rmtree(real, ignore_errors=True)  # a configuration, and nothing that took time
            earlier.rename(real)
        else:
            earlier.rmdir()
    atomic.sweep(real.parent, f"{_aside(real)}*")


def _aside(folder: Path) -> str:
    """How the names begin under which earlier runs in this folder are kept until the new one has begun."""
    return f".{folder.name}.earlier."


def is_run(folder: Path) -> bool:
    """Whether align wrote the configuration in a folder."""
    file = folder / "config.yaml"
    if not file.is_file():
        return False
    with open(file, encoding="utf-8", errors="replace") as lines:
        return lines.readline().startswith(MARK)


def _print_mistake(what: str, error: Exception) -> None:
    if not distributed.is_first():  # which has most likely found the same, and is about to take this process with it
        time.sleep(10.0)
    messages = error.errors if isinstance(error, ConfigError) else [str(error)]
    count = "1 error" if len(messages) == 1 else f"{len(messages)} errors"
    lines = [f"{what}: {count}", *("  - " + text.replace("\n", "\n    ") for text in messages)]
    print("\n".join(lines), file=sys.stderr)


def _module_that_raised(traceback: TracebackType | None) -> str:
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        if name == "__main__":  # `python -m align.fit`
            name = getattr(traceback.tb_frame.f_globals.get("__spec__"), "name", name)
        traceback = traceback.tb_next
    return name


def _how_to_proceed(folder: Path) -> str:
    if is_run(folder):
        return "overwrite=true deletes that run and starts anew, run_dir=... writes elsewhere"
    return "no run of align made it, so choose another with run_dir=..."


def _must_be_replaced(folder: Path, overwrite: bool) -> bool:
    """Whether an earlier run is in the folder, which may be deleted: all that is in it must be that run's own."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError([f"run_dir: {folder} is a file, expected a folder or a name that is free"])
    never_began = {"config.yaml"} if is_run(folder) else set()
    if not folder.is_dir() or {item.name for item in folder.iterdir()} <= never_began:
        return False
    if not overwrite:
        raise ConfigError([f"run_dir: {folder} exists and is not empty; {_how_to_proceed(folder)}"])
    real = folder.resolve()
    files = real.rglob("config.yaml") if is_run(folder) else ()
    inner = [file.parent for file in files if file.parent != real and is_run(file.parent)]
    if not is_run(folder):
        reason = "it holds no config.yaml written by align"
    elif inner:
        reason = f"it holds another run, {os.path.relpath(inner[0], real)}"
    elif Path.cwd().is_relative_to(real):
        reason = "it is, or holds, the working directory"
    else:
        return True
    raise ConfigError([f"run_dir: {folder} is not deleted, though overwrite=true: {reason}; choose another run_dir"])
