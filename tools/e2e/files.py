"""Reading and writing the task's JSONL files, gzipped where the name ends in `.gz`. Knows nothing of their fields."""

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "data" / "e2e"
"""The embedded data, next to the code."""


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, one dict a line; empty lines are skipped.

    Raises:
        ValueError: a line is not a JSON object; names the file and the line.
    """
    path = Path(path)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object, got broken JSON ({error})."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
            yield row


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes the rows as JSONL and says how many there were.

    The file appears complete or not at all, and equal rows give equal bytes (gzip's time stamp is 0).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    data = "".join(lines).encode()
    if path.suffix == ".gz":
        buffer = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=6) as packed:
            packed.write(data)
        data = buffer.getvalue()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
    return len(lines)
