"""metrics.csv: one row for each thing logged, which a run that was stopped and started again continues.

Lightning's CSVLogger deletes the file of an earlier start. This one keeps the rows up to the checkpoint that training
continues from and writes the rest anew, so the file of a run that was killed is that of one that never was.
"""

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from align.atomic import write_text

NAME = "metrics.csv"
STEP = "step"
FLUSH_EVERY = 100
"""Rows kept back at most."""


class MetricsFile(Logger):
    """Writes what is logged to metrics.csv in a folder: the columns in alphabetical order, then a row each time.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / NAME
        self._columns: list[str] = []
        self._waiting: list[dict[str, Any]] = []
        self.rows = 0
        """In the file, after `save`."""

    @property
    def name(self) -> str:
        """Lightning asks for it; the folder says all."""
        return ""

    @property
    def version(self) -> str:
        """See `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keeps a row, and writes rows when there are many."""
        self._waiting.append({STEP: 0 if step is None else step, **{key: float(x) for key, x in metrics.items()}})
        if len(self._waiting) >= FLUSH_EVERY:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows kept. A column not seen before makes the file anew, whole."""
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        self.rows += len(rows)
        columns = sorted({*self._columns, *(key for row in rows for key in row)})
        if columns != self._columns or not self.path.exists():
            old = _read(self.path) if self._columns else []
            self._columns = columns
            write_text(self.path, _text(columns, [*old, *rows], header=True))
            return
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(_text(columns, rows, header=False))
            file.flush()
            os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes what is left."""
        self.save()

    @rank_zero_only
    def continue_from(self, rows: int) -> None:
        """Keeps the first rows of the file and drops the others, which will be logged again.

        Raises:
            ValueError: The file has fewer.
        """
        self._waiting = []
        kept = _read(self.path) if self.path.exists() else []
        if len(kept) < rows:
            raise ValueError(
                f"{self.path} has {len(kept)} whole rows, but {rows} were written when the checkpoint was saved; "
                "it was changed or cut since"
            )
        kept, self.rows = kept[:rows], rows
        self._columns = sorted({key for row in kept for key, value in row.items() if value != ""})
        if kept:
            write_text(self.path, _text(self._columns, kept, header=True))
        else:
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; a last line that was cut off by a crash is none."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(whole, newline="")))


def _text(columns: list[str], rows: list[dict[str, Any]], *, header: bool) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, fieldnames=columns, restval="", extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
