"""A folder is there whole, old or new, whatever moment a process dies at."""

from pathlib import Path

import pytest

from align import atomic


def write(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "file").write_text(text)


def test_a_folder_moved_aside_for_one_that_never_came_is_put_back(tmp_path: Path) -> None:
    write(tmp_path / ".hf.old", "earlier")  # killed between the two renames
    write(tmp_path / ".hf.x1y2", "unfinished")
    atomic.sweep(tmp_path, "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "file").read_text() == "earlier"


def test_what_was_replaced_is_swept(tmp_path: Path) -> None:
    write(tmp_path / "hf", "new")
    write(tmp_path / ".hf.old", "earlier")  # killed before the last deletion
    atomic.sweep(tmp_path, "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "file").read_text() == "new"


def test_a_folder_not_finished_replaces_nothing(tmp_path: Path) -> None:
    write(tmp_path / "hf", "earlier")
    with pytest.raises(RuntimeError, match="stop"), atomic.folder_written_whole(tmp_path / "hf") as fresh:
        (fresh / "file").write_text("half")
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "file").read_text() == "earlier"
