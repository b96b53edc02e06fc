"""The world in which malformed input meets the commands: the repository's own configurations, shrunk, and their inputs.

Every file and folder that a configuration names is there under that name, with tiny models. Earlier output is there as
well, and the configurations may overwrite it, so that anything lost to a mistake shows.
"""

import contextlib
import functools
import gzip
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import tiny
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.connectors import callback_connector
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from align import cli, evaluate, fit, sample
from align.callbacks.tables import SampleTable
from align.models.load import save_model
from align.modules.ppo import PPOModule
from align.modules.reward import RewardModule
from align.modules.sft import SFTModule

ROOT = Path(__file__).resolve().parents[2]
COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "base": fit.main,
    "sft": fit.main,
    "reward": fit.main,
    "ppo": fit.main,
    "sample": sample.main,
    "evaluate": evaluate.main,
}
"""Configuration -> the command that reads it."""

WORK = (
    (SFTModule, "training_step"),
    (RewardModule, "training_step"),
    (PPOModule, "collect"),
    (sample, "answers"),
    (evaluate, "answers"),
)
"""Where each command's real work begins: the first optimizer step, the first text written."""

CHAT = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<s> {{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<s> {% endif %}"
)
"""A chat template that refuses a role, as many do."""

ROWS: Mapping[str, dict[str, Any]] = {
    "prompts": {"prompt": "w5 w6"},
    "pretraining": {"text": "w5 w6 w7"},
    "demonstrations": {"prompt": "w5 w6", "response": "w7"},
    "human": {"prompt": "w5 w6", "response": "w7"},
    "rankings": {"prompt": "w5 w6", "responses": ["w7", "w8 w9"], "scores": [1.0, 0.0]},
}
"""How the name of a data file begins -> what is in it."""


class Began(Exception):
    """Raised in place of a command's real work, when everything has been read."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The tiny one, with a chat template; made once."""
    found = tiny.tokenizer()
    found.chat_template = CHAT
    return found


class Learner(LightningModule):
    """Takes whatever batches there are, and would begin to learn from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """See the class."""
        raise Began

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of nothing that matters."""
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

    def export(self, folder: Path) -> None:
        """Nothing to keep."""


class Reader(Trainer):
    """Stands in for the Trainer: reads the data and makes a batch of it, which a real one takes longer to come to."""

    def __init__(self, **_: Any) -> None:
        """Leaves everything out."""
        self._signal_connector: Any = SimpleNamespace()

    @property
    def strategy(self) -> Any:
        """Says where the model would be."""
        return SimpleNamespace(root_device="cpu", precision_plugin=SimpleNamespace(precision="32-true"))

    def fit(self, module: LightningModule, datamodule: LightningDataModule, ckpt_path: Path | None) -> None:
        """Up to the first batch."""
        datamodule.setup("fit")
        next(iter(datamodule.train_dataloader()))
        raise Began


def reading(kind: str, name: str) -> dict[str, Any]:
    """A configuration of `align.fit` that reads a file, as demonstrations, comparisons, texts or prompts."""
    limits: dict[str, Any] = {"batch_size": 4, "max_prompt_tokens": 16, "max_response_tokens": 8}
    targets: dict[str, dict[str, Any]] = {
        "demonstrations": {"_target_": "align.data.demonstrations.DemonstrationData", **limits},
        "comparisons": {"_target_": "align.data.comparisons.ComparisonData", **limits},
        "texts": {"_target_": "align.data.text.TextData", "batch_size": 4, "max_tokens": 16},
        "prompts": {"_target_": "align.data.prompts.PromptData", "batch_size": 4, "max_prompt_tokens": 16},
    }
    return {
        "run_dir": "runs/new",
        "seed": 0,
        "data": {**targets[kind], "tokenizer": {"_target_": f"{__name__}.tokenizer"}, "train": name},
        "module": {"_target_": f"{__name__}.Learner"},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
        "loggers": {"csv": True, "wandb": False},
    }


def _begin(*_: Any, **__: Any) -> Any:
    raise Began


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Its exit code; 0 as soon as the real work began.
        said: What it wrote to stderr.
        changed: Files and folders that were made, changed or deleted.
    """

    code: int
    said: str
    changed: tuple[str, ...]


def shrunk(name: str) -> dict[str, Any]:
    """One of the repository's configurations, as plain mappings with references as they are written.

    Nothing is sent to W&B, and nothing is measured that needs the quickstart's own data.
    """
    config: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / f"{name}.yaml"))  # type: ignore[assignment]
    if "loggers" in config:
        config["loggers"] = {"csv": True, "wandb": False}
        config["trainer"] |= {"enable_progress_bar": False}
    if name == "base":  # half of a single batch would be none
        del config["trainer"]["limit_train_batches"]
    if name == "evaluate":
        config |= {"metrics": {}, "win_by": None}
    if "overwrite" in config:
        config["overwrite"] = True
    return config


def build_world(folder: Path) -> None:
    """Puts everything that the configurations read, and what they overwrite, into a folder."""
    tokenizer = tiny.tokenizer()
    for model in ("data/init", "base/hf", "sft/hf", "ppo/hf-ema", "ppo-ptx/hf-ema"):
        save_model(tiny.llama(num_hidden_layers=2), tokenizer, folder / "runs" / model)
    save_model(tiny.scalar_model(num_hidden_layers=2), tokenizer, folder / "runs" / "reward" / "hf")
    for name in COMMANDS:
        config = shrunk(name)
        for text in {word for word in _words(config) if word.startswith("runs/") and ".jsonl" in word}:
            row = next((row for start, row in ROWS.items() if Path(text).name.startswith(start)), None)
            _write(folder / text, [row or {"old": "output"}] * 3)
        if "run_dir" in config:
            _old_run(folder / config["run_dir"])
    (folder / "empty.jsonl").write_text("")
    (folder / "empty.yaml").write_text("")
    (folder / "raising.py").write_text("raise RuntimeError('this module is broken')\n")
    (folder / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "ungrammatical.py").write_text("def :\n")


def _old_run(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"{cli.MARK}\n")
    (folder / "precious.txt").write_text("an earlier run")


def _words(value: Any) -> list[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [word for item in inner for word in _words(item)]


def _write(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


class World:
    """A folder as `build_world` fills it, or an empty one, the same before every command."""

    def __init__(self, folder: Path, empty: bool = False) -> None:
        self.template, self.folder = folder / "template", folder / "world"
        self.known: dict[str, tuple[int, ...]] = {}
        self.template.mkdir()
        if not empty:
            build_world(self.template)
        self.restore()

    def restore(self) -> None:
        """Everything as it was: what is new goes; where something else is not as it was, all is copied again."""
        now = self._seen() if self.known else {}
        if self.known and all(now.get(name) == seen for name, seen in self.known.items()):
            for name in sorted(now.keys() - self.known.keys()):
                shutil.rmtree(name) if os.path.isdir(name) else Path(name).unlink(missing_ok=True)
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder)
        self.known = self._seen()

    def run(self, command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Outcome:
        """Runs a command in the world, up to the point where work would begin."""
        before = self._seen()
        errors = io.StringIO()
        with contextlib.ExitStack() as stack:
            for place, name in WORK:
                stack.enter_context(mock.patch.object(place, name, _begin))
            stack.enter_context(mock.patch.object(SampleTable, "on_train_start"))
            stack.enter_context(contextlib.chdir(self.folder))
            stack.enter_context(mock.patch.object(callback_connector, "_load_external_callbacks", lambda group: []))
            stack.enter_context(mock.patch.dict(os.environ, WANDB_MODE="disabled"))
            stack.enter_context(mock.patch.object(sys, "path", [str(self.folder), *sys.path]))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(errors))
            try:
                code = command(arguments)
            except Began:
                code = 0
            except SystemExit as ended:  # argparse's way to say that there is no configuration
                code = ended.code if isinstance(ended.code, int) else -1
        after = self._seen()
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        return Outcome(code, errors.getvalue(), tuple(changed))

    def _seen(self) -> dict[str, tuple[int, ...]]:
        """Path -> what changes whenever somebody writes there."""
        found: dict[str, tuple[int, ...]] = {}
        for place, folders, files in os.walk(self.folder):
            if "__pycache__" in folders:
                folders.remove("__pycache__")
            found |= {os.path.join(place, name): () for name in folders}
            for name in files:
                status = os.stat(os.path.join(place, name))
                found[os.path.join(place, name)] = (status.st_size, status.st_mtime_ns)
        return found
