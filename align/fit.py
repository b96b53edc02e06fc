"""`python -m align.fit CONFIG [key=value ...]`: trains what a YAML describes and leaves one folder behind.

The only file that makes a Lightning Trainer. It knows no objective, data or model: those are `_target_` nodes.
"""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from align import cli, distributed, interrupt, launch, loggers, memory, precision, resume
from align.atomic import folder_written_whole
from align.build import build
from align.callbacks.checkpoint import Checkpoints
from align.checkpoints import VerifiedCheckpointIO
from align.config import AUTO, FIT_KEYS, STRATEGIES, ConfigError, check, plain, read
from align.data.base import AlignData
from align.interrupt import Interrupted
from align.models import deferred, sharding
from align.modules.base import AlignModule
from align.schema import TARGET
from align.strategy import DDP

PROG = "python -m align.fit"

DESCRIPTION = """\
Trains what the YAML file CONFIG describes: supervised fine-tuning, a reward model, PPO, or an objective of your own.
The configuration is checked as a whole before anything is loaded; all errors are reported at once.

The run writes one folder, the configuration's run_dir:
  config.yaml    the configuration with all overrides, references resolved
  metrics.csv    everything logged, one row a step
  checkpoints/   the state of the run at some steps; the same command continues from the newest one
  finished.json  written last: there is nothing left to do
  hf/            the trained model as a Hugging Face folder, input of the next stage
  wandb/         the Weights & Biases run; offline unless you are logged in"""

EPILOG = """\
overrides:
  key=value      replaces a value of the YAML; nested keys with dots, list items by number, values as in YAML
  --key=value    the same, as a W&B sweep passes it
  A key must be in the file, or be an argument that the constructor named by its _target_ takes.

examples:
  python -m align.fit configs/sft.yaml
  python -m align.fit configs/sft.yaml run_dir=runs/sft-2 module.optim.lr=1e-4 trainer.max_epochs=1
  python -m align.fit configs/ppo.yaml loggers.wandb=false overwrite=true
  python -m align.fit configs/ppo.yaml trainer.accelerator=gpu trainer.precision=bf16-mixed
In a W&B sweep give each trial its own folder: 'run_dir=runs/sweep/${oc.env:WANDB_RUN_ID}'

a run that was stopped:
  The same command continues it, to the same bits. Another configuration is refused; resume=force continues even so,
  overwrite=true begins anew. resume=never only ever begins. SIGTERM and SIGUSR1 save the state before the run ends.

exit codes: 0 trained, 2 a mistake in the configuration or the data (nothing to debug), 75 ended by a signal: start it
again, 1 anything else"""

WORTH_A_PLAN = 10_000_000
"""Parameters from which on memory is worth a thought."""

ANEW = "overwrite=true trains it anew, run_dir=... another one"

TRAINER_DEFAULTS: Mapping[str, Any] = {
    "num_sanity_val_steps": 0,  # data and model have been checked; a sanity pass only delays the first step
    "log_every_n_steps": 1,  # runs of a few hundred steps are common, and a step takes far longer than a row
    "enable_model_summary": False,
}
"""Where the configuration's `trainer` says nothing."""

UNHELPFUL_WARNINGS = (
    ".*does not have many workers.*",  # batches are small and tokenized in advance
    ".*logs directory .* exists and is not empty.*",  # config.yaml is in it
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*module.*in eval mode at the start of training.*",  # frozen copies are meant to be
    ".*`isinstance.treespec, LeafSpec.` is deprecated.*",  # between Lightning and PyTorch
    ".*smaller than the logging interval.*",
    ".*torch.distributed is disabled.*assuming the intent is to load in a single process.*",  # it is
    ".*recommended to use .self.log.*sync_dist=True.*",  # what is logged is the same on every rank already
    ".*Total length of `list` across ranks is zero.*",  # no validation data, as configured
    ".*You passed in a `val_dataloader` but have no `validation_step`.*",  # PPO: the data family always offers one
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli.run(fit, argv, prog=PROG, description=DESCRIPTION, epilog=EPILOG)


def fit(path: str, overrides: Sequence[str]) -> int | None:
    """Reads, checks, builds, trains and exports one run, or what is left of it.

    Args:
        path: Of the YAML file.
        overrides: `key=value`.

    Returns:
        `interrupt.AGAIN` where a signal ended the run early.

    Raises:
        ConfigError: The user's mistakes, as far as they show before training.
        RunError: A checkpoint could not be written, or too many steps had no finite gradient.
    """
    began = time.monotonic()
    config = read(path, overrides)
    check(config)
    processes = launch.processes(config.trainer.get("devices", 1), config.trainer.get("num_nodes", 1))
    if processes > 1:
        return launch.run(launch.again(path, overrides), processes)
    launch.die_with_parent()
    run_dir = Path(config.run_dir)
    with distributed.group(config.trainer.get("accelerator", "auto")), contextlib.ExitStack() as lock:

        def begin() -> resume.Start:
            lock.enter_context(resume.locked(run_dir))
            return resume.decide(config)

        start = distributed.from_first(begin)
        if start.finished:
            _say(f"{run_dir}: finished, at step {start.step}; model in {run_dir / 'hf'}. {ANEW}")
            return None
        try:
            with interrupt.listening(), _quiet_lightning():
                step = _train(config, start)
        except Interrupted as signal:
            _say(f"{run_dir}: ended by {signal}; the same command continues it")
            return interrupt.AGAIN
        if distributed.is_first():
            resume.finish(run_dir, step)
        took = _duration(time.monotonic() - began)
        _say(f"{run_dir}: trained in {took}; model in {run_dir / 'hf'}{_log(run_dir)}")
    return None


def _say(text: str) -> None:
    """Prints a line, once for all ranks."""
    if distributed.is_first():
        print(text, flush=True)


def _train(config: DictConfig, start: resume.Start) -> int:
    """Builds, trains from the given start, and exports; returns the number of optimizer steps done in all."""
    run_dir, before = Path(config.run_dir), memory.used()
    with _folder(config, start) as begins:
        seed_everything(config.seed, workers=True, verbose=False)
        with deferred.weights() if _shards(config) else contextlib.nullcontext():
            data, module = build_parts(config)
        if config.get("resume") == "force" and isinstance(data, AlignData):
            data.may_change = True
        with loggers.opened(
            build(config.get("loggers") or {}, "loggers", FIT_KEYS["loggers"]), run_dir, plain(config)
        ) as opened:
            trainer = build_trainer(config, [begins], opened)
            several = f"{trainer.world_size} processes, " if trainer.world_size > 1 else ""
            _say(f"{run_dir}: {_size(module)} on {trainer.strategy.root_device}, {several}{trainer.precision}")
            for note in start.notes:
                _say(f"{run_dir}: {note}")
            planned = memory_plan(module, data, trainer)
            for line in planned.lines() if planned is not None else ():
                _say(f"{run_dir}: {line}")
            with _of_this_model(start.checkpoint):
                trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint)
        export(module, run_dir / "hf")
    if planned is not None:
        _say(f"{run_dir}: needed {memory.shown(memory.needed(before))} of memory, {memory.shown(planned.peak)} planned")
    return trainer.global_step


@contextlib.contextmanager
def _folder(config: DictConfig, start: resume.Start) -> Iterator[Callback]:
    """The run folder, of which the first rank takes care; yields a callback that tells it when training begins."""
    if not distributed.is_first():
        yield Callback()
        return
    with cli.RunFolder(config, continues=start.continues) as folder:
        yield _Begins(folder)


def _shards(config: DictConfig) -> bool:
    """Whether the strategy shards weights, so that nobody needs them whole."""
    strategy = config.trainer.get("strategy")
    return isinstance(strategy, DictConfig) and strategy.get(TARGET) == "align.strategy.FSDP"


def build_parts(config: DictConfig) -> tuple[LightningDataModule, LightningModule]:
    """The data and the module of a checked configuration."""
    data, module = (build(config[key], key, FIT_KEYS[key]) for key in ("data", "module"))
    if not callable(getattr(module, "export", None)):
        raise ConfigError([f"module: {type(module).__name__} has no method export(folder), so nothing could be kept"])
    return data, module


def build_trainer(config: DictConfig, further: Sequence[Callback], opened: list[Logger]) -> Trainer:
    """Lightning's Trainer with the configuration's arguments and callbacks, writing into the run folder only.

    Args:
        config: Checked.
        further: Callbacks to be called after all others, which may find mistakes at the start of training.
        opened: Loggers.
    """
    run_dir = Path(config.run_dir)
    arguments = {**TRAINER_DEFAULTS, **build(config.trainer, "trainer")}
    if arguments.get("devices", "auto") == "auto":
        arguments["devices"] = distributed.local_world_size()
    arguments.setdefault("num_nodes", distributed.world_size() // distributed.local_world_size())
    if distributed.world_size() > 1 and arguments.get("strategy", "auto") in STRATEGIES:
        arguments["strategy"] = DDP()
    if arguments.get("precision") == AUTO:
        arguments["precision"] = precision.fastest(arguments.get("accelerator", "auto"))
    chosen = build(config.get("callbacks") or {}, "callbacks", FIT_KEYS["callbacks"])
    callbacks = [item for item in chosen.values() if item is not None]
    shows_progress = any(isinstance(item, ProgressBar) for item in callbacks)
    if not shows_progress and arguments.get("enable_progress_bar", True) is not False:
        callbacks.append(loggers.RunProgressBar())
    if not any(isinstance(item, Checkpoints) for item in callbacks):
        callbacks.append(Checkpoints())
    callbacks += further
    try:
        trainer = Trainer(
            **arguments,
            callbacks=callbacks,
            logger=opened or False,
            plugins=[*(arguments.pop("plugins", None) or []), VerifiedCheckpointIO()],
            default_root_dir=run_dir,
            use_distributed_sampler=False,
        )
    except (ValueError, MisconfigurationException, ImportError) as error:
        raise ConfigError([f"trainer: {error}"]) from error
    # Signals are `align.interrupt`'s. Lightning's handler would talk to other ranks in the middle of whatever they do.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def memory_plan(module: LightningModule, data: LightningDataModule, trainer: Trainer) -> memory.Plan | None:
    """What the run will need, where that is of interest and can be known."""
    if not isinstance(module, AlignModule) or sum(p.numel() for p in module.parameters()) < WORTH_A_PLAN:
        return None
    try:
        setting = memory.setting_of(
            module,
            data,
            ranks=trainer.world_size,
            strategy=trainer.strategy,
            precision=str(trainer.precision),
            gpu=trainer.strategy.root_device.type == "cuda",
        )
        return memory.plan(module, setting)
    # A model that runs on real tensors only, or not without its other blocks.
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        _say(f"memory plan: not known, {type(error).__name__}: {str(error).splitlines()[0]}")
        return None


class _Begins(Callback):
    """Tells the run folder that training begins: all objects are built and all data is read."""

    def __init__(self, folder: cli.RunFolder) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.begun()


def export(module: LightningModule, folder: Path) -> None:
    """Writes the trained model as a Hugging Face folder, whole or not at all."""
    if not distributed.is_first():
        if sharding.is_sharded(module):
            module.export(folder)  # type: ignore[operator]  # which sends the first rank what it lacks
        return
    with folder_written_whole(folder) as fresh:
        module.export(fresh)  # type: ignore[operator]


@contextlib.contextmanager
def _of_this_model(checkpoint: Path | None) -> Iterator[None]:
    """Says in plain words that a checkpoint's weights do not fit the model."""
    try:
        yield
    except RuntimeError as error:
        if checkpoint is None or "loading state_dict" not in str(error):
            raise
        lines = str(error).splitlines()
        raise ConfigError(
            [f"{checkpoint}: is not of this model: {lines[1].strip() if lines[1:] else lines[0]}"]
        ) from error


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keeps Lightning's notes and advertisements out of the output.

    What stays: its warnings, save those that do not help, and the notes of this package, such as how many examples the
    data dropped and why.
    """
    handlers = logging.getLogger("lightning.pytorch").handlers
    for handler in handlers:
        handler.addFilter(_is_worth_reading)
    try:
        with warnings.catch_warnings():
            for message in UNHELPFUL_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or Path(record.pathname).is_relative_to(Path(__file__).parent)


def _size(module: torch.nn.Module) -> str:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return f"{type(module).__name__} with {trained / 1e6:.2f} M trainable parameters"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _log(run_dir: Path) -> str:
    file = run_dir / "metrics.csv"
    return f", metrics in {file}" if file.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
