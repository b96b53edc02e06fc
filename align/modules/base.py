"""What SFT, reward model and PPO share: one Lightning batch is one optimizer step, however memory is saved.

Each `training_step` turns its batch into pieces (micro-batches) of loss, whose gradients add up before one clipped
optimizer step. Every piece is divided by counts of the whole batch, so the gradient does not depend on how the batch
was cut. Lightning's own accumulation cannot do this, as the number of pieces varies; hence manual optimisation.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align import seeds
from align.models.load import save_model
from align.optim import Optim

Stats = dict[str, Tensor]


class AlignModule(L.LightningModule):
    """A training objective. Subclasses say which networks learn, and what a batch's pieces of loss are.

    To write a new objective: subclass, implement `networks`, `exported` and a `training_step` that calls `accumulate`,
    `step` and `report`, and name the class under `module._target_` in a YAML.

    Args:
        tokenizer: Saved with the exported model.
        optim: Optimizer and schedule.
        micro_batch_tokens: The most tokens, padding included, computed at once. Memory only: results differ by
            rounding.
        seed: Of everything this module draws.
    """

    def __init__(
        self, *, tokenizer: PreTrainedTokenizerBase, optim: Optim, micro_batch_tokens: int = 8192, seed: int = 0
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.optim = optim
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self._clock = time.perf_counter()

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """What is wrong with these constructor arguments, in words."""
        budget = arguments.get("micro_batch_tokens")
        if isinstance(budget, int) and budget < 1:
            return [f"micro_batch_tokens: got {budget}, expected at least 1"]
        return []

    def networks(self) -> Mapping[str, nn.Module]:
        """The networks that learn, by name. Called once, when the optimizer is made."""
        raise NotImplementedError(f"{type(self).__name__} must say which networks learn")

    def exported(self) -> nn.Module:
        """The model that `export` writes. Called when training has ended."""
        raise NotImplementedError(f"{type(self).__name__} must say which model it exports")

    def learning_rates(self) -> Mapping[str, float]:
        """Peak learning rates of networks that do not use `optim.lr`."""
        return {}

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer for all networks: with several, `global_step` would count each one's steps."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("trainer: has no last step, which the schedule must know; set max_epochs or max_steps")
        optimizer, schedule = self.optim.build(self.networks(), steps=int(steps), lrs=self.learning_rates())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def accumulate(self, pieces: Iterable[tuple[Tensor, Stats]]) -> Stats:
        """Adds the gradient of every piece to what is there.

        Args:
            pieces: Loss and statistics of each micro-batch, already divided by the whole batch's counts. A generator
                keeps one graph in memory at a time.

        Returns:
            The batch's statistics: sums over pieces, or maxima where a name ends in "max".
        """
        totals: Stats = {}
        with seeds.forked(self.seed, "dropout", self.global_step, self.global_rank):
            for loss, stats in pieces:
                self.manual_backward(loss)
                for name, value in stats.items():
                    so_far = totals.get(name)
                    joined = value if so_far is None else _join(name, so_far, value)
                    totals[name] = joined.detach()
        return totals

    def step(self) -> Stats:
        """Clips each network's gradient on its own, steps optimizer and schedule, and empties the gradients.

        Returns:
            Norms before clipping and learning rates, by network.
        """
        optimizer = self.optimizers()
        stats: Stats = {}
        names = dict.fromkeys(group["name"] for group in optimizer.param_groups)  # type: ignore[union-attr]
        for name in names:
            groups = [group for group in optimizer.param_groups if group["name"] == name]  # type: ignore[union-attr]
            parameters = [p for group in groups for p in group["params"]]
            limit = self.optim.max_grad_norm or float("inf")
            stats[f"grad_norm/{name}"] = nn.utils.clip_grad_norm_(parameters, limit).detach()
            stats[f"lr/{name}"] = torch.tensor(groups[0]["lr"])
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        return stats

    def report(self, stats: Stats, *, tokens: int, bar: tuple[str, ...] = (), always: bool = False) -> None:
        """Logs a step's statistics, and how fast it was: those of every `log_every_n_steps`-th step, as the trainer says.

        Args:
            stats: By name, under which docs/metrics.md explains them.
            tokens: That the step learned from.
            bar: The names to show beside the progress bar.
            always: Logs this step whatever its number.
        """
        now = time.perf_counter()
        stats = {**stats, "speed/tokens_per_second": torch.tensor(tokens / (now - self._clock))}
        self._clock = now
        # Straight to the loggers: `self.log` would repeat a rollout's numbers at every step until the next rollout.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        for logger in self.loggers if always or self.global_step % every == 0 else ():
            logger.log_metrics({name: float(value) for name, value in stats.items()}, step=self.global_step)
        self.log_dict(
            {name: value.float() for name, value in stats.items() if name in bar}, prog_bar=True, logger=False
        )

    def on_train_start(self) -> None:
        """Starts the clock of `report`."""
        self._clock = time.perf_counter()

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """The trainer's arithmetic, for passes outside `training_step`: only that runs in it by itself."""
        return self.trainer.precision_plugin.train_step_context()

    def export(self, folder: str | Path) -> None:
        """Writes the trained model as a Hugging Face folder; an older folder is replaced only when all is written."""
        save_model(self.exported(), self.tokenizer, folder)  # type: ignore[arg-type]


def _join(name: str, so_far: Tensor, value: Tensor) -> Tensor:
    return torch.maximum(so_far, value) if name.endswith("max") else so_far + value
