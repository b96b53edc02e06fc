"""When checkpoints are saved and which are kept. How they are written: align/checkpoints.py."""

import copy
import os
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from align import checkpoints, interrupt
from align.interrupt import Interrupted
from align.metrics_file import MetricsFile


class Checkpoints(Checkpoint):
    """Saves the whole state of a run in `checkpoints/step-NNNNNNNNN`, so that it can be continued from there.

    Also saved: the state at the end of training, and at a signal that asks the run to end.

    Args:
        every_steps: Optimizer steps between checkpoints; null: not by steps.
        every_minutes: Minutes between checkpoints; null: not by time.
        keep: The newest checkpoints to keep, at least 1.
        monitor: A metric that the progress bar shows or validation logs, such as `valid/loss`: the checkpoint at which
            it was best is kept as well.
        mode: Whether a small ("min") or a large ("max") value of it is good.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = 10.0,
        keep: int = 2,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        arguments = {"every_steps": every_steps, "every_minutes": every_minutes, "keep": keep}
        if errors := self.config_errors(arguments):
            raise ValueError("; ".join(errors))
        self.every_steps, self.every_minutes, self.keep = every_steps, every_minutes, keep
        self.monitor, self.mode = monitor, mode
        self.best: dict[str, Any] = {}
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._wanted = False
        self._within_step = False
        self._loops: dict[str, Any] = {}

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """What is wrong with these constructor arguments, in words."""
        given = {name: arguments.get(name) for name in ("every_steps", "every_minutes", "keep")}
        return [
            f"{name}: got {value}, expected a positive number"
            for name, value in given.items()
            if isinstance(value, int | float) and not value > 0
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time counts from here, and signals are this package's: Lightning has just taken SIGTERM for itself."""
        interrupt.take_over()
        self._note_loops(trainer)
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time, or when a signal has come; this is called last, after all other callbacks.

        Where validation or the end of the epoch follows, that comes first: a run that continued from here would leave
        it out.
        """
        self._note_loops(trainer)
        self._wanted |= self._due(trainer)
        between = trainer.val_check_batch
        validates = trainer.enable_validation and isinstance(between, int) and (batch_idx + 1) % between == 0
        if not trainer.is_last_batch and not validates:
            self._save_if_wanted(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves also where the monitored metric is better than ever before."""
        if trainer.sanity_checking:
            return
        self._wanted |= self.monitor is not None and self._is_better(trainer)
        self._note_loops(trainer)
        if not trainer.is_last_batch:
            self._save_if_wanted(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See `on_train_batch_end`."""
        self._save_if_wanted(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last state, so that an export that fails costs no training."""
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves the state before the step that a signal cut short. One process: several would have to agree on it."""
        if isinstance(exception, Interrupted) and trainer.global_step != self._saved_step and trainer.world_size == 1:
            self._within_step = True
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Saves now, then removes what need not be kept. All ranks must call it."""
        folder = Path(trainer.default_root_dir) / checkpoints.FOLDER
        step = trainer.global_step
        if self.monitor is not None and self._is_better(trainer):
            self.best = {"step": step, "value": float(trainer.callback_metrics[self.monitor])}
        for logger in trainer.loggers:
            logger.save()
        self._saved_at, self._saved_step, self._wanted = time.monotonic(), step, False
        trainer.save_checkpoint(checkpoints.step_folder(folder, step))
        if trainer.is_global_zero:
            kept = {path.name for path in checkpoints.found(folder)[: self.keep]}
            for path in checkpoints.found(folder):
                if path.name not in kept and checkpoints.step_of(path) != self.best.get("step"):
                    trainer.strategy.remove_checkpoint(path)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes how much of the files that only ever grow belongs to this state."""
        rows = [logger.rows for logger in trainer.loggers if isinstance(logger, MetricsFile)]
        checkpoint["metrics_rows"] = rows[0] if rows else 0
        checkpoint["table_bytes"] = {path.name: path.stat().st_size for path in _tables(trainer)}
        if self._within_step:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drops the rows of these files that will be written again."""
        self._saved_step = checkpoint["global_step"]
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.continue_from(checkpoint["metrics_rows"])
        for path in _tables(trainer):
            os.truncate(path, min(path.stat().st_size, checkpoint["table_bytes"].get(path.name, 0)))

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and the step it was reached at."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.best = state_dict["best"]

    def _save_if_wanted(self, trainer: L.Trainer) -> None:
        stopping = trainer.strategy.reduce_boolean_decision(interrupt.received() is not None, all=False)
        if stopping or self._wanted:
            self.save(trainer)
        if stopping:
            raise Interrupted(interrupt.received() or "another rank's signal")

    def _note_loops(self, trainer: L.Trainer) -> None:
        """Keeps Lightning's counters as they are where a run can be continued from.

        Within a step they are in between, and Lightning cannot go back to the end of the step before.
        """
        self._loops = copy.deepcopy(trainer.fit_loop.state_dict())

    def _due(self, trainer: L.Trainer) -> bool:
        if self.every_steps is not None and trainer.global_step % self.every_steps == 0:
            return True
        late = self.every_minutes is not None and time.monotonic() - self._saved_at >= 60.0 * self.every_minutes
        return trainer.strategy.reduce_boolean_decision(late, all=False)

    def _is_better(self, trainer: L.Trainer) -> bool:
        """As the first rank sees it; all must ask."""
        return trainer.strategy.broadcast(self._seems_better(trainer))

    def _seems_better(self, trainer: L.Trainer) -> bool:
        if self.monitor not in trainer.callback_metrics:
            return False
        value = float(trainer.callback_metrics[self.monitor])
        if not self.best:
            return value == value  # not a NaN
        return value < self.best["value"] if self.mode == "min" else value > self.best["value"]


def _tables(trainer: L.Trainer) -> list[Path]:
    return sorted(Path(trainer.default_root_dir).glob("*.jsonl"))
