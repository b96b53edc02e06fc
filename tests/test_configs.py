"""Every YAML under configs/ and every command in the documents is one that the commands accept.

Checked in an empty folder in which the inputs that earlier stages write are put under their names, so the result does
not depend on what has been run in the checkout.
"""

import inspect
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from align import config as configuration
from align import evaluate, fit, plan, sample, schema
from align.config import ConfigError
from align.evaluate import Evaluation
from align.sample import Sampling, read_checked

ROOT = Path(__file__).resolve().parent.parent
EVERY_YAML = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
SWEEPS = [path for path in EVERY_YAML if path.startswith("configs/sweeps/")]
CONFIGS = [path for path in EVERY_YAML if path not in SWEEPS]
COUNT = {"runs": 15, "sweeps": 1}

Keys = Mapping[str, Any]
OWN_KEYS: Mapping[str, Keys] = {
    "align.fit": configuration.FIT_KEYS,
    "align.sample": schema.parameters(Sampling)[0],
    "align.evaluate": schema.parameters(Evaluation)[0],
}
"""Command -> its top-level keys."""

NO_STAGE_WRITES = ("runs/data/", "runs/samples/", "my/")
"""Tools and users do."""
COMMAND = re.compile(r"python -m align\.\w+ configs/(?:[^\n`]*\\\n)*[^\n`]*")


def header(path: str) -> str:
    """The comment that a configuration begins with."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def program_of(path: str) -> str:
    """The command that runs a configuration, as its header says."""
    found = re.search(rf"^Run:\s+python -m (align\.\w+) {re.escape(path)}\b", header(path), re.MULTILINE)
    assert found, f"{path}: the header has no line 'Run:  python -m align.... {path}'"
    return found[1]


def checked(program: str, path: str, *overrides: str) -> DictConfig:
    """A configuration, read and checked as the command does; raises ConfigError."""
    if program == "align.plan":
        words = iter(overrides)
        overrides = tuple(word for word in words if word != "--memory" or not next(words).isdigit())
        config = configuration.read(path, overrides)
        configuration.check(config, inputs_exist=False)
        return config
    if program != "align.fit":
        return read_checked(path, overrides, {"align.sample": Sampling, "align.evaluate": Evaluation}[program])
    config = configuration.read(path, overrides)
    configuration.check(config)
    return config


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted place, value) of everything in nested mappings and lists that is neither."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
    for key, item in items or ():
        yield from leaves(item, f"{path}.{key}" if path else str(key))


def mappings(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted place, mapping) of every mapping in nested mappings."""
    if isinstance(value, dict):
        yield path, value
        for key, item in value.items():
            yield from mappings(item, f"{path}.{key}" if path else str(key))


def plain(path: str, resolve: bool = False) -> dict[str, Any]:
    """A configuration as plain mappings; references as they are written, unless resolved."""
    return OmegaConf.to_container(OmegaConf.load(ROOT / path), resolve=resolve)  # type: ignore[return-value]


def inputs(path: str) -> set[str]:
    """The files and folders of runs/ that a configuration reads, and the user's own in my/."""
    found = leaves(plain(path, resolve=True))
    return {value for key, value in found if str(value).startswith(("runs/", "my/")) and key not in ("run_dir", "out")}


def provide(name: str) -> None:
    """Puts an input there: a data file, or a folder with a model's config.json."""
    path = Path(name) if ".jsonl" in name else Path(name) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the configurations."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def filled(empty: Path) -> Path:
    """The same with all inputs of all configurations."""
    for name in {name for path in CONFIGS for name in inputs(path)}:
        provide(name)
    return empty


def test_none_is_forgotten() -> None:
    found = {"runs": len(CONFIGS), "sweeps": len(SWEEPS)}
    assert found == COUNT, f"found {EVERY_YAML}; if that is right, change COUNT"


@pytest.mark.parametrize("path", CONFIGS)
def test_a_configuration_is_right(path: str, filled: Path) -> None:
    checked(program_of(path), path)


@pytest.mark.parametrize("path", CONFIGS)
def test_without_its_inputs_each_of_them_is_named_and_nothing_else(path: str, empty: Path) -> None:
    with pytest.raises(ConfigError) as error:
        checked(program_of(path), path)
    named = {re.match(r"[\w.\[\]-]+: (\S+) does not exist \(looked from ", text) for text in error.value.errors}
    assert all(named), error.value.errors
    assert {found[1] for found in named if found} == inputs(path)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_input_is_written_by_an_earlier_stage(path: str) -> None:
    folders = {plain(other)["run_dir"] for other in CONFIGS if "run_dir" in plain(other)}
    folders |= set(re.findall(r"\brun_dir=(\S+)", "\n".join(map(header, CONFIGS))))
    written = {f"{folder}/hf" for folder in folders} | {f"{folder}/hf-ema" for folder in folders if "ppo" in folder}
    assert {name for name in inputs(path) if not name.startswith(NO_STAGE_WRITES)} <= written


@pytest.mark.parametrize("path", CONFIGS)
def test_every_key_is_one_that_is_read(path: str) -> None:
    """A top-level key of the command, or an argument of what the node builds; nothing takes whatever it gets."""
    found = plain(path)
    known = OWN_KEYS[program_of(path)]
    assert found.keys() <= known.keys()
    assert found.get("trainer", {}).keys() <= inspect.signature(Trainer).parameters.keys()
    for place, node in mappings(found):
        if "_target_" in node:
            signature = inspect.signature(schema.find_target(node["_target_"]))
            assert not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()), place
            assert node.keys() - {"_target_"} <= signature.parameters.keys(), place


@pytest.mark.parametrize("path", CONFIGS)
def test_a_key_that_nothing_reads_is_an_error_wherever_it_stands(path: str, filled: Path) -> None:
    program = program_of(path)
    for place, _ in mappings(plain(path)):
        config = plain(path)
        node = config
        for key in place.split(".") if place else ():
            node = node[key]
        node["nothing_reads_this"] = 1
        OmegaConf.save(config, "changed.yaml")
        with pytest.raises(ConfigError) as error:
            checked(program, "changed.yaml")
        wanted = f"{place}.nothing_reads_this" if place else "nothing_reads_this"
        assert [text.partition(":")[0] for text in error.value.errors] == [wanted]


@pytest.mark.parametrize("path", SWEEPS)
def test_every_trial_of_a_sweep_is_right_and_has_a_folder_of_its_own(
    path: str, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    assert sweep["metric"]["name"] in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    grid = {name: choice["values"] for name, choice in sweep["parameters"].items()}
    trials = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    folders = set()
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    for number, trial in enumerate(trials):
        # As W&B's agent does it: ${envvar:...} is filled in for good, before the first trial has its name.
        words = create_sweep_command(sweep["command"])
        monkeypatch.setenv("WANDB_RUN_ID", f"trial-{number}")
        given = create_sweep_command_args({"args": {name: {"value": value} for name, value in trial.items()}})
        _, python, flag, program, config, *overrides = [
            word for text in words for word in (given["args"] if text == "${args}" else [text])
        ]
        assert (python, flag) == ("python", "-m")
        found = checked(program, config, *overrides)
        assert all(OmegaConf.select(found, name) == value for name, value in trial.items())
        folders.add(found.run_dir)
    assert len(folders) == len(trials) > 1


@pytest.mark.parametrize("path", EVERY_YAML)
def test_the_header_says_what_it_is_for(path: str) -> None:
    lines = header(path).splitlines()
    assert len(lines[0]) > 40 and lines[0].endswith((".", ":")), f"{path}: the first line is the purpose, a sentence"
    assert any(line.startswith("Data:") for line in lines), f"{path}: the header does not say what data it reads"
    assert any(line.startswith("Run:") and path in line for line in lines), f"{path}: the header has no command"


@pytest.mark.parametrize("path", EVERY_YAML)
def test_lines_are_short_enough_to_read(path: str) -> None:
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1):
        assert len(line) <= 125, f"{path}:{number}"


def texts() -> dict[str, str]:
    """Everything that shows commands to a user: documents, `--help`, and the headers of configurations."""
    found = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/extend.md")}
    found |= {program.__name__: program.EPILOG for program in (fit, plan, sample, evaluate)}
    for path in CONFIGS:
        overrides = " ".join(re.findall(r"(?<!\S)[a-z_.]+=[a-z0-9_./-]+(?!\S)", header(path)))
        found[path] = f"python -m {program_of(path)} {path} {overrides}"
    return found


@pytest.mark.parametrize("name", texts())
def test_commands_that_a_user_is_shown_are_accepted(name: str, filled: Path) -> None:
    found = [shlex.split(command.replace("\\\n", " "))[2:] for command in COMMAND.findall(texts()[name])]
    assert found
    for program, path, *overrides in found:
        if any("_target_" in word for word in overrides):  # of the user's own; tests/unit/test_extend.py runs them
            continue
        for value in (override.partition("=")[2] for override in overrides):
            if value.endswith((".jsonl", "/hf")):
                provide(value)
        checked(program, path, *overrides)
