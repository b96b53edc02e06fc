"""Reading, checking and building configurations: every kind of mistake is found, all at once, with a remedy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from omegaconf import OmegaConf
from pydantic import Field

from align import schema
from align.config import FIT_KEYS, ConfigError, build, check, read
from align.paths import DataPath, ModelPath

HERE = __name__


class Speaks(Protocol):
    """A protocol that cannot be checked at run time."""

    volume: float

    def __call__(self, text: str) -> str: ...


class Loud:
    """Follows the protocol."""

    def __init__(self, *, volume: float = 1.0) -> None:
        self.volume = volume

    def __call__(self, text: str) -> str:
        return text.upper()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A leaf with every kind of annotation."""

    lr: float
    steps: int = 1
    name: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.95)
    sizes: Sequence[int] = ()
    limit: Annotated[int, Field(gt=0)] = 1
    on: bool = False
    speaker: Speaks | None = None
    inner: "Recipe | None" = None

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """A size that must divide another."""
        if arguments["steps"] % arguments["limit"]:
            return [f"steps: got {arguments['steps']}, expected a multiple of limit={arguments['limit']}"]
        return []


class Data(LightningDataModule):
    """Reads a file, or several."""

    def __init__(self, *, train: DataPath | list[DataPath], valid: DataPath | None = None, batch_size: int = 1) -> None:
        super().__init__()
        self.train, self.valid, self.batch_size = train, valid, batch_size


class Module(LightningModule):
    """Takes a recipe and a model folder."""

    def __init__(self, *, recipe: Recipe, model: ModelPath = "gpt2", extra: dict[str, float] | None = None) -> None:
        super().__init__()
        self.recipe, self.model, self.extra = recipe, model, extra


class Fussy(Callback):
    """Does not like negative numbers."""

    def __init__(self, *, every: int = 1) -> None:
        if every < 0:
            raise ValueError(f"every must be at least 0, got {every}")


def make_recipe(lr: float) -> Recipe:
    """A function is a target too."""
    return Recipe(lr=lr)


def anything(**arguments: Any) -> dict[str, Any]:
    """Takes any name."""
    return arguments


def no_recipe() -> Loud:
    """Builds the wrong thing for a recipe."""
    return Loud()


NOT_CALLABLE = 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a data file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    return tmp_path


YAML = f"""
run_dir: runs/one
seed: 0
data: {{_target_: {HERE}.Data, train: data/train.jsonl}}
module:
  _target_: {HERE}.Module
  recipe: {{_target_: {HERE}.Recipe, lr: 1e-5}}
trainer: {{max_epochs: 1}}
callbacks:
  fussy: {{_target_: {HERE}.Fussy, every: 2}}
loggers: {{csv: true, wandb: false}}
"""


def write(text: str = YAML) -> str:
    """Writes the configuration into the working directory."""
    Path("c.yaml").write_text(text)
    return "c.yaml"


def errors_of(*overrides: str, text: str = YAML) -> list[str]:
    """What `read` or `check` complains of."""
    try:
        check(read(write(text), overrides))
    except ConfigError as error:
        return error.errors
    return []


def only_error(*overrides: str, text: str = YAML) -> str:
    """The single complaint."""
    (message,) = errors_of(*overrides, text=text)
    return message


def test_a_correct_configuration_passes(folder: Path) -> None:
    assert errors_of() == []


def test_all_errors_are_reported_at_once(folder: Path) -> None:
    text = YAML.replace("lr: 1e-5", "lrr: 1e-5").replace("seed:", "sed:").replace("every: 2", "every: x")
    errors = errors_of("trainer.devices=4", text=text)
    places = [error.partition(":")[0] for error in errors]
    assert places == [
        "module.recipe.lrr", "module.recipe.lr", "callbacks.fussy.every", "sed", "seed", "trainer.devices"
    ]  # fmt: skip


# Reading


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


# Checking


def test_an_unknown_key_at_the_top(folder: Path) -> None:
    assert only_error(text=YAML + "\nmodul: {}").startswith(
        "modul: unknown key; did you mean 'module'? (known: run_dir, "
    )


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("lightning.pytorch.callbacks.ModelCheckpoin", "has no 'ModelCheckpoin'; did you mean 'ModelCheckpoint'?"),
        ("lightning.pytorch.callbakcs.Timer", "module lightning.pytorch has no 'callbakcs'; did you mean 'callbacks'?"),
        ("nopackage.Thing", "no package or module 'nopackage'"),
        ("Recipe", "expected a dotted path"),
        ("3", "expected a dotted path"),
        (f"{HERE}.NOT_CALLABLE", "is a int, expected a class or a function"),
        (f"{HERE}.Recipe.mke", "class test_config.Recipe has no 'mke'"),
    ],
)
def test_a_target_that_cannot_be_found(folder: Path, target: str, expected: str) -> None:
    message = only_error(text=YAML.replace(f"{HERE}.Fussy, every: 2", target))
    assert message.startswith("callbacks.fussy._target_: ")
    assert expected in message


def test_a_target_in_a_module_that_cannot_be_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "half_installed.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(folder)
    message = only_error("callbacks.fussy={_target_: half_installed.Thing}")
    assert "importing half_installed failed: No module named 'no_such_dependency'" in message


def test_an_unknown_argument(folder: Path) -> None:
    message = only_error(text=YAML.replace("lr: 1e-5", "lr: 1e-5, step: 3"))
    assert message.startswith(
        f"module.recipe.step: unknown argument of {HERE}.Recipe; did you mean 'steps'? (known: lr, "
    )


def test_a_target_that_takes_any_argument(folder: Path) -> None:
    assert errors_of(f"module.extra={{_target_: {HERE}.anything, a: 1}}") == []


def test_a_missing_argument(folder: Path) -> None:
    assert only_error(text=YAML.replace(", lr: 1e-5", "")) == "module.recipe.lr: missing, expected float"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("module.recipe.lr=fast", "module.recipe.lr: expected float, got str 'fast'"),
        ("module.recipe.lr=true", "module.recipe.lr: expected float, got bool True"),
        ("module.recipe.lr=null", "module.recipe.lr: expected float, got null"),
        ("module.recipe.steps=true", "module.recipe.steps: expected int, got bool True"),
        ("module.recipe.steps=2.0", "module.recipe.steps: expected int, got float 2.0"),
        ("module.recipe.steps='2'", "module.recipe.steps: expected int, got str '2'"),
        ("module.recipe.on=1", "module.recipe.on: expected bool, got int 1"),
        ("module.recipe.name=cos", "module.recipe.name: expected 'constant' | 'cosine', got str 'cos'"),
        ("module.recipe.betas=[1,2,3]", "module.recipe.betas: "),
        ("module.recipe.sizes=[1,a]", "module.recipe.sizes[1]: expected int, got str 'a'"),
        ("module.recipe.limit=0", "module.recipe.limit: it should be greater than 0, got int 0"),
        ("module.extra={a: b}", "module.extra.a: expected float, got str 'b'"),
        ("module.extra=3", "module.extra: expected dict[str, float] | null, got int 3"),
        ("data.train=[1]", "data.train: expected data file, folder or hub name | list[data file"),
        (
            "module.recipe.speaker=loud",
            "module.recipe.speaker: expected Speaks | null, got str 'loud'; write a mapping",
        ),
        ("module.recipe={lr: 1}", "module.recipe: expected Recipe, got dict {'lr': 1}; write a mapping with `_target_"),
        (f"module.recipe={{_target_: {HERE}.Loud}}", "module.recipe: expected Recipe, got a Loud"),
        (f"module.recipe={{_target_: {HERE}.no_recipe}}", "module.recipe: expected Recipe, got a Loud"),
        (f"module.model={{_target_: {HERE}.Loud}}", "module.model: expected model folder or hub name, got a Loud"),
        ("callbacks.fussy={every: 1}", "callbacks.fussy: expected Callback | null, got dict"),
        (f"data={{_target_: {HERE}.Loud}}", "data: expected LightningDataModule, got a Loud"),
        ("seed=true", "seed: expected int, got bool True"),
        ("loggers.csv=1", "loggers.csv: expected bool, got int 1"),
        ("loggers.wandb={projct: a}", "loggers.wandb.projct: unknown argument of wandb.init; did you mean 'project'?"),
    ],
)
def test_wrong_types(folder: Path, override: str, expected: str) -> None:
    assert only_error(override).startswith(expected)


@pytest.mark.parametrize(
    "override",
    [
        "module.recipe.lr=1",
        "module.recipe.betas=[0, 1]",
        "module.recipe.sizes=[]",
        f"module.recipe.speaker={{_target_: {HERE}.Loud}}",
        f"module.recipe.inner={{_target_: {HERE}.Recipe, lr: 1}}",
        f"module.recipe={{_target_: {HERE}.make_recipe, lr: 1}}",
        "module.extra={a: 1}",
        "callbacks.fussy=null",
        "callbacks=null",
        "loggers.wandb={project: a, tags: [b]}",
    ],
)
def test_right_types(folder: Path, override: str) -> None:
    assert errors_of(override) == []


def test_sizes_that_do_not_divide(folder: Path) -> None:
    message = only_error("module.recipe.steps=7", "module.recipe.limit=2")
    assert message == "module.recipe.steps: got 7, expected a multiple of limit=2"
    assert errors_of("module.recipe.steps=8", "module.recipe.limit=2") == []


def test_sizes_are_not_checked_where_types_are_wrong(folder: Path) -> None:
    assert only_error("module.recipe.limit=x").startswith("module.recipe.limit: expected int")


# Files


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "data.train=data/trian.jsonl",
            "data.train: data/trian.jsonl does not exist (looked from {cwd}); did you mean data/train",
        ),
        ("data.train=[data/train.jsonl, x.gz]", "data.train: x.gz does not exist"),
        ("data.valid=./none", "data.valid: none does not exist"),
        ("data.valid=none.jsonl:train", "data.valid: none.jsonl does not exist"),
        (
            "module.model=runs/sft/hf",
            "module.model: runs/sft/hf does not exist (looked from {cwd}); run the stage that writes runs/sft first",
        ),
        ("module.model=runs/sft", "module.model: runs/sft does not exist"),
        ("module.model=a/b/c", "module.model: a/b/c does not exist"),
        ("module.model=data", "module.model: data is no model folder"),
        ("module.model=data/train.jsonl", "module.model: data/train.jsonl is no model folder"),
        ("module.model=runs/one/hf", "module.model: runs/one/hf lies in the folder that this run writes"),
    ],
)
def test_missing_files(folder: Path, override: str, expected: str) -> None:
    assert only_error(override).startswith(expected.format(cwd=folder))


def test_what_exists_or_looks_like_a_hub_name_passes(folder: Path) -> None:
    (folder / "runs" / "sft" / "hf").mkdir(parents=True)
    (folder / "runs" / "sft" / "hf" / "config.json").write_text("{}")
    (folder / "tok").mkdir()
    (folder / "tok" / "tokenizer.json").write_text("{}")
    for override in (
        "module.model=runs/sft/hf", "module.model=tok", "module.model=gpt2", "module.model=Qwen/Qwen3-0.6B",
        "data.train=data/train.jsonl:train", "data.train=data", "data.train=Anthropic/hh-rlhf:test",
        f"data.train={folder}/data/train.jsonl",
    ):  # fmt: skip
        assert errors_of(override) == []


# Trainer


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "trainer.gradient_clip_val=1.0",
            "trainer.gradient_clip_val: has no effect here; use module.optim.max_grad_norm",
        ),
        ("trainer.gradient_clip_algorithm=norm", "trainer.gradient_clip_algorithm: has no effect here"),
        (
            "trainer.accumulate_grad_batches=2",
            "trainer.accumulate_grad_batches: has no effect here; to save memory use module.micro_batch_tokens",
        ),
        ("trainer.callbacks=[]", "trainer.callbacks: is set by align.fit"),
        ("trainer.logger=false", "trainer.logger: is set by align.fit"),
        ("trainer.default_root_dir=x", "trainer.default_root_dir: is set by align.fit"),
        ("trainer.use_distributed_sampler=true", "trainer.use_distributed_sampler: is set by align.fit"),
        ("trainer.inference_mode=false", "trainer.inference_mode: is set by align.fit"),
        ("trainer.enable_checkpointing=false", "trainer.enable_checkpointing: is set by align.fit"),
        ("trainer.devices=2", "trainer.devices: this version trains in one process, expected 1, got int 2"),
        ("trainer.num_nodes=2", "trainer.num_nodes: this version trains in one process"),
        ("trainer.precision=17", "trainer.precision: expected 64 | 32"),
        ("trainer.max_epochs=1.5", "trainer.max_epochs: expected int | null, got float 1.5"),
        (
            "trainer={max_epochs: 1, acelerator: cpu}",
            "trainer.acelerator: unknown argument of the Trainer; did you mean 'accelerator'?",
        ),
        ("trainer={accelerator: cpu}", "trainer: does not say when to stop"),
    ],
)
def test_trainer_arguments(folder: Path, override: str, expected: str) -> None:
    assert only_error(override).startswith(expected)


@pytest.mark.parametrize("override", ["trainer.devices=1", "trainer.devices=auto", "trainer.precision=bf16-mixed"])
def test_trainer_arguments_that_are_fine(folder: Path, override: str) -> None:
    assert errors_of(override) == []


# Other commands


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
        "run_dir", "seed", "overwrite", "tokenizer", "data", "module", "trainer", "callbacks", "loggers"
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
        ConfigError, match=r"callbacks\.x: every must be at least 0, got -1 \(raised in .*test_config.py"
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
