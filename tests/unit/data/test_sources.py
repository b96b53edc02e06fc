"""Sources: what is read, what is said about what cannot be read, and that an example knows where it stood."""

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from align.data.sources import Example, located, origin, read

ROWS: list[dict[str, Any]] = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "é"}]


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_json_lines_keep_rows_and_line_numbers(tmp_path):
    path = write(tmp_path / "x.jsonl", b"\n" + lines(ROWS))
    assert read(path) == ROWS
    assert [origin(row) for row in read(path)] == [f"{path}:2", f"{path}:3"]


def test_gzip_is_read_like_plain_text(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(lines(ROWS)))
    assert read(path) == ROWS
    assert origin(read(path)[1]) == f"{path}:2"


def test_rows_in_memory_and_several_paths_one_after_another(tmp_path):
    first, second = write(tmp_path / "1.jsonl", lines(ROWS)), write(tmp_path / "2.jsonl", lines(ROWS[:1]))
    assert read([second, first]) == [ROWS[0], *ROWS]
    memory = read(ROWS)
    assert memory == ROWS
    assert origin(memory[1]) == "example 1"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            b'{"a": 1}\n{"a": 1,}\n',
            r"x\.jsonl:2: not valid JSON: .* column \d+; the line reads '{\"a\": 1,}'",
        ),
        ("x.jsonl", b'{"a": 1}\n\n[1, 2]\n', r"x\.jsonl:3: expected a JSON object .* got list"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"x\.jsonl:2: not UTF-8 text: .* at byte 8"),
        ("x.jsonl.gz", b'{"a": 1}\n', r"x\.jsonl\.gz: after line 0: damaged or not a gzip file"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"a": 1}\n', mtime=0)[:-9],
            r"x\.jsonl\.gz: after line \d: damaged or not a gzip file",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, content))


def test_a_bad_line_in_gzip_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": \n'))
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz:2: not valid JSON"):
        read(path)


def test_a_missing_file_is_named_with_the_folder_it_was_looked_for_in(tmp_path):
    with pytest.raises(ValueError, match=rf"nope\.jsonl: no such file \(looked from {os.getcwd()}\)"):
        read("nope.jsonl")


def test_a_file_of_another_kind_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"x\.csv: a single file must be JSON lines .* name the folder"):
        read(write(tmp_path / "x.csv", b"prompt,response\na,b\n"))


def test_saved_datasets_with_and_without_splits(tmp_path):
    import datasets

    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    datasets.Dataset.from_list(ROWS).save_to_disk(one)
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(parts).save_to_disk(two)
    assert read(one) == read(two) == ROWS
    assert read(f"{two}:test") == ROWS[1:]
    assert origin(read(f"{two}:test")[0]) == f"{two}:test, row 0"
    with pytest.raises(ValueError, match=r"split 'valid' not found; the splits are \['test', 'train'\]"):
        read(f"{two}:valid")
    with pytest.raises(ValueError, match="has no splits, so 'train' cannot be chosen"):
        read(f"{one}:train")


def test_a_folder_of_data_files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", lines(ROWS))
    assert read(str(tmp_path / "files")) == ROWS
    with pytest.raises(ValueError, match="empty: cannot be read as a dataset folder or hub name"):
        read(str(tmp_path / "empty"))


def test_origin_survives_what_happens_to_rows():
    row = located({"a": 1}, "x.jsonl:7")
    assert origin(located(row, "elsewhere")) == "x.jsonl:7"
    copy = pickle.loads(pickle.dumps(row))
    assert (copy, origin(copy), type(copy)) == ({"a": 1}, "x.jsonl:7", Example)
    assert origin({"a": 1}) == "an example"


def test_rows_in_memory_must_be_dicts():
    with pytest.raises(ValueError, match=r"train example 3: expected a dict .* got list"):
        located(["a"], "train example 3")
