"""What SFT, reward model and PPO share: one Lightning batch is one optimizer step, however memory is saved.

Each `training_step` turns its batch into pieces (micro-batches) of loss, whose gradients add up before one clipped
optimizer step. Every piece is divided by counts of the whole batch, so the gradient does not depend on how the batch
was cut. Lightning's own accumulation cannot do this, as the number of pieces varies; hence manual optimisation.

With several ranks each has a part of the batch: counts are those of all parts (`distributed.total`), and gradients are
added up once a step, so the number of ranks changes nothing either.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align import distributed, interrupt, nonfinite, seeds
from align.errors import RunError
from align.formulas.losses import cross_entropy
from align.models import compiled, flash, forward, packed, sharding, trials
from align.models.load import fingerprint, save_model
from align.optim import Optim
from align.types import AnyRecord, Sequences, sent

Stats = dict[str, Tensor]


class AlignModule(L.LightningModule, ABC):
    """A training objective. Subclasses say which networks learn, and what a batch's pieces of loss are.

    To write a new objective: subclass, implement `networks`, `exported` and a `training_step` that calls `accumulate`,
    `step` and `report`, and name the class under `module._target_` in a YAML. Batches come in host memory: a
    micro-batch is `sent` to `self.device` when its turn comes, so that nothing about shapes is asked of a GPU.

    Args:
        tokenizer: Saved with the exported model.
        optim: Optimizer and schedule.
        micro_batch_tokens: The most tokens, padding included, computed at once. Memory only: results differ by
            rounding.
        seed: Of everything this module draws.
        compile: Compiles every transformer block (torch.compile) for learning and scoring, and for writing where its
            steps are recorded on a GPU.
            Results differ by rounding, dropout draws other numbers, and compiling takes a minute or more. Scoring and
            learning are compiled apart, so PPO's first ratio may be off 1 by rounding; on a CPU in float32 it was 1.
        pack: The sequences of a micro-batch lie end to end, so that next to no padding is computed, where a model
            allows it and its blocks are not compiled, but for a GPU in 16 bits. False: each is filled up to the
            longest, and writing is not recorded. Results differ by rounding.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        optim: Optim,
        micro_batch_tokens: int = 8192,
        seed: int = 0,
        compile: bool = False,
        pack: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.optim = optim
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.compiles = compile
        self.pack = pack
        self._clock = time.perf_counter()
        self.batch_at_hand: Any = None
        self.nonfinite_steps = 0
        self._frozen: dict[str, str] | None = None

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """What is wrong with these constructor arguments, in words."""
        budget = arguments.get("micro_batch_tokens")
        if isinstance(budget, int) and budget < 1:
            return [f"micro_batch_tokens: got {budget}, expected at least 1"]
        return []

    @abstractmethod
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks that learn, by name. What two of them hold is the later one's."""

    @abstractmethod
    def exported(self) -> nn.Module:
        """The model that `export` writes."""

    def learning_rates(self) -> Mapping[str, float]:
        """Peak learning rates of networks that do not use `optim.lr`."""
        return {}

    def configure_model(self) -> None:
        """Lets a strategy that shards weights do so. Called by Lightning on every rank before weights are restored."""
        if not self.pack:
            packed.padded.update(sharding.models_of(self))
        if self.compiles:
            models = sharding.models_of(self)
            with self.precision():
                ragged = all(flash.suits(self.trainer.strategy.root_device, model) for model in models)
            compiled.compile_blocks(models, ragged=ragged)
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is not None:
            shard(self)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves it in host memory: what of it is computed at once is `sent` when its turn comes."""
        return batch

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer for all networks: with several, `global_step` would count each one's steps."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("trainer: has no last step, which the schedule must know; set max_epochs or max_steps")
        optimizer, schedule = self.optim.build(self.networks(), steps=int(steps), lrs=self.learning_rates())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def micro_batches(self, lengths: Int[Tensor, " batch"], *models: PreTrainedModel) -> list[Int[Tensor, " picked"]]:
        """Which rows of a batch, of sequences so long, these models compute at once; see `packed.micro_batches`."""
        return trials.micro_batches(lengths, self.micro_batch_tokens, self.device, *models)

    def parts(self, batch: AnyRecord, groups: Sequence[Int[Tensor, " _"]]) -> Iterator[AnyRecord]:
        """The groups of a batch's rows, one after another.

        Where weights are sharded every rank must compute equally many, so those with fewer groups than others compute
        some that do not count.

        Args:
            batch: This rank's part of it.
            groups: See `micro_batches`.
        """
        missing = 0
        if any(sharding.is_sharded(network) for network in self.networks().values()):
            missing = int(distributed.largest(torch.tensor(len(groups)))) - len(groups)
        for group in groups:
            yield batch.rows_at(group)
        for _ in range(missing):
            yield batch.rows_at(groups[-1][-1:]).uncounted()  # type: ignore[attr-defined]

    def text_losses(self, model: PreTrainedModel, text: Sequences) -> Iterator[Float[Tensor, ""]]:
        """The mean cross-entropy of the tokens that text marks for learning, in micro-batches that add up to it."""
        count = distributed.total(text.mask.sum())
        for part in self.parts(text, self.micro_batches(text.lengths, model)):
            ids, mask = forward.fitted(part.ids, part.lengths), forward.fitted(part.mask, part.lengths)
            logprobs = forward.token_logprobs(model, sent(ids, self.device), mask)
            yield cross_entropy(logprobs, torch.ones_like(logprobs, dtype=torch.bool), count)

    def accumulate(self, pieces: Iterable[tuple[Tensor, Stats]]) -> Stats:
        """Adds the gradient of every piece to what is there.

        Args:
            pieces: Loss and statistics of each micro-batch of this rank's part, already divided by the whole batch's
                counts. A generator keeps one graph in memory at a time.

        Returns:
            The batch's statistics: sums over pieces and ranks, or maxima where a name ends in "max".
        """
        found: Stats = {}
        with (
            interrupt.interruptible(self.may_be_dropped()),
            seeds.forked(self.seed, "dropout", self.global_step, self.global_rank),
        ):
            for loss, stats in pieces:
                self.manual_backward(loss)
                for name, value in stats.items():
                    so_far = found.get(name)
                    found[name] = (value if so_far is None else _join(name, so_far, value)).detach()
        return distributed.totals(found)

    def may_be_dropped(self) -> bool:
        """Whether a signal may end the run within this step, which is then done again.

        Not where other ranks wait for this one, nor in the first step of a later epoch, before which Lightning has no
        state to go back to.
        """
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return self.trainer.world_size == 1 and (done > 0 or self.global_step == 0)

    def step(self) -> Stats:
        """Adds up the ranks' gradients, clips each network's on its own, steps optimizer and schedule.

        A gradient that is not finite changes no weight: the step is counted and leaves everything as it was.

        Returns:
            Norms before clipping and learning rates, by network.

        Raises:
            RunError: That was so for `optim.max_nonfinite` steps in a row.
        """
        optimizer = self.optimizers()
        stats: Stats = {}
        parameters: dict[str, list[nn.Parameter]] = {}
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            parameters.setdefault(group["name"], []).extend(group["params"])
            stats[f"lr/{group['name']}"] = torch.tensor(group["lr"])
        distributed.sum_gradients(p for own in parameters.values() for p in own)
        norms = {name: gradient_norm(own) for name, own in parameters.items()}
        finite = [norm.isfinite().to(self.device) for norm in norms.values()]  # where weights rest elsewhere, not there
        if bool(torch.stack(finite).all()):  # asked once, as a GPU is waited for
            self.nonfinite_steps = 0
            for name, own in parameters.items():
                scale_gradients(own, norms[name], self.optim.max_grad_norm or float("inf"))
        else:
            self._leave_out()
            optimizer.zero_grad()  # type: ignore[union-attr]  # parameters without gradient are not stepped
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.batch_at_hand = None
        return stats | {f"grad_norm/{name}": norm.detach() for name, norm in norms.items()}

    def _leave_out(self) -> None:
        """Says which tensor is to blame for a gradient that is not finite, and keeps the batch."""
        self.nonfinite_steps += 1
        own = nonfinite.first_bad(self.batch_at_hand, self.networks())
        saved = nonfinite.save_batch(Path(self.trainer.default_root_dir), self.global_step, self.batch_at_hand, own)
        found = [(bad, file) for bad, file in distributed.from_all((own, saved)) if bad is not None]
        bad, file = found[0] if found else (nonfinite.TOO_LARGE, saved)
        what = f"step {self.global_step}: the gradient is not finite; the first such tensor is {bad}. Batch: {file}"
        if self.nonfinite_steps >= self.optim.max_nonfinite:
            raise RunError(
                f"{what}. That was step {self.nonfinite_steps} of this kind in a row (module.optim.max_nonfinite); the "
                "same command continues from the last checkpoint, to the same place unless the cause is removed"
            )
        rank_zero_warn(f"{what}. The step is left out")

    def report(self, stats: Stats, *, tokens: int, bar: tuple[str, ...] = (), always: bool = False) -> None:
        """Logs a step's statistics, and how fast it was, as often as the trainer's `log_every_n_steps` says.

        Args:
            stats: By name, under which docs/metrics.md explains them.
            tokens: That this rank learned from in this step.
            bar: The names to show beside the progress bar.
            always: Logs this step whatever its number.
        """
        now, before = time.perf_counter(), self._clock
        self._clock = now
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if always or self.global_step % every == 0:
            speed = distributed.total(torch.tensor(tokens)) / (now - before)
            numbers = {name: float(value) for name, value in {**stats, "speed/tokens_per_second": speed}.items()}
            # Straight to them: `self.log` would repeat a rollout's numbers at every step until the next rollout.
            for logger in self.loggers:
                logger.log_metrics(numbers, step=self.global_step)
        self.log_dict(
            {name: value.float() for name, value in stats.items() if name in bar}, prog_bar=True, logger=False
        )

    def on_train_start(self) -> None:
        """Compiles blocks that shall be compiled, and starts the clock of `report`.

        Raises:
            ValueError: They cannot be compiled.
        """
        for network in self.networks().values() if self.compiles else ():
            for model in sharding.models_of(network):
                with self.precision(), seeds.forked(self.seed, "rehearsal"):
                    compiled.rehearse(model, self.device)
        self._clock = time.perf_counter()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """From here on the batch is taken from its loader but not yet learned: see `AlignData.state_dict`."""
        self.batch_at_hand = batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps how many steps in a row had no finite gradient, and of frozen weights, which are in the folders that
        the configuration names, only what tells them from others."""
        checkpoint["nonfinite_steps"] = self.nonfinite_steps
        checkpoint["frozen"] = self._frozen_fingerprints()
        weights, frozen = checkpoint["state_dict"], self._frozen_names()
        checkpoint["state_dict"] = {name: value for name, value in weights.items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`.

        Raises:
            ValueError: Frozen weights are not those the run began with, or the others are of another model.
        """
        self.nonfinite_steps = checkpoint["nonfinite_steps"]
        self.strict_loading = False  # of what is frozen, that is; all else is compared here
        known = checkpoint["frozen"]
        if differing := sorted((self.state_dict().keys() - self._frozen_names()) ^ checkpoint["state_dict"].keys()):
            raise ValueError(
                f"the checkpoint is not of this model: {differing[0]} is in only one of them; give the run the model "
                "it began with, or begin anew with overwrite=true"
            )
        changed = [name for name, found in self._frozen_fingerprints().items() if known.get(name) != found]
        if changed:
            raise ValueError(
                f"the frozen weights of the {' and the '.join(changed)} model are not those that the run began with; "
                "give it the same folders again, or begin anew with overwrite=true"
            )

    def _frozen_names(self) -> set[str]:
        """Of everything in models of which nothing learns, and of single weights that do not learn in others."""
        parameters = self.named_parameters(remove_duplicate=False)  # tied weights have several names
        found = {name for name, parameter in parameters if not parameter.requires_grad}
        for child, network in self.named_children():
            learns = [parameter.requires_grad for parameter in network.parameters()]
            if learns and not any(learns):
                found |= {f"{child}.{name}" for name in network.state_dict()}
        return found

    def _frozen_fingerprints(self) -> dict[str, str]:
        """Of each network's frozen weights, by its name."""
        if self._frozen is None:
            names, found = self._frozen_names(), {}
            for child, network in self.named_children():
                own = {name for name in network.state_dict() if f"{child}.{name}" in names}
                found |= {child: fingerprint(network, own)} if own else {}
            self._frozen = found
        return self._frozen

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """The trainer's arithmetic, for passes outside `training_step`: only that runs in it by itself."""
        return self.trainer.precision_plugin.train_step_context()

    def export(self, folder: str | Path) -> None:
        """Writes the trained model as a Hugging Face folder; an older folder is replaced only when all is written."""
        save_model(self.exported(), self.tokenizer, folder)  # type: ignore[arg-type]


def _join(name: str, so_far: Tensor, value: Tensor) -> Tensor:
    return torch.maximum(so_far, value) if name.endswith("max") else so_far + value


def gradient_norm(parameters: Iterable[nn.Parameter], *, summed: bool = True) -> Float[Tensor, ""]:
    """The norm of all gradients together.

    Args:
        parameters: With gradients.
        summed: The ranks' gradients have been added up; otherwise their sum is made for this, and forgotten.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not summed and distributed.world_size() > 1:
        # One whole gradient at a time: all of them once more would be as much memory as the weights.
        grads = [grad if isinstance(grad, DTensor) else distributed.total(grad).norm() for grad in grads]
    kinds = [[grad for grad in grads if isinstance(grad, DTensor) is sharded] for sharded in (False, True)]
    # Torch mixes no DTensors with others; a head beside a sharded trunk has both.
    norms = [distributed.whole_tensor(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


def scale_gradients(parameters: Iterable[nn.Parameter], norm: Float[Tensor, ""], largest: float) -> None:
    """Scales all gradients together down to a norm of at most `largest`, given that they have `norm` now."""
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)  # as torch's clip_grads_with_norm_, which mixes no DTensors
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.own_part(parameter.grad).mul_(factor)
