"""What a run tells while it trains: metrics.csv, Weights & Biases, and a progress bar for terminals and for log files.

Knows Lightning's loggers and bars; what the numbers mean is the modules' business (docs/metrics.md).
"""

import contextlib
import inspect
import netrc
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger, WandbLogger

from align import distributed
from align.atomic import write_text
from align.metrics_file import MetricsFile

DEFAULTS: Mapping[str, Any] = {"csv": True, "wandb": {"project": "align"}}
"""The `loggers` of a run that does not say otherwise."""

WANDB_ID = "wandb-id.txt"
"""In the run's folder: which W&B run it is."""

SECONDS_BETWEEN_LINES = 15.0
"""Of progress, where the output is not a terminal."""


def wandb_settings() -> set[str]:
    """The keys that `loggers.wandb` may have: those of `wandb.init`, less what the run folder decides."""
    import wandb  # takes a second

    return set(inspect.signature(wandb.init).parameters) - {"dir", "config"}


@contextlib.contextmanager
def opened(choice: Mapping[str, Any], run_dir: Path, config: dict[str, Any]) -> Iterator[list[Logger]]:
    """The loggers of a run, closed when the block ends, however it ends.

    Args:
        choice: The configuration's `loggers`, objects built: `csv` true or false, `wandb` false or keyword arguments of
            `wandb.init`, and any Lightning loggers under names of their own.
        run_dir: Takes metrics.csv and what W&B writes.
        config: Logged to W&B.
    """
    choice = {**DEFAULTS, **choice}
    settings, csv = choice.pop("wandb"), choice.pop("csv")
    loggers: list[Logger] = [MetricsFile(run_dir)] if csv else []
    loggers += [logger for logger in choice.values() if logger is not None]
    if not settings or not distributed.is_first():
        yield loggers
        return
    run = _start_wandb({} if settings is True else settings, run_dir, config)
    failed = True
    try:
        yield [*loggers, WandbLogger(experiment=run, save_dir=run_dir)]
        failed = False
    finally:
        _finish(run, failed)


LINE = "{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
"""Steps done and to do, time taken and left, steps a second, metrics."""


class RunProgressBar(TQDMProgressBar):
    """One bar over all optimizer steps of a run, with rate and time left; a line now and then if not on a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._tqdm = Tqdm if sys.stdout.isatty() else _Lines

    def init_train_tqdm(self) -> Tqdm:
        """A bar as long as the run; without an end where the trainer stops by time only."""
        steps = self.trainer.estimated_stepping_batches
        return self._tqdm(
            desc=self.train_description,
            initial=self.trainer.global_step,
            total=int(steps) if steps != float("inf") else None,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,  # the mean rate of the run: PPO alternates quick steps and slow rollouts
            miniters=1,
            unit="step",
        )

    def init_validation_tqdm(self) -> Tqdm:
        """A bar for terminals only: validation is short."""
        return super().init_validation_tqdm() if self._tqdm is Tqdm else Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Keeps the bar going and says which epoch it is."""
        last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        self.train_progress_bar.set_description_str(f"Epoch {trainer.current_epoch + 1}{last}", refresh=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar to the steps taken. Metrics are fetched only when shown, as that waits for the GPU."""
        bar = self.train_progress_bar
        if bar.disable:
            return
        if time.time() - bar.last_print_t >= bar.mininterval:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.update(trainer.global_step - bar.n)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the module logs with `prog_bar=True`, without the logger's version."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class _Lines(Tqdm):
    """Progress for files and pipes: whole lines, at most one in `SECONDS_BETWEEN_LINES`, and a last one."""

    def __init__(self, **arguments: Any) -> None:
        self._shown_at = float("-inf")
        self._shown_n = -1
        super().__init__(
            **arguments, bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm several times a second."""
        now = time.monotonic()
        due = now - self._shown_at >= SECONDS_BETWEEN_LINES or self.n == self.total
        if due and self.n != self._shown_n:
            self._shown_at, self._shown_n = now, self.n
            print(str(self), file=self.fp, flush=True)


def _start_wandb(settings: Mapping[str, Any], run_dir: Path, config: dict[str, Any]) -> Any:
    """A `wandb.Run` against optimizer steps; offline where W&B would otherwise stop and ask for a key."""
    import wandb
    from wandb.errors import UsageError

    arguments: dict[str, Any] = {**DEFAULTS["wandb"], "name": str(run_dir), **settings}
    if "mode" not in arguments and "WANDB_MODE" not in os.environ and not _has_wandb_key():
        arguments["mode"] = "offline"
    if arguments.get("mode", os.environ.get("WANDB_MODE")) in ("offline", "dryrun", "disabled"):
        arguments["settings"] = {"silent": True, **(arguments.get("settings") or {})}
    # A run that is continued keeps its identity, and so its page and its curves.
    identity = run_dir / WANDB_ID
    if "id" not in arguments and identity.exists():
        arguments |= {"id": identity.read_text(encoding="utf-8").strip(), "resume": "allow"}
    try:
        run = wandb.init(dir=run_dir, config=config, **arguments)
    except (ValueError, UsageError) as error:
        raise ValueError(f"loggers.wandb: W&B refuses its settings: {error}") from error
    write_text(identity, f"{run.id}\n")
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    names = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for name in names:
        try:
            if netrc.netrc(Path(name).expanduser()).authenticators(host):
                return True
        except (FileNotFoundError, PermissionError, netrc.NetrcParseError):
            continue
    return False


def _finish(run: Any, failed: bool) -> None:
    offline, folder = run.offline, Path(run.settings.sync_dir)
    run.finish(exit_code=int(failed))
    if offline and folder.is_dir():
        print(f"W&B ran offline; to upload this run: wandb sync {os.path.relpath(folder)}")
