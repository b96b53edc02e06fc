"""Reading examples: from JSON lines, from Hugging Face datasets, from memory. Knows files and rows, not what rows mean.

Every example remembers where it came from (`origin`), so a complaint about it, made much later, can name file and line.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from align.paths import DataPath

Source = DataPath | list[DataPath] | list[dict[str, Any]]
"""Where examples come from: one path, several paths read one after another, or the examples themselves."""

JSON_LINES = (".jsonl", ".jsonl.gz")


class Example(dict[str, Any]):
    """One row of data, with its `origin`: where a user finds it, such as `data/train.jsonl.gz:17`."""

    def __init__(self, row: Mapping[str, Any], origin: str) -> None:
        super().__init__(row)
        self.origin = origin

    def __reduce__(self) -> tuple[Any, ...]:
        return Example, (dict(self), self.origin)


def read(source: Source) -> list[dict[str, Any]]:
    """All examples of a source, each knowing its origin.

    Args:
        source: A `.jsonl` or `.jsonl.gz` file; a folder written by `Dataset.save_to_disk`; a folder of data files or
            the name of a dataset on the Hugging Face hub, either followed by `:split` (default `train` where there are
            several); a list of these; or a list of dicts.

    Raises:
        ValueError: the source does not exist, is empty of meaning, or a line is not a JSON object; the message names
            file and line.
    """
    if isinstance(source, str):
        return list(_read_path(source))
    examples: list[dict[str, Any]] = []
    for number, item in enumerate(source):
        if isinstance(item, str):
            examples += _read_path(item)
        else:
            examples.append(located(item, f"example {number}"))
    return examples


def located(row: Any, place: str) -> Example:
    """The row with its origin; a row that has one already keeps it."""
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: expected a dict (one example), got {type(row).__name__}: {str(row)[:80]!r}")
    return Example(row, place)


def origin(row: Mapping[str, Any]) -> str:
    """Where an example came from, for error messages."""
    return row.origin if isinstance(row, Example) else "an example"


def _read_path(path: str) -> Iterator[Example]:
    path = os.path.expanduser(path)
    if path.endswith(JSON_LINES):
        return _read_json_lines(path)
    return _read_dataset(path)


def _read_json_lines(path: str) -> Iterator[Example]:
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file (looked from {os.getcwd()})")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: cannot be read, since its permissions forbid it")
    number = 0
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Example(_parse(line, f"{path}:{number}"), f"{path}:{number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: after line {number}: damaged or not a gzip file ({error})") from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}; the line reads {error.doc[:80]!r}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits; brackets without end
        raise ValueError(f"{where}: not readable JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected a JSON object such as {{"prompt": ...}}, got {type(row).__name__}')
    if rb"\u" in line and not _has_whole_characters(row):
        raise ValueError(
            f"{where}: holds half a character (a lone surrogate such as \\ud800); remove it or write it whole"
        )
    return row


def _has_whole_characters(row: dict[str, Any]) -> bool:
    """JSON's escapes can write half of a character, which no tokenizer and no file takes."""
    text = json.dumps(row, ensure_ascii=False)
    return text.encode(errors="ignore").decode() == text


def _read_dataset(path: str) -> Iterator[Example]:
    # Takes a second to import, and most runs read JSON lines.
    from datasets import exceptions, load_dataset, load_from_disk

    name, split = _split_name(path)
    if os.path.isfile(name):
        raise ValueError(
            f"{path}: a single file must be JSON lines ({' or '.join(JSON_LINES)}); put files of other kinds (CSV, "
            "Parquet) into a folder and name the folder"
        )
    if os.path.isdir(name) and any(os.path.isfile(os.path.join(name, file)) for file in _SAVED_DATASET):
        data: Any = load_from_disk(name)
    else:
        try:
            data = load_dataset(name)
        except (OSError, ValueError, exceptions.DatasetsError) as error:  # not there, no network, bad file
            raise ValueError(f"{path}: cannot be read as a dataset folder or hub name: {error}") from error
    if isinstance(data, Mapping):
        wanted = split or ("train" if "train" in data else None)
        if wanted not in data:
            raise ValueError(f"{path}: split {wanted!r} not found; the splits are {sorted(data)}. Write {name}:SPLIT")
        data = data[wanted]
    elif split is not None:
        raise ValueError(f"{path}: {name} has no splits, so {split!r} cannot be chosen; leave ':{split}' out")
    return _rows_of(data, path)


_SAVED_DATASET = ("dataset_dict.json", "dataset_info.json", "state.json")


def _split_name(path: str) -> tuple[str, str | None]:
    """`name:split` -> its parts; a colon inside a folder's own name is not a separator."""
    name, colon, split = path.rpartition(":")
    if not colon or os.path.exists(path) or "/" in split or "\\" in split:
        return path, None
    return name, split


def _rows_of(data: Iterable[Mapping[str, Any]], path: str) -> Iterator[Example]:
    for number, row in enumerate(data):
        yield Example(row, f"{path}, row {number}")
