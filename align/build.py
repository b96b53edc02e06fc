"""From a checked configuration to the objects it names; what a constructor complains of gets its place in the YAML."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from align import schema
from align.config import ConfigError
from align.schema import TARGET, join


def build(node: Any, path: str = "", annotation: Any = Any) -> Any:
    """What a node describes: nested `_target_` nodes first, each called with keyword arguments.

    Plain mappings and lists come back as dict and list, other values as they are. Plain arguments take the form their
    annotation asks for (`1` becomes `1.0` where a float is wanted, a list becomes a tuple).

    Args:
        node: Of a checked configuration.
        path: Where it stands, for error messages.
        annotation: What the built value must be.

    Raises:
        ConfigError: A constructor raised ValueError or could not read a file, or what was built does not fit. That
            `check` cannot see where a target does not say what it returns.
    """
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    built = _built(node, path)
    if _holds_node(node):
        _conformed(annotation, built, path)
    return built


def arguments(target: Callable[..., Any], node: Any, path: str = "") -> dict[Any, Any]:
    """The built arguments of a call, in the form that its annotations ask for.

    Args:
        target: To be called with them.
        node: Its mapping, of a checked configuration.
        path: Where it stands, for error messages.

    Raises:
        ConfigError: See `build`.
    """
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=True)
    parameters, _ = schema.parameters(target)
    values = {key: _built(value, join(path, key)) for key, value in node.items() if key != TARGET}
    for key in values.keys() & parameters.keys():
        conformed = _conformed(parameters[key].annotation, values[key], join(path, key))
        if not _holds_node(node[key]):
            values[key] = conformed
    return values


def _built(node: Any, path: str) -> Any:
    if isinstance(node, list):
        return [_built(value, join(path, number)) for number, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if TARGET not in node:
        return {key: _built(value, join(path, key)) for key, value in node.items()}
    try:
        target = schema.find_target(node[TARGET])
        return target(**arguments(target, node, path))
    except ConfigError:
        raise
    except TypeError as error:
        if not schema.parameters(target)[1]:
            raise
        # It takes any argument, or has no signature, so only calling it could tell that these are not right.
        raise ConfigError([f"{path or node[TARGET]}: {error}{_raised_at(error)}"]) from error
    except (ValueError, OSError) as error:
        raise ConfigError([f"{path or node[TARGET]}: {error}{_raised_at(error)}"]) from error


def _conformed(annotation: Any, value: Any, path: str) -> Any:
    try:
        return schema.conform(annotation, value)
    except schema.Mismatch as error:
        for key in error.inside:
            path = join(path, key)
        raise ConfigError([f"{path}: {error}"]) from error


def _raised_at(error: Exception) -> str:
    """The place of an error that a library or a user's own class raised; ours say all that is needed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(frame.filename).is_relative_to(Path(__file__).parent)
    return "" if own else f" (raised in {frame.filename}, line {frame.lineno})"


def _holds_node(value: Any) -> bool:
    if isinstance(value, dict):
        return TARGET in value or any(_holds_node(item) for item in value.values())
    return isinstance(value, list) and any(_holds_node(item) for item in value)
