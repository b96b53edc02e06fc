"""Every kind of mistake in a configuration is found before anything is loaded, all at once, with a remedy."""

from pathlib import Path

import pytest
from config_targets import HERE, YAML, errors_of, only_error


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a data file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    return tmp_path


def test_a_correct_configuration_passes(folder: Path) -> None:
    assert errors_of() == []


def test_all_errors_are_reported_at_once(folder: Path) -> None:
    text = YAML.replace("lr: 1e-5", "lrr: 1e-5").replace("seed:", "sed:").replace("every: 2", "every: x")
    errors = errors_of("trainer.devices=0", text=text)
    places = [error.partition(":")[0] for error in errors]
    assert places == [
        "module.recipe.lrr", "module.recipe.lr", "callbacks.fussy.every", "sed", "seed", "trainer.devices"
    ]  # fmt: skip


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
        (f"{HERE}.Recipe.mke", "class config_targets.Recipe has no 'mke'"),
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
        ("trainer.precision=bf16-true", "trainer.precision: got bf16-true, which would convert data as well"),
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
        ("trainer.devices=0", "trainer.devices: got 0, expected at least 1"),
        ("trainer.num_nodes=-1", "trainer.num_nodes: got -1, expected at least 1"),
        ("trainer.strategy=deepspeed", "trainer.strategy: got 'deepspeed', expected auto, ddp, or a _target_ such as"),
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


@pytest.mark.parametrize(
    "override",
    [
        "trainer.devices=1",
        "trainer.devices=8",
        "trainer.devices=auto",
        "trainer.devices=-1",
        "trainer.devices=[0, 1]",
        "trainer.strategy=ddp",
        "trainer.strategy={_target_: align.strategy.DDP}",
        "trainer.precision=bf16-mixed",
        "trainer.precision=auto",
    ],
)
def test_trainer_arguments_that_are_fine(folder: Path, override: str) -> None:
    assert errors_of(override) == []
