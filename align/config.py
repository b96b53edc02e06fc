"""One YAML a run: read it with overrides, report every error at once.

`read` -> `check` -> `align.build.build`. A mapping with `_target_: dotted.path` is built by calling that class or
function with the other keys as arguments, so its signature is the schema (see `schema`).
Nothing is loaded before `check` has found no error. What the parts of a run mean is left to the objects built.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import Field

from align import inputs, schema
from align import overrides as command_line
from align.loggers import wandb_settings
from align.schema import TARGET, join

FIT_KEYS: Mapping[str, Any] = {
    "run_dir": str,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
    "overwrite": bool,
    "resume": Literal["auto", "never", "force"],
    "tokenizer": Any,
    "data": LightningDataModule,
    "module": LightningModule,
    "trainer": dict[str, Any],
    "callbacks": dict[str, Callback | None] | None,
    "loggers": dict[str, Any] | None,
}
"""The top-level keys of `align.fit` and what each must be."""

FIT_REQUIRED = ("run_dir", "seed", "data", "module", "trainer")

TRAINER_REMEDIES: Mapping[str, str] = {
    "gradient_clip_val": "has no effect here; use module.optim.max_grad_norm",
    "gradient_clip_algorithm": "has no effect here; gradients are clipped by norm: module.optim.max_grad_norm",
    "accumulate_grad_batches": "has no effect here; to save memory use module.micro_batch_tokens, which splits a batch",
    "callbacks": "is set by align.fit; list them under the top-level key callbacks",
    "logger": "is set by align.fit; choose loggers under the top-level key loggers",
    "default_root_dir": "is set by align.fit; everything is written under run_dir",
    "use_distributed_sampler": "is set by align.fit; the data modules order their own batches",
    "inference_mode": "is set by align.fit; leave it out",
    "enable_checkpointing": "is set by align.fit; give a lightning.pytorch.callbacks.ModelCheckpoint under callbacks",
}
"""Trainer arguments that do nothing or raise under manual optimisation, or that `fit` itself sets."""

AUTO = "auto"
"""As `trainer.precision`: what is fastest on the machine at hand (`align.precision`)."""

STRATEGIES = ("auto", "ddp")
"""Names that `trainer.strategy` may have; both mean align.strategy.DDP where there are several processes."""


class ConfigError(ValueError):
    """What is wrong with a configuration, or with what it led to.

    Args:
        errors: One message each, beginning with the place in the YAML.
    """

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


class _Unknown:
    """Stands for a value that is missing or cannot be resolved; already reported, so it fits everywhere."""


def read(path: str | Path, overrides: Sequence[str] = (), known_keys: Collection[str] = FIT_KEYS) -> DictConfig:
    """The YAML with overrides applied, in struct mode; references are kept.

    Args:
        path: Of the YAML file.
        overrides: `key=value` or `--key=value`, nested keys with dots, values as in YAML. The key must be in the file,
            or be a parameter of the node's target or of the Trainer, or a key the command knows.
        known_keys: Top-level keys the command knows.

    Raises:
        ConfigError: The file cannot be read, or overrides cannot be applied (all of them are reported).
    """
    config = _load(Path(path))
    errors: list[str] = []
    for text in overrides:
        try:
            command_line.apply(config, text, known_keys)
        except schema.Mismatch as error:
            errors.append(str(error))
    if errors:
        raise ConfigError(errors)
    OmegaConf.set_struct(config, True)
    return config


def plain(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts and lists, references followed."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def check(
    config: DictConfig,
    *,
    known_keys: Collection[str] | Mapping[str, Any] = FIT_KEYS,
    required_keys: Collection[str] = FIT_REQUIRED,
    inputs_exist: bool = True,
) -> None:
    """Finds everything that can be known to be wrong before anything is loaded.

    Args:
        config: As `read` returns it.
        known_keys: The command's top-level keys; a mapping gives the annotation of each. The default is `align.fit`'s.
        required_keys: Those that must be given, as far as they are known.
        inputs_exist: The data files and models it names must be there.

    Raises:
        ConfigError: With all errors.
    """
    checker = _Checker(config, inputs_exist)
    known = known_keys if isinstance(known_keys, Mapping) else {key: FIT_KEYS.get(key, Any) for key in known_keys}
    top = {
        key: Parameter(
            key,
            Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=Parameter.empty if key in required_keys else None,
        )
        for key, annotation in known.items()
    }
    values = checker.values(checker.plain, "")
    checker.bind("key", top, values, "")
    if "trainer" in known:
        checker.trainer(values.get("trainer"))
    if "loggers" in known:
        checker.loggers(values.get("loggers"))
    if checker.errors:
        raise ConfigError(checker.errors)


def _load(path: Path) -> DictConfig:
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        hint = "; the first argument is the YAML, overrides follow" if "=" in str(path) else ""
        raise ConfigError([f"{path}: no such file (looked from {Path.cwd()}){hint}"]) from error
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from error
    except yaml.MarkedYAMLError as error:
        mark, begins = error.problem_mark, error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = f" {error.context}{f' (from line {begins.line + 1})' if begins else ''}" if error.context else ""
        raise ConfigError([f"{path}{place}: not valid YAML: {error.problem}{context}"]) from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:  # ValueError: a number of too many digits
        raise ConfigError([f"{path}: {str(error).splitlines()[0]}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: nested too deeply to be a configuration"]) from error
    except OSError as error:  # how OmegaConf says that the file holds a single number
        raise ConfigError([f"{path}: expected a mapping of keys to values: {error}"]) from error
    if not isinstance(config, DictConfig):
        raise ConfigError([f"{path}: expected a mapping of keys to values, got a list"])
    return config


class _Checker:
    """Walks a configuration and collects what is wrong with it."""

    def __init__(self, config: DictConfig, inputs_exist: bool) -> None:
        self.errors: list[str] = []
        self.inputs_exist = inputs_exist
        self.shared: set[str] = set()
        self.plain: Any = self._resolve(config, "", ())
        self.run_dir = self.plain.get("run_dir")

    def values(self, value: Any, path: str) -> Any:
        """The value with a `schema.Node` for each `_target_` node in it, once that has been checked."""
        before = len(self.errors)
        if isinstance(value, dict):
            found: Any = {key: self.values(item, join(path, key)) for key, item in value.items() if key != TARGET}
            if TARGET in value:
                found = self._node(value[TARGET], found, path, sound=len(self.errors) == before)
        elif isinstance(value, list):
            found = [self.values(item, join(path, number)) for number, item in enumerate(value)]
        else:
            return value
        if path in self.shared:  # reported where it is written
            del self.errors[before:]
        return found

    def bind(
        self,
        kind: str,
        parameters: Mapping[str, Parameter],
        values: Mapping[Any, Any],
        path: str,
        takes_any: bool = False,
    ) -> None:
        """Reports arguments that a signature does not have, those it misses, and those of the wrong type."""
        for key in values if not takes_any else ():
            if key not in parameters:
                near = schema.suggestion(key, parameters)
                self.errors.append(f"{join(path, key)}: unknown {kind}{near}{schema.listed(parameters)}")
        for key, parameter in parameters.items():
            if key in values:
                self._argument(parameter.annotation, values[key], join(path, key))
            elif parameter.default is Parameter.empty:
                known = parameter.annotation is not Parameter.empty
                wanted = f", expected {schema.type_name(parameter.annotation)}" if known else ""
                self.errors.append(f"{join(path, key)}: missing{wanted}")

    def trainer(self, values: Any) -> None:
        """Reports what a Trainer does not take, and what has no effect or another place in this package."""
        if not isinstance(values, dict):
            return
        parameters, _ = schema.parameters(Trainer)
        for key, remedy in TRAINER_REMEDIES.items():
            if key in values:
                self.errors.append(f"trainer.{key}: {remedy}")
        for key in ("devices", "num_nodes"):
            if isinstance(values.get(key), int) and values[key] < 1 and (key, values[key]) != ("devices", -1):
                self.errors.append(f"trainer.{key}: got {values[key]}, expected at least 1")
        strategy = values.get("strategy")
        if isinstance(strategy, str) and strategy not in STRATEGIES:
            expected = f"{', '.join(STRATEGIES)}, or a _target_ such as align.strategy.DDP"
            self.errors.append(f"trainer.strategy: got {strategy!r}, expected {expected}")
        left = {key: value for key, value in values.items() if key not in TRAINER_REMEDIES}
        known = {key: value for key, value in parameters.items() if key not in TRAINER_REMEDIES}
        precision = values.get("precision")
        if precision == AUTO:
            del left["precision"]
        self.bind("argument of the Trainer", known, left, "trainer")
        between = values.get("check_val_every_n_epoch")
        if isinstance(between, int) and between < 1:  # Lightning divides by it
            self.errors.append(f"trainer.check_val_every_n_epoch: got {between}, expected at least 1")
        if isinstance(precision, str) and precision.endswith("-true") and precision != "32-true":
            remedy = "use 16-mixed or bf16-mixed, or set dtype: bfloat16 where a model is loaded"
            self.errors.append(f"trainer.precision: got {precision}, which would convert data as well; {remedy}")
        if not values.keys() & {"max_epochs", "max_steps", "max_time", "fast_dev_run"}:
            self.errors.append("trainer: does not say when to stop; set max_epochs or max_steps")

    def loggers(self, values: Any) -> None:
        """Reports what `loggers.opened` does not take."""
        if not isinstance(values, dict):
            return
        own = {"csv": bool, "wandb": bool | dict[str, Any]}
        for key, value in values.items():
            self._argument(own.get(key, Logger | None), value, f"loggers.{key}")
        settings = values.get("wandb")
        if isinstance(settings, dict):
            known = {key: Parameter(key, Parameter.KEYWORD_ONLY, default=None) for key in sorted(wandb_settings())}
            self.bind("argument of wandb.init", known, settings, "loggers.wandb")

    def _node(self, dotted: Any, values: dict[Any, Any], path: str, *, sound: bool) -> schema.Node:
        before = len(self.errors)
        try:
            if isinstance(dotted, _Unknown):
                return schema.Node(None, {}, sound=False)
            target = schema.find_target(dotted)
        except schema.Mismatch as error:
            self.errors.append(f"{join(path, TARGET)}: {error}")
            return schema.Node(None, {}, sound=False)
        parameters, takes_any = schema.parameters(target)
        self.bind(f"argument of {dotted}", parameters, values, path, takes_any)
        defaults = {key: p.default for key, p in parameters.items() if p.default is not Parameter.empty}
        arguments = {TARGET: dotted, **defaults, **_plain_arguments(values)}
        sound = sound and len(self.errors) == before and _all_sound(values)
        if sound and hasattr(target, "config_errors"):
            own = {key: value for key, value in arguments.items() if key != TARGET}
            for message in target.config_errors(own):  # type: ignore[attr-defined]
                name, colon, _ = message.partition(":")
                self.errors.append(f"{path}{'.' if colon and name in own else ': '}{message}")
        return schema.Node(schema.produced_class(target), arguments, sound and len(self.errors) == before)

    def _argument(self, annotation: Any, value: Any, path: str) -> None:
        if not _all_known(value):
            return
        try:
            schema.conform(annotation, value)
        except schema.Mismatch as error:
            for key in error.inside:
                path = join(path, key)
            self.errors.append(f"{path}: {error}")
            return
        marks = schema.metadata(annotation)
        for text in _strings(value) if marks else ():
            complaint = inputs.complaint(text, marks, self.run_dir, must_exist=self.inputs_exist)
            if complaint:
                self.errors.append(f"{path}: {complaint}")

    def _resolve(self, node: DictConfig | ListConfig, path: str, parents: tuple[int, ...]) -> Any:
        """Plain containers with references followed; what cannot be had is reported and becomes `_Unknown`."""
        keys: Iterable[Any] = node.keys() if isinstance(node, DictConfig) else range(len(node))
        found: dict[Any, Any] = {key: self._resolve_one(node, key, join(path, key), parents) for key in keys}
        return found if isinstance(node, DictConfig) else list(found.values())

    def _resolve_one(self, node: DictConfig | ListConfig, key: Any, path: str, parents: tuple[int, ...]) -> Any:
        if OmegaConf.is_missing(node, key):
            self.errors.append(f"{path}: has no value in the file (???); give one, or {path}=... on the command line")
            return _Unknown()
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            return _Unknown()
        except OmegaConfBaseException as error:
            self.errors.append(f"{path}: {schema.reason(error)}")
            return _Unknown()
        if isinstance(value, str) and not inputs.can_be_written(value):
            self.errors.append(f"{path}: {value[:80]!r} holds a null byte or half a character, as no file or name can")
            return _Unknown()
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            self.errors.append(f"{path}: got a number of {len(str(abs(value)))} digits, expected one of 64 bits")
            return _Unknown()
        if not isinstance(value, DictConfig | ListConfig):
            return value
        if id(value) in (*parents, id(node)):
            self.errors.append(f"{path}: refers to a mapping that it is part of")
            return _Unknown()
        before = len(self.errors)
        found = self._resolve(value, path, (*parents, id(node)))
        if OmegaConf.is_interpolation(node, key):
            self.shared.add(path)
            del self.errors[before:]
        return found


def _leaves(value: Any) -> list[Any]:
    """Everything in nested lists and mappings that is neither; a node counts as one."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [value]


def _strings(value: Any) -> list[str]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, str)]


def _all_known(value: Any) -> bool:
    """Whether the type of everything in a value is known."""
    return not any(
        isinstance(x, _Unknown) or (isinstance(x, schema.Node) and x.produces is None) for x in _leaves(value)
    )


def _all_sound(value: Any) -> bool:
    """Whether no error has been found in a value's nodes."""
    return not any(isinstance(x, _Unknown) or (isinstance(x, schema.Node) and not x.sound) for x in _leaves(value))


def _plain_arguments(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_arguments(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_arguments(item) for item in value]
    return value.arguments if isinstance(value, schema.Node) else value
