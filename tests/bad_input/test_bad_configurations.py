"""Whatever is wrong with a configuration or an override: exit code 2, a readable message, nothing written or lost."""

from collections.abc import Callable
from pathlib import Path

import cases
import pytest
from cases import Case
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from world import COMMANDS, Outcome, World, shrunk

SOUND = {name: shrunk(name) for name in COMMANDS}
EDITED, MANGLED, OVERRIDDEN = 260, 100, 190
"""Examples of each kind; `test_bad_data` has the others."""

REPEATABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=(HealthCheck.too_slow,),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One for all examples, since models take long to write."""
    return World(tmp_path_factory.mktemp("bad"))


def among(strategy: Callable[[str], st.SearchStrategy[Case]]) -> st.SearchStrategy[Case]:
    """Cases of all configurations."""
    return st.sampled_from(list(COMMANDS)).flatmap(strategy)


def outcome(world: World, case: Case) -> Outcome:
    """What a command makes of a configuration that may be wrong."""
    file = world.folder / "c.yaml"
    file.write_bytes(case.text(SOUND[case.name]))
    return world.run(COMMANDS[case.name], ["c.yaml", *case.overrides])


def assert_handled(world: World, found: Outcome) -> None:
    """It began, or was refused in words with nothing written, changed or deleted."""
    if found.code == 0 or found.changed:
        world.restore()
    if found.code == 0:
        return
    assert found.code == 2
    errors = found.said.partition("  - ")[2] or found.said.partition("error: ")[2]  # argparse has a form of its own
    assert errors.strip(), found.said
    assert "Traceback" not in found.said
    assert not found.changed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_sound_configuration_begins(world: World, name: str) -> None:
    """Otherwise the tests below would prove nothing."""
    found = outcome(world, Case(name))
    world.restore()
    assert found.code == 0, found.said


@settings(REPEATABLE, max_examples=EDITED)
@given(case=among(lambda name: cases.edits(name, SOUND[name])))
def test_edited_configurations(world: World, case: Case) -> None:
    assert_handled(world, outcome(world, case))


@settings(REPEATABLE, max_examples=MANGLED)
@given(case=among(cases.mangled))
def test_mangled_text(world: World, case: Case) -> None:
    assert_handled(world, outcome(world, case))


@settings(REPEATABLE, max_examples=OVERRIDDEN)
@given(case=among(lambda name: cases.overridden(name, SOUND[name])))
def test_mangled_overrides(world: World, case: Case) -> None:
    assert_handled(world, outcome(world, case))


SFT_PLACES = {
    "module.seed": 2**63, "data.batch_size": 2**63, "module.optim.lr": float("nan"), "module.optim.betas": [0.9, 1],
    "seed": -1, "trainer.check_val_every_n_epoch": 0, "trainer.max_epochs": -1, "run_dir": "x" * 5000,
    "data.train": "", "module.optim.epsilon": float("inf"), "data.valid": "a\0b", "trainer.accelerator": "tpu",
    "trainer": {1: 2}, "data.tokenizer": {"_target_": "collections.Counter", 3: 1},
}  # fmt: skip


@pytest.mark.parametrize("place", SFT_PLACES)
def test_values_that_once_got_through(world: World, place: str) -> None:
    edit = (tuple(place.split(".")), SFT_PLACES[place])
    found = outcome(world, Case("sft", edits=(edit,)))
    assert_handled(world, found)
    assert found.code == 2 and f"- {place.partition('.')[0]}" in found.said


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("raising.Thing", "importing raising failed: RuntimeError: this module is broken"),
        ("leaving.Thing", "importing leaving failed: SystemExit: 3"),
        ("ungrammatical.Thing", "importing ungrammatical failed: SyntaxError: invalid syntax"),
        ("typing.Any", "only describes what classes of its kind have in common"),
        ("builtins.dict", "callbacks.samples: expected Callback | null, got dict"),
    ],
)
def test_targets_that_once_got_through(world: World, target: str, said: str) -> None:
    found = outcome(world, Case("sft", edits=((("callbacks", "samples", "_target_"), target),)))
    assert_handled(world, found)
    assert found.code == 2 and said in found.said


@pytest.mark.parametrize(
    "text", ["a.b=\0", "seed=\udcff", "seed=" + "9" * 5000, "seed=" + "[" * 3000, "data.train=\x9b"]
)
def test_overrides_that_once_got_through(world: World, text: str) -> None:
    found = outcome(world, Case("sft", overrides=(text,)))
    assert_handled(world, found)
    assert found.code == 2


@pytest.mark.parametrize(
    "path", ["absent.yaml", "runs", "", "a\0b", "x" * 5000, "c.yaml/below", "empty.yaml", "empty.jsonl"]
)
@pytest.mark.parametrize("name", ["sft", "sample", "evaluate"])
def test_a_configuration_that_is_no_file(world: World, name: str, path: str) -> None:
    Path(world.folder, "c.yaml").write_text("")
    found = world.run(COMMANDS[name], [path])
    assert_handled(world, found)
    assert found.code == 2


def test_samples_are_kept_where_the_new_ones_have_no_place(world: World) -> None:
    found = outcome(world, Case("sample", overrides=("out=empty.jsonl/new.jsonl",)))
    assert_handled(world, found)
    assert "out: empty.jsonl/new.jsonl cannot be written, since empty.jsonl is a file" in found.said


@pytest.mark.parametrize("name", ["sft", "evaluate"])
def test_an_earlier_run_outlives_a_mistake_that_only_reading_the_data_shows(world: World, name: str) -> None:
    key = {"sft": "data.train", "evaluate": "human_text"}[name]
    found = outcome(world, Case(name, overrides=(f"{key}=empty.jsonl",)))
    assert_handled(world, found)
    assert found.code == 2 and "no usable example" in found.said
