"""Experience for PPO, as data: a loader of minibatches that asks for a new rollout whenever the last one is used up.

Knows prompts, order and position. What a rollout is made of is the module's business (`collect`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align import seeds
from align.data.base import Encoded, filler, sequences
from align.data.loader import stream
from align.data.prompts import PromptData
from align.data.sources import Source
from align.data.text import encode_texts, too_short
from align.types import Minibatch, Prompts, Rollout, Sequences, named_tensors

Collect = Callable[[Prompts, int, int], Rollout]
"""(this rank's prompts, iteration, this rank's episodes in a minibatch) -> the whole rollout, of all ranks.

Rank r of n has the episodes r, r + n, r + 2n, ...
"""


class ExperienceData(PromptData):
    """Prompts to collect rollouts from, and pretraining text for PPO-ptx; training batches are `Minibatch`.

    The whole run is one epoch of the Trainer (`max_epochs: 1`), with one batch for each optimizer step. Sizes count all
    ranks together. Validation batches are `Prompts`.

    Args:
        tokenizer: Must have an EOS token.
        train: Examples whose prompts are answered; used again and again, shuffled anew each time.
        episodes: Responses of the whole run.
        rollout_batch: Episodes collected before the policy is updated.
        minibatch: Episodes of one optimizer step.
        epochs: How often each episode is learned from.
        max_prompt_tokens: Longer prompts are dropped.
        pretraining: Texts of the pretraining term of PPO-ptx, as `{text}`.
        pretraining_batch: Texts of one optimizer step, 0 for none; InstructGPT takes 8 an episode.
        max_pretraining_tokens: Length of the longest text, in tokens; longer ones are cut into several.
        seed: Decides the order of prompts, minibatches and texts.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        train: Source,
        episodes: int,
        rollout_batch: int,
        minibatch: int,
        epochs: int = 1,
        max_prompt_tokens: int,
        pretraining: Source | None = None,
        pretraining_batch: int = 0,
        max_pretraining_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.require(
            episodes=episodes,
            rollout_batch=rollout_batch,
            minibatch=minibatch,
            epochs=epochs,
            pretraining=pretraining,
            pretraining_batch=pretraining_batch,
            max_pretraining_tokens=max_pretraining_tokens,
        )
        super().__init__(
            tokenizer=tokenizer,
            train=train,
            batch_size=rollout_batch,
            max_prompt_tokens=max_prompt_tokens,
            seed=seed,
        )
        self.iterations = episodes // rollout_batch
        self.rollout_batch, self.minibatch, self.epochs = rollout_batch, minibatch, epochs
        self.pretraining_batch = pretraining_batch
        self.max_pretraining_tokens = max_pretraining_tokens
        if pretraining is not None and pretraining_batch > 0:
            self.sources["pretraining"] = pretraining

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """See `AlignData`; also finds sizes that do not divide."""
        errors = super().config_errors(arguments)
        if not errors:
            errors += _not_dividing(arguments, "episodes", "rollout_batch")
            errors += _not_dividing(arguments, "rollout_batch", "minibatch")
        count = arguments.get("pretraining_batch") or 0
        if count < 0:
            errors.append(f"pretraining_batch: got {count}, expected 0 (no pretraining term) or more")
        for name in ("pretraining", "max_pretraining_tokens"):
            if count > 0 and arguments.get(name) is None:
                errors.append(f"{name}: missing, but pretraining_batch is {count}; set it, or pretraining_batch to 0")
        return errors + too_short(arguments, "max_pretraining_tokens")

    def encode(self, examples: Sequence[dict[str, Any]], counts: "Counter[str]", split: str) -> list[Encoded]:
        """Examples -> the ids of their prompts, and the examples; texts -> all of them."""
        if split == "pretraining":
            assert self.max_pretraining_tokens is not None  # `config_errors` saw to it
            return encode_texts(self.tokenizer, examples, self.max_pretraining_tokens, counts)
        return super().encode(examples, counts, split)

    def make_train_loader(self) -> "ExperienceLoader":
        """Minibatches of experience, collected by the Trainer's module; resumable."""
        rank, world_size = self.ranks()
        return ExperienceLoader(
            collect=self._collect,
            prompts=self._prompts,
            prompt_count=len(self.encoded["train"]),
            texts=self._texts if self.pretraining_batch else None,
            text_count=len(self.encoded.get("pretraining", [])),
            iterations=self.iterations,
            rollout_batch=self.rollout_batch,
            minibatch=self.minibatch,
            epochs=self.epochs,
            pretraining_batch=self.pretraining_batch,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def _collect(self, prompts: Prompts, iteration: int, minibatch: int) -> Rollout:
        assert self.trainer is not None
        return self.trainer.lightning_module.collect(prompts, iteration, minibatch)  # type: ignore[operator]

    def _prompts(self, index: Int[Tensor, " picked"]) -> Prompts:
        return self.collate([self.encoded["train"][place] for place in index.tolist()])

    def _texts(self, index: Int[Tensor, " picked"]) -> Sequences:
        return sequences([self.encoded["pretraining"][place] for place in index.tolist()], filler(self.tokenizer))


class ExperienceLoader:
    """Yields the minibatches of a whole PPO run and collects a rollout whenever they run out.

    It must have a length: without one Lightning fetches a batch ahead, and each rollout would come from a policy that
    lacks the last update of the previous one. Everything it yields is a function of the step, the seed and the
    collected rollouts, so its checkpoint holds the step and, in the middle of a rollout, that rollout. Each rank keeps
    all of it and yields its part of every minibatch, so another number of ranks learns from the same episodes.

    Args:
        collect: Makes a rollout of prompts.
        prompts: Indices -> prompts.
        prompt_count: Number of different prompts.
        texts: Indices -> pretraining texts; None without the pretraining term.
        text_count: Number of different texts.
        iterations: Rollouts of the run.
        rollout_batch: Episodes of a rollout, all ranks together.
        minibatch: Episodes of an optimizer step, all ranks together.
        epochs: Passes over each rollout.
        pretraining_batch: Texts of an optimizer step, all ranks together.
        seed: Decides the order of prompts, minibatches and texts.
        rank: Which rank's part of all that to yield.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        *,
        collect: Collect,
        prompts: Callable[[Int[Tensor, " picked"]], Prompts],
        prompt_count: int,
        texts: Callable[[Int[Tensor, " picked"]], Sequences] | None,
        text_count: int,
        iterations: int,
        rollout_batch: int,
        minibatch: int,
        epochs: int,
        pretraining_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, size in (("minibatch", minibatch), ("pretraining_batch", pretraining_batch)):
            if size % world_size:
                raise ValueError(f"{name}={size} cannot be shared equally by {world_size} ranks; choose a multiple")
        self.collect, self.prompts, self.texts = collect, prompts, texts
        self.prompt_count, self.text_count = prompt_count, text_count
        self.iterations, self.rollout_batch, self.epochs = iterations, rollout_batch, epochs
        self.minibatch = minibatch
        self.pretraining_batch = pretraining_batch
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.steps_per_rollout = epochs * (rollout_batch // minibatch)
        self.step = 0
        self._rollout: Rollout | None = None
        self._saved: dict[str, Any] = {}

    def __len__(self) -> int:
        """Optimizer steps of the run."""
        return self.iterations * self.steps_per_rollout

    def __iter__(self) -> Iterator[Minibatch]:
        # A generator: nothing is collected before the first minibatch is asked for.
        if self.step >= len(self):
            raise ValueError(
                f"the run's {len(self)} optimizer steps are done and there is no second epoch of them; "
                "set trainer.max_epochs to 1, and raise episodes to train longer"
            )
        while self.step < len(self):
            yield self._next()

    def _next(self) -> Minibatch:
        iteration, cursor = divmod(self.step, self.steps_per_rollout)
        fresh = cursor == 0
        if fresh or self._rollout is None:
            self._rollout, self._saved = None, {}  # free the old one before the new one is made
            own, share = self._prompts_of(iteration, self.rank, self.world_size), self.minibatch // self.world_size
            self._rollout = self.collect(own, iteration, share)
        rollout, index = self._rollout, self._episodes(iteration, cursor)
        batch = Minibatch(
            episodes=rollout.rows_at(index),
            pretraining=self._pretraining(self.step),
            fresh=rollout if fresh else None,
            iteration=iteration,
            whole=rollout,
            index=index,
        )
        self.step += 1
        return batch

    def _prompts_of(self, iteration: int, rank: int = 0, world_size: int = 1) -> Prompts:
        start = iteration * self.rollout_batch
        index = stream(self.prompt_count, start, self.rollout_batch, self.seed, "prompts")
        places = range(start, start + self.rollout_batch)[rank::world_size]
        draws = seeds.derive_all(self.seed, "sample", places)
        return replace(self.prompts(index[rank::world_size]), seeds=draws)

    def _episodes(self, iteration: int, cursor: int) -> Int[Tensor, " picked"]:
        """This rank's episodes of a minibatch. The first epoch takes them as they were collected.

        Prompts come shuffled already, so that is a random split; and the first minibatch is computed in exactly the
        shapes its log-probs were, which makes the first ratio exactly 1.
        """
        epoch, place = divmod(cursor, self.steps_per_rollout // self.epochs)
        order = torch.arange(self.rollout_batch)
        if epoch > 0:
            step = iteration * self.epochs + epoch
            order = torch.randperm(self.rollout_batch, generator=seeds.generator(self.seed, "minibatches", step))
        return order[place * self.minibatch :][: self.minibatch][self.rank :: self.world_size]

    def _pretraining(self, step: int) -> Sequences | None:
        if self.texts is None:
            return None
        count = self.pretraining_batch
        index = stream(self.text_count, step * count, count, self.seed, "pretraining")
        return self.texts(index[self.rank :: self.world_size])

    def state_dict(self, back: int = 0) -> dict[str, Any]:
        """Optimizer steps begun, and the rollout where it is needed again; tensors and numbers only.

        Asked twice at the same step it gives the same tensors, which `torch.save` writes once.

        Args:
            back: How many of the last steps begun do not count, 0 or 1.
        """
        step = self.step - back
        if self._saved.get("step") == step:
            return self._saved
        needed = self._rollout is not None and step % self.steps_per_rollout != 0
        kept = {name: tensor.cpu() for name, tensor in named_tensors(self._rollout)} if needed else {}
        self._saved = {"step": step, "rollout": kept}
        return self._saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues behind the last step begun."""
        self.step = state["step"]
        self._rollout = None
        if state["rollout"]:
            rows = self._prompts_of(self.step // self.steps_per_rollout).rows
            self._rollout = _record(Rollout, state["rollout"], rows)


def _not_dividing(arguments: dict[str, Any], whole: str, part: str) -> list[str]:
    size, unit = arguments.get(whole), arguments.get(part)
    if not isinstance(size, int) or not isinstance(unit, int) or size % unit == 0:
        return []
    near = sorted({max(1, size // unit) * unit, (size // unit + 1) * unit})
    return [f"{whole}: got {size}, expected a multiple of {part}={unit}, such as {' or '.join(map(str, near))}"]


def _record(kind: Any, tensors: dict[str, Tensor], rows: tuple[dict[str, Any], ...], prefix: str = "") -> Any:
    """The inverse of `named_tensors`; `rows` fills the field of that name, which is not saved."""
    values: dict[str, Any] = {}
    for item in fields(kind):
        if item.name == "rows":
            values[item.name] = rows
        elif is_dataclass(item.type):
            values[item.name] = _record(item.type, tensors, rows, f"{prefix}{item.name}.")
        else:
            optional = item.default is None
            values[item.name] = tensors.get(prefix + item.name) if optional else tensors[prefix + item.name]
    return kind(**values)
