"""Whatever is in a data file: examples are used or counted as dropped, or exit code 2 with the file and the line."""

from unittest import mock

import pytest
import rows
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from rows import FORMATS, WRAPPINGS, File
from test_bad_configurations import REPEATABLE
from world import Outcome, Reader, World, reading

from align import fit

DAMAGED = 450


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One for all examples; it needs no models."""
    return World(tmp_path_factory.mktemp("bad"), empty=True)


def outcome(world: World, file: File, trainer: type = Reader) -> Outcome:
    """What `align.fit` makes of a data file."""
    kind, _ = FORMATS[file.format]
    (world.folder / "c.yaml").write_text(yaml.dump(reading(kind, file.name)))
    (world.folder / file.name).write_bytes(file.content())
    with mock.patch.object(fit, "Trainer", trainer):
        found = world.run(fit.main, ["c.yaml"])
    (world.folder / file.name).unlink()
    if found.code == 0 or found.changed:
        world.restore()
    return found


def assert_handled(file: File, found: Outcome) -> None:
    """It was read, or was refused with the file named and nothing written."""
    if found.code == 0:
        return
    assert found.code == 2
    assert "Traceback" not in found.said
    assert not found.changed
    assert f"{file.name}:" in found.said or f"({file.name})" in found.said, found.said


@pytest.mark.parametrize("name", FORMATS)
def test_sound_rows_are_read(world: World, name: str) -> None:
    assert outcome(world, File(name, (FORMATS[name][1],) * 2), Trainer).code == 0


@settings(REPEATABLE, max_examples=DAMAGED)
@given(file=st.sampled_from(list(FORMATS)).flatmap(rows.files))
def test_damaged_rows(world: World, file: File) -> None:
    assert_handled(file, outcome(world, file))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_damaged_files(world: World, wrapping: str) -> None:
    file = File("response", (FORMATS["response"][1],) * 2, wrapping)
    assert_handled(file, outcome(world, file))


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("response", {"prompt": "w5\ud800", "response": "w6"}, "bad.jsonl:2: holds half a character"),
        ("scores", {"prompt": "w5", "responses": ["a", "b"], "scores": [10**400, 1]}, "bad.jsonl:2: scores must be"),
        ("scores", {"prompt": "w5", "responses": ["a", "b"], "scores": [1e300, 1]}, "bad.jsonl:2: scores must be"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "bad.jsonl:2: expected a list of messages"),
        ("messages", {"messages": [{"role": "robot", "content": "w5"}, rows.MESSAGES[1]]}, "bad.jsonl:2: the token"),
        ("prompt", "raw:" + "[" * 5000, "bad.jsonl:2: not readable JSON"),
        ("prompt", "raw:" + "9" * 5000, "bad.jsonl:2: not readable JSON"),
    ],
)  # fmt: skip
def test_rows_that_once_got_through(world: World, name: str, row: object, said: str) -> None:
    found = outcome(world, File(name, (FORMATS[name][1], row)))
    assert found.code == 2 and said in found.said
