"""Whether what a run reads is there: data files, model folders. Names that can only be a hub's are left to the hub."""

import difflib
from pathlib import Path

from align import paths

DATA_SUFFIXES = (".jsonl", ".json", ".gz", ".zst", ".csv", ".tsv", ".txt", ".parquet", ".arrow")

MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""One of them is in every Hugging Face model or tokenizer folder."""


def complaint(name: str, marks: set[str], run_dir: object, *, must_exist: bool = True) -> str | None:
    """What is wrong with a path or hub name that a run reads, with the likely remedy; None where all is well.

    Args:
        name: As in the configuration; a data set may end with `:split`.
        marks: The strings that annotate the parameter (`paths.DATA`, `paths.MODEL`); others mean nothing here.
        run_dir: The folder the run writes; anything but a string counts as unknown.
        must_exist: False judges the name alone.
    """
    if not marks & {paths.DATA, paths.MODEL}:
        return None
    try:
        return _complaint(name, marks, run_dir, must_exist)
    except (OSError, RuntimeError) as error:  # too long a name; a home that nobody has; a circle of links
        return f"{name[:80]} cannot be looked up: {error}"


def can_be_written(text: str) -> bool:
    """Whether a text can be in a file or be a file's name."""
    return "\0" not in text and text.encode(errors="ignore").decode() == text


def _complaint(name: str, marks: set[str], run_dir: object, must_exist: bool) -> str | None:
    if not name.strip():
        return f"got {name!r}, expected a path or a hub name"
    path = Path(name).expanduser()
    if paths.DATA in marks and not path.exists() and ":" in path.name:
        path = path.with_name(path.name.rpartition(":")[0])
    if isinstance(run_dir, str) and path.resolve().is_relative_to(Path(run_dir).resolve()):
        return f"{name} lies in the folder that this run writes ({run_dir}); choose another run_dir"
    if not must_exist:
        return None
    if path.exists():
        if paths.DATA not in marks and not any((path / file).is_file() for file in MODEL_FILES):
            return f"{path} is no model folder: it has neither config.json nor the files of a tokenizer"
        return None
    if not looks_local(name, run_dir):
        return None
    return f"{path} does not exist (looked from {Path.cwd()}){_remedy(path, run_dir)}"


def looks_local(name: str, run_dir: object) -> bool:
    """True: the name means a file or folder here, not an `owner/name` on a hub."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.partition(":")[0].endswith(DATA_SUFFIXES):
        return True
    runs = Path(run_dir).parts[:-1] if isinstance(run_dir, str) else ()
    return bool(runs) and Path(name).parts[0] == runs[0]


def _remedy(path: Path, run_dir: object) -> str:
    """Another run's folder: run that first. A folder that is there: the nearest name in it."""
    runs = Path(run_dir).parent if isinstance(run_dir, str) else Path()
    if runs != Path() and path.is_relative_to(runs) and len(path.relative_to(runs).parts) > 1:
        stage = runs / path.relative_to(runs).parts[0]
        if not stage.exists() or (path.parent == stage and not path.suffix):
            return f"; run the stage that writes {stage} first"
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [item.name for item in path.parent.iterdir()], n=1)
        return f"; did you mean {path.with_name(near[0])}?" if near else ""
    return ""
