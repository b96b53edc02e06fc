"""Values given on the command line: `key=value`, put into a configuration only where the key means something.

A key must be in the file already, or be a parameter of the node's target, of the Trainer, or known to the command.
Whether the values fit is left to `config.check`.
"""

from collections.abc import Collection
from typing import Any

import yaml
from lightning.pytorch import Trainer
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align import inputs, schema


def apply(config: DictConfig, text: str, known_keys: Collection[str]) -> None:
    """Applies one `key=value` to the configuration, in place.

    Raises:
        schema.Mismatch: It cannot be applied.
    """
    key, sign, raw = text.removeprefix("--").partition("=")
    if not sign or not key:
        raise schema.Mismatch(f"{text!r}: expected key=value or --key=value")
    if not inputs.can_be_written(text):
        raise schema.Mismatch(f"{text[:80]!r}: holds a null byte or half a character; is the terminal set to UTF-8?")
    value = _parse(key, raw)
    parts = key.replace("[", ".").replace("]", "").split(".")
    node: Any = config
    for depth, part in enumerate(parts):
        here, last = ".".join(parts[:depth]), depth == len(parts) - 1
        index = _place(node, part, here, key, known_keys)
        if last:
            node[index] = value
        elif isinstance(node, DictConfig) and index not in node.keys():  # noqa: SIM118 (`in node` is false for ???)
            node[index] = {}
        elif OmegaConf.is_interpolation(node, index):
            reference = OmegaConf.to_container(node, resolve=False)[index]  # type: ignore[index, call-overload]
            raise schema.Mismatch(
                f"{key}: {schema.join(here, part)} is {reference}; override what it refers to instead"
            )
        node = None if last or OmegaConf.is_missing(node, index) else node[index]


def _place(node: Any, part: str, here: str, key: str, known_keys: Collection[str]) -> str | int:
    """Where in a mapping or list an override goes."""
    if isinstance(node, ListConfig):
        if not part.isdecimal() or int(part) >= len(node):
            raise schema.Mismatch(f"{key}: {here} is a list of {len(node)}, expected a number below that, got {part!r}")
        return int(part)
    if not isinstance(node, DictConfig):
        raise schema.Mismatch(f"{key}: {here} is no mapping in the file, so it has no {part!r}")
    present = [str(name) for name in node.keys()]  # noqa: SIM118
    addable = _addable(node, here, known_keys)
    if part not in present and addable is not None and part not in addable:
        options = list(dict.fromkeys([*present, *addable]))
        raise schema.Mismatch(
            f"{key}: no key {part!r} in {here or 'the file'}{schema.suggestion(part, options)}{schema.listed(options)}"
        )
    return part


def _addable(node: DictConfig, here: str, known_keys: Collection[str]) -> Collection[str] | None:
    """The keys an override may add to a mapping; None: any, for `check` to judge."""
    if not here:
        return known_keys
    if here == "trainer":
        return schema.parameters(Trainer)[0]
    if here == "loggers":
        return ("csv", "wandb")
    if here == "loggers.wandb":
        return None
    if schema.TARGET not in node.keys() or OmegaConf.is_missing(node, schema.TARGET):  # noqa: SIM118
        return ()
    try:
        parameters, takes_any = schema.parameters(schema.find_target(node[schema.TARGET]))
    except (schema.Mismatch, OmegaConfBaseException):
        return None
    return None if takes_any else parameters


def _parse(key: str, raw: str) -> Any:
    try:
        parsed = OmegaConf.from_dotlist([f"value={raw}"])
    except yaml.MarkedYAMLError as error:
        raise schema.Mismatch(f"{key}: {raw!r} is not a YAML value: {error.problem}") from error
    except OmegaConfBaseException as error:
        raise schema.Mismatch(f"{key}: {raw[:80]!r}: {schema.reason(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # control characters, endless digits, [[[[...
        raise schema.Mismatch(f"{key}: {raw[:80]!r} is not a YAML value: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_container(parsed, resolve=False)["value"]  # type: ignore[index, call-overload]
