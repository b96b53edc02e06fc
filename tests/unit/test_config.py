"""Configurations are read with overrides, and built from the inside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config_targets import HERE, YAML, Fussy, Loud, Module, Recipe, errors_of, only_error, write
from omegaconf import OmegaConf

from align import schema
from align.build import build
from align.config import FIT_KEYS, ConfigError, check, read
from align.paths import ModelPath


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a data file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    return tmp_path


def test_a_number_with_exponent_is_a_float(folder: Path) -> None:
    config = read(write(), ["--module.recipe.lr=1e-4"])
    assert config.module.recipe.lr == 1e-4
    assert read(write(), []).module.recipe.lr == 1e-5


@pytest.mark.parametrize("prefix", ["", "--"])
def test_both_forms_of_override(folder: Path, prefix: str) -> None:
    config = read(write(), [f"{prefix}seed=7", f"{prefix}callbacks.fussy.every=9", f"{prefix}callbacks.fussy.every=10"])
    assert config.seed == 7
    assert config.callbacks.fussy.every == 10


def test_values_of_overrides_are_yaml(folder: Path) -> None:
    config = read(
        write(), ["module.extra={a: 1, b: 2.5}", "data.valid=null", "run_dir=runs/${seed}", "data.train=[a,b]"]
    )
    assert config.module.extra == {"a": 1, "b": 2.5}
    assert config.data.valid is None
    assert config.run_dir == "runs/0"
    assert read(write(YAML), ["data.train=[a,b]"]).data.train == ["a", "b"]


def test_an_item_of_a_list_can_be_overridden(folder: Path) -> None:
    text = YAML.replace("train: data/train.jsonl", "train: [a/b/c, d/e/f]")
    assert read(write(text), ["data.train[1]=x"]).data.train == ["a/b/c", "x"]
    assert read(write(text), ["data.train.0=x"]).data.train == ["x", "d/e/f"]
    assert "list of 2" in only_error("data.train[2]=x", text=text)


def test_an_override_may_add_what_the_signature_knows(folder: Path) -> None:
    config = read(write(), ["data.batch_size=3", "trainer.max_steps=5", "overwrite=true", "loggers.wandb={project: p}"])
    assert (config.data.batch_size, config.trainer.max_steps, config.overwrite) == (3, 5, True)


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("sed=1", "seed"),
        ("--module.recipe.step=1", "steps"),
        ("trainer.max_epoch=1", "max_epochs"),
        ("callbacks.fusy.every=1", "fussy"),
        ("loggers.wand=false", "wandb"),
    ],
)
def test_an_override_of_an_unknown_key_is_an_error(folder: Path, override: str, suggested: str) -> None:
    assert f"did you mean '{suggested}'?" in only_error(override)


def test_all_bad_overrides_are_reported(folder: Path) -> None:
    assert len(errors_of("sed=1", "nonsense", "seed.x=2", "seed=[1")) == 4


def test_an_override_through_a_reference_names_the_original(folder: Path) -> None:
    text = YAML.replace("recipe: {", "recipe: ${shared}\nshared: {")
    with pytest.raises(ConfigError, match=r"module\.recipe is \$\{shared\}"):
        read(write(text), ["module.recipe.lr=1"])


def test_struct_mode(folder: Path) -> None:
    with pytest.raises(AttributeError, match="struct"):
        read(write()).module.recipes = 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "seed: 0\nrun_dir: [1,\nx: 2",
            "c.yaml, line 4, column 1: not valid YAML: did not find expected ',' or ']' while parsing a flow",
        ),
        ("seed: 0\nseed: 1", "c.yaml, line 2, column 1: not valid YAML: found duplicate key seed"),
        ("- 1", "expected a mapping"),
        ("3", "expected a mapping"),
        ("seed: ${x", "c.yaml: "),
        ("seed: \x01", "c.yaml: unacceptable character"),
    ],
)
def test_a_file_that_is_no_configuration(folder: Path, text: str, expected: str) -> None:
    assert expected in only_error(text=text)


def test_a_missing_file(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        read("nowhere.yaml", [])
    with pytest.raises(ConfigError, match="the first argument is the YAML"):
        read("seed=1", [])


def test_missing_values_are_all_reported(folder: Path) -> None:
    errors = errors_of(text=YAML.replace("seed: 0", "seed: ???").replace("every: 2", 'every: "???"'))
    assert [error.partition(":")[0] for error in errors] == ["seed", "callbacks.fussy.every"]
    assert errors_of("seed=1", "callbacks.fussy.every=1", text=YAML.replace("seed: 0", "seed: ???")) == []


def test_references(folder: Path) -> None:
    text = YAML.replace("recipe: {", "recipe: ${tokenizer}\ntokenizer: {")
    assert errors_of(text=text) == []
    assert build(read(write(text)).module).recipe.lr == 1e-5


def test_an_error_in_a_shared_node_is_reported_once(folder: Path) -> None:
    text = YAML.replace("recipe: {", "recipe: ${tokenizer}\ntokenizer: {").replace("lr: 1e-5", "lr: fast")
    assert only_error(text=text) == "tokenizer.lr: expected float, got str 'fast'"


@pytest.mark.parametrize(
    "value", ["${nowhere}", "${oc.env:ALIGN_NO_SUCH_VARIABLE}", "${no_resolver:1}", "${callbacks}"]
)
def test_a_broken_reference(folder: Path, value: str) -> None:
    assert only_error(text=YAML.replace("every: 2", f"every: '{value}'")).startswith("callbacks.fussy.every: ")


def test_a_command_with_its_own_keys(folder: Path) -> None:
    path = write("run_dir: runs/samples\nseed: 0\nmodel: runs/sft/hf\ncount: x\n")
    keys = {"run_dir": str, "seed": int, "model": ModelPath, "count": int}
    config = read(path, [], known_keys=keys)
    with pytest.raises(ConfigError) as caught:
        check(config, known_keys=keys, required_keys=("run_dir", "seed", "model"))
    assert [error.partition(":")[0] for error in caught.value.errors] == ["model", "count"]
    with pytest.raises(ConfigError, match="unknown key"):
        check(config, known_keys={"run_dir", "seed"}, required_keys=())


def test_the_known_keys_are_those_of_the_documentation() -> None:
    assert set(FIT_KEYS) == {
        "run_dir", "seed", "overwrite", "resume", "tokenizer", "data", "module", "trainer", "callbacks", "loggers"
    }  # fmt: skip


# Building


def built(node: Any) -> Any:
    """The object a mapping describes."""
    return build(OmegaConf.create(node))


def test_nodes_are_built_from_the_inside() -> None:
    recipe = {"_target_": f"{HERE}.Recipe", "lr": 1, "inner": {"_target_": f"{HERE}.make_recipe", "lr": 2}}
    module = built({"_target_": f"{HERE}.Module", "recipe": recipe, "extra": {"a": 1}})
    assert isinstance(module, Module)
    assert module.recipe.inner == Recipe(lr=2.0)


def test_plain_arguments_take_the_form_of_their_annotation() -> None:
    recipe = built({"_target_": f"{HERE}.Recipe", "lr": 1, "betas": [0, 1], "sizes": [1, 2]})
    assert isinstance(recipe.lr, float)
    assert recipe.betas == (0.0, 1.0)
    assert recipe.sizes == [1, 2]


def test_plain_containers_come_back_plain() -> None:
    value = built({"a": [1, {"b": None}], "c": {"_target_": f"{HERE}.anything", "d": [1]}})
    assert value == {"a": [1, {"b": None}], "c": {"d": [1]}}
    assert type(value["a"]) is list and type(value["c"]["d"]) is list


def test_a_constructors_complaint_names_the_place() -> None:
    with pytest.raises(
        ConfigError, match=r"callbacks\.x: every must be at least 0, got -1 \(raised in .*config_targets.py"
    ):
        build(OmegaConf.create({"x": {"_target_": f"{HERE}.Fussy", "every": -1}}), "callbacks")


def test_a_bug_in_a_constructor_keeps_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Fussy, *, every: int = 1) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Fussy, "__init__", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        built({"_target_": f"{HERE}.Fussy"})


def test_callables_are_checked_as_such(folder: Path) -> None:
    def takes(function: Callable[[str], str]) -> None: ...

    wanted = schema.parameters(takes)[0]["function"].annotation
    with pytest.raises(schema.Mismatch, match="expected Callable"):
        schema.conform(wanted, "loud")
    assert schema.conform(wanted, schema.Node(Loud, {}, True)).produces is Loud
