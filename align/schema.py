"""A constructor's signature as the schema of its YAML node: finding targets, their parameters, and what fits them.

Works on plain Python values; knows nothing of files or of which keys a configuration has (that is `config`).
Values are checked strictly (pydantic): `1` is fine for a float, `true` is no int, `"3"` is no number.
"""

import difflib
import functools
import importlib
import inspect
import os
import pkgutil
import traceback
import types
from collections import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, PlainValidator, Strict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticCustomError

PLAIN = (Any, object, None, types.NoneType, bool, int, float, str, bytes)
"""What YAML can hold by itself."""

CONVERTED = (tuple, set, frozenset, Path, timedelta)
"""What YAML cannot write but a list or a string turns into."""

CONTAINERS: Mapping[Any, type] = {
    list: list, abc.Sequence: list, abc.MutableSequence: list, abc.Iterable: list, abc.Collection: list,
    dict: dict, abc.Mapping: dict, abc.MutableMapping: dict,
}  # fmt: skip
"""Annotations that a YAML list or mapping satisfies."""


CHECKING = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
"""Numbers are finite: not one of a run's numbers means anything as infinity or NaN."""

TARGET = "_target_"
"""The key that makes a mapping the description of an object."""


class Mismatch(ValueError):
    """A value or a dotted path that does not fit; the message lacks only the place in the configuration.

    Args:
        message: What, got, expected, remedy.
        inside: The keys and list numbers that lead to the part of the value that does not fit.
    """

    def __init__(self, message: str, inside: Sequence[str | int] = ()) -> None:
        super().__init__(message)
        self.inside = tuple(inside)


@dataclass(frozen=True)
class Node:
    """Stands in a checked configuration for what a `_target_` node will build.

    Attributes:
        produces: The class that will be built; None where only building tells.
        arguments: Its plain arguments, defaults filled in, and `_target_` itself.
        sound: No error was found in it or below it.
    """

    produces: type | None
    arguments: dict[Any, Any]
    sound: bool


IMPORT_FAILURES = (
    ImportError, SyntaxError, SystemExit, NameError, AttributeError, TypeError, ValueError, LookupError, OSError,
    RuntimeError, ArithmeticError, AssertionError,
)  # fmt: skip
"""What a module's own lines may raise when it is imported; a script without a guard for `__main__` even exits."""


def suggestion(name: object, options: Iterable[object]) -> str:
    """`; did you mean 'x'?` for the option nearest to a name, or nothing."""
    near = difflib.get_close_matches(str(name), [str(option) for option in options], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def join(path: str, key: object) -> str:
    """The place of a key, or of a number in a list, below a place in a configuration."""
    if isinstance(key, int) and not isinstance(key, bool):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


def listed(names: Iterable[str]) -> str:
    """The names that would have been right, for the end of an error message."""
    return f" (known: {', '.join(names) or 'none'})"


def reason(error: OmegaConfBaseException) -> str:
    """What OmegaConf complains of, without its note of where."""
    return (error.msg or str(error)).splitlines()[0]


def find_target(dotted: object) -> Callable[..., Any]:
    """The class or function a `_target_` names.

    Raises:
        Mismatch: It cannot be imported; the message says which part is wrong and what is there instead.
    """
    if not isinstance(dotted, str) or not all(part.isidentifier() for part in dotted.split(".")) or "." not in dotted:
        raise Mismatch(f"expected a dotted path such as align.modules.sft.SFTModule, got {described(dotted)}")
    first, *rest = dotted.split(".")
    found: Any = _import(first)
    if found is None:
        raise Mismatch(f"no package or module {first!r} (looked in the installed packages and in {os.getcwd()})")
    name = first
    for part in rest:
        parent, name = found, f"{name}.{part}"
        found = getattr(parent, part, None)
        if found is None and inspect.ismodule(parent):
            found = _import(name)
        if found is None:
            kind = "module" if inspect.ismodule(parent) else "class"
            raise Mismatch(
                f"{kind} {name.rpartition('.')[0]} has no {part!r}{suggestion(part, _names_in(parent)) or ' in it'}"
            )
    if not callable(found):
        raise Mismatch(f"{dotted} is a {type(found).__name__}, expected a class or a function")
    if _is_abstract(found):
        raise Mismatch(f"{dotted} only describes what classes of its kind have in common; name one of those")
    return found


def parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that can be given by name, and whether any other name is taken too (`**kwargs`)."""
    try:
        found = _signature(target).parameters.values()
    except ValueError:  # some built-ins have no signature
        return {}, True
    by_name = {p.name: p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return by_name, any(p.kind is p.VAR_KEYWORD for p in found)


def produced_class(target: Callable[..., Any]) -> type | None:
    """The class of what a target builds, None where that cannot be told or is a plain value."""
    if isinstance(target, type):
        produced: Any = target
    else:
        try:
            produced = _signature(target).return_annotation
        except ValueError:
            return None
    if not isinstance(produced, type) or produced is inspect.Signature.empty or get_origin(produced) is not None:
        return None
    return None if produced in (*PLAIN, *CONVERTED, *CONTAINERS) else produced


def conform(annotation: Any, value: Any) -> Any:
    """A YAML value as its annotation wants it: `1` becomes `1.0` for a float, a list becomes a tuple.

    Args:
        annotation: Of the parameter. What it cannot be checked against (type variables, unresolved names) fits.
        value: Plain, with `Node` for what is yet to be built.

    Raises:
        Mismatch: It does not fit.
    """
    try:
        adapter = _adapter(annotation)
    except PydanticUserError:  # an annotation that pydantic cannot read is not the user's mistake
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise _mismatch(annotation, value, error) from None


def metadata(annotation: Any) -> set[str]:
    """The strings that annotate any part of a type, such as `paths.DATA` in `list[DataPath] | None`."""
    own = set(get_args(annotation)[1:]) if get_origin(annotation) is Annotated else set()
    parts = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return {item for item in own if isinstance(item, str)}.union(*(metadata(part) for part in parts))


def described(value: Any) -> str:
    """A value for an error message: its type and, cut short, itself."""
    if isinstance(value, Node):
        return f"a {value.produces.__name__}" if value.produces else "a built object"
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 80 else shown[:77] + '...'}"


def type_name(annotation: Any) -> str:
    """An annotation in the words of someone who writes YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        texts = [item for item in arguments[1:] if isinstance(item, str)]
        return texts[0] if texts else type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_name(part) for part in arguments))
    if origin is Literal:
        return " | ".join(repr(choice) for choice in arguments)
    if annotation in (None, types.NoneType):
        return "null"
    name = getattr(origin or annotation, "__name__", str(annotation))
    inner = ", ".join("..." if part is ... else type_name(part) for part in arguments if not isinstance(part, list))
    return f"{name}[{inner}]" if inner else name


def _is_abstract(found: Any) -> bool:
    """Whether it is a class that cannot be built: one with methods to fill in, a protocol, or a mere annotation."""
    return found is Any or inspect.isabstract(found) or bool(getattr(found, "_is_protocol", False))


def _import(name: str) -> Any:
    """The module, or None where there is none of that name."""
    try:
        return importlib.import_module(name)
    except IMPORT_FAILURES as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        own = "" if isinstance(error, ImportError | SyntaxError) else f" ({frame.filename}, line {frame.lineno})"
        said = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise Mismatch(f"importing {name} failed: {said}{own}") from error


def _names_in(parent: Any) -> list[str]:
    modules = [module.name for module in pkgutil.iter_modules(getattr(parent, "__path__", []))]
    return modules + [name for name in dir(parent) if not name.startswith("_")]


def _signature(target: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except (NameError, AttributeError, TypeError, SyntaxError):  # names only a type checker can see: left as strings
        return inspect.signature(target)


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(_checkable(annotation), config=CHECKING)


def _checkable(annotation: Any) -> Any:
    """The annotation in a form that knows YAML's limits and accepts a `Node` for a class."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[_checkable(arguments[0]), *arguments[1:]]
    if origin in (Union, types.UnionType):
        return Union[tuple(_checkable(part) for part in arguments)]  # noqa: UP007 (built from parts)
    if origin is Literal or annotation in PLAIN or is_typeddict(annotation):
        return annotation
    base = origin or annotation
    if isinstance(base, type) and base not in (*CONVERTED, *CONTAINERS, inspect.Parameter.empty):
        return Annotated[Any, PlainValidator(_instance_check(base))]
    inner = tuple(part if part is ... else _checkable(part) for part in arguments)
    if base in CONVERTED:
        return Annotated[base[inner] if inner else base, Strict(False)]  # type: ignore[index]
    if base in CONTAINERS:
        return CONTAINERS[base][inner] if inner else CONTAINERS[base]  # type: ignore[index]
    return Any


def _instance_check(wanted: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        try:
            if isinstance(value, Node):
                produced = value.produces or wanted
                fits = issubclass(produced, wanted) or issubclass(wanted, produced)
            else:
                fits = isinstance(value, wanted)
        except TypeError:  # a protocol that only a type checker can check; no plain value is meant to follow one
            fits = not isinstance(value, bool | int | float | str | bytes | list | dict | None)
        if not fits:
            raise PydanticCustomError("instance_type", "no instance")
        return value

    return check


def _mismatch(annotation: Any, value: Any, error: ValidationError) -> Mismatch:
    """Pydantic's findings in our words. Its places inside a union name types, so only plain containers are entered."""
    found = error.errors(include_url=False)
    inside = []
    for key in found[0]["loc"]:
        part = _part(annotation)
        if part is None or not isinstance(value, dict | list):
            break
        annotation, value = part, value[key]  # type: ignore[index, call-overload]
        inside.append(key)
    limits = [item["msg"] for item in found if not item["type"].endswith(("_type", "literal_error", "sequence_str"))]
    if limits:
        return Mismatch(f"{limits[0].replace('Input', 'it')}, got {described(value)}", inside)
    message = f"expected {type_name(annotation)}, got {described(value)}"
    if any(item["type"] == "instance_type" for item in found) and not isinstance(value, Node):
        message += "; write a mapping with `_target_: ...` that builds one"
    return Mismatch(message, inside)


def _part(annotation: Any) -> Any:
    """What the items of a list or the values of a mapping are annotated with; None for anything else."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _part(arguments[0])
    if origin in (Union, types.UnionType):
        choices = [part for part in arguments if part is not types.NoneType]
        return _part(choices[0]) if len(choices) == 1 else None
    return arguments[-1] if origin in CONTAINERS else None
