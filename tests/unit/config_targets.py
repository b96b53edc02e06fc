"""What the configurations of the configuration tests build, one such configuration, and how to ask for its errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from pydantic import Field

from align.config import ConfigError, check, read
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
