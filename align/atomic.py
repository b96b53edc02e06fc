"""Files and folders that are whole or not there: written under another name, forced to the disk, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def folder_written_whole(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well; otherwise nothing changes.

    A process that is killed in the block leaves a folder behind whose name begins with a dot: see `sweep`.
    """
    folder = Path(folder)
    fresh = unfinished(folder)
    try:
        yield fresh
        fresh.chmod(0o755)
        for file in fresh.rglob("*"):
            if file.is_file():
                _force(file)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        _force(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def unfinished(folder: Path) -> Path:
    """A new folder beside the given one, of the kind that `sweep` removes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that it is never seen half written."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        _force(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Deletes a folder that nobody shall see half deleted: it goes under another name first."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(doomed / folder.name)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path, *names: str) -> None:
    """Deletes what a killed process left unfinished: the temporary files and folders of these names (globs).

    A folder that was moved aside for a newer one that never came is put back.
    """
    for name in names:
        for old in folder.glob(f".{name}.old"):
            whole = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
            if not whole.exists():
                old.rename(whole)
        for path in folder.glob(f".{name}.*"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _force(path: Path) -> None:
    """Forces contents to the disk, so that a rename never exposes an empty file, nor is lost itself, after a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
