"""The passes that turn completions into numbers for PPO: log-probabilities, reference, values, reward.

Each is made in the micro-batches in which the update will see the same episodes, through the same functions, so the
first minibatch's ratio π/π_old is exactly 1 and the KL to an equal reference exactly 0.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.formulas.masked import masked_mean
from align.models import adapters, forward, sharding, trials
from align.models.heads import ScalarModel
from align.models.hydra import Below, Hydra, below
from align.models.packed import Packed
from align.models.trunk import one_pass
from align.types import Completions, Minibatch, Record, Rollout, sent


@dataclass(frozen=True)
class TokenPasses(Record):
    """What the models say of every response token; 0 outside the response."""

    logprobs: Float[Tensor, "batch response"]
    entropies: Float[Tensor, "batch response"]
    ref_logprobs: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"]


@dataclass(frozen=True)
class Scored(Record):
    """Completions with all that needs a model."""

    completions: Completions
    passes: TokenPasses
    scores: Float[Tensor, " batch"]
    """After the missing-EOS rule."""


Split = Callable[[Int[Tensor, " batch"]], list[Int[Tensor, " _"]]]
"""Lengths of sequences -> micro-batches: which of them."""

States = Callable[[Int[Tensor, " _"], int], Below]
"""(rows of a minibatch, width) -> what frozen blocks give for them."""


class FrozenStates:
    """What frozen blocks give for the episodes of a rollout, kept for as long as they are learned from.

    Args:
        hydra: Which networks go on from there.
        split: See `token_passes`.
    """

    def __init__(self, hydra: Hydra, split: Split) -> None:
        self.hydra, self.split = hydra, split
        self._ids: Tensor | None = None
        self._states: Below | None = None

    def of_rollout(self, completions: Completions, minibatch: int) -> Below | None:
        """Those of all episodes, in minibatches of this size; None where networks have no frozen blocks in common.

        They are computed where these are other episodes than last time. After a restart that is so, and happens in the
        same micro-batches.
        """
        if self.hydra.depth and (self._ids is None or not torch.equal(self._ids, completions.ids)):
            self.forget()  # before new ones are made
            self._states, self._ids = self._computed(completions, minibatch), completions.ids
        return self._states

    def of(self, batch: Minibatch, ranks: int) -> States | None:
        """Those of a minibatch. None where several ranks learn from all ranks' episodes: each computes again what
        others would have to send it."""
        if ranks > 1:
            self.forget()
        states = self.of_rollout(batch.whole.completions, len(batch.index)) if ranks == 1 else None
        return states and (lambda rows, width: states.rows_at(batch.index[rows], width))

    def at(
        self,
        rows: Int[Tensor, " batch"],
        ids: Int[Tensor, "batch time"],
        lengths: Int[Tensor, " batch"],
        known: States | None,
    ) -> Below | None:
        """Those of a micro-batch: some rows of what is known of its minibatch (`of`), or computed anew.

        Args:
            rows: Which of the minibatch.
            ids: Theirs, on the device that computes.
            lengths: Theirs.
            known: Of the minibatch.
        """
        if known is not None:
            return known(rows, ids.shape[1])
        return self.hydra.below(ids, _layout(self.hydra.policy, ids, lengths)) if self.hydra.depth else None

    def forget(self) -> None:
        """Frees what is kept."""
        self._ids = self._states = None

    def _computed(self, completions: Completions, minibatch: int) -> Below:
        policy, hidden = self.hydra.policy, None
        for picked in _groups(completions, minibatch, self.split):
            lengths, (ids, _) = completions.lengths[picked], response_tokens(completions.rows_at(picked))
            ids = sent(ids, policy.device)
            part = below(policy, ids, self.hydra.depth, _layout(policy, ids, lengths)).hidden
            hidden = part.new_zeros(*completions.ids.shape, part.shape[-1]) if hidden is None else hidden
            hidden[sent(picked, part.device), : ids.shape[1]] = part
        assert hidden is not None
        return Below(hidden, self.hydra.depth)


def _layout(policy: PreTrainedModel, ids: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"]) -> Packed | None:
    """How all passes over episodes lie: their last tokens tell nothing."""
    return forward.layout(policy, ids, lengths - 1)


def _groups(completions: Completions, minibatch: int, split: Split) -> list[Int[Tensor, " _"]]:
    """The micro-batches in which the first epoch of the update will see the episodes."""
    return [
        rows[part]
        for rows in torch.arange(completions.size).split(minibatch)
        for part in split(completions.lengths[rows])
    ]


def token_passes(
    completions: Completions,
    *,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    value: ScalarModel,
    temperature: float,
    minibatch: int,
    split: Split,
    hydra: Hydra,
    states: Below | None = None,
    device: torch.device,
) -> TokenPasses:
    """Policy, reference and value network over every episode.

    Args:
        completions: The episodes, in the order in which minibatches will be cut from them.
        policy: π_old.
        reference: π_ref; None: the policy without its adapter.
        value: V.
        temperature: The one the responses were sampled at.
        minibatch: Episodes in a minibatch.
        split: Micro-batches of sequences so long.
        hydra: Which of them have frozen blocks in common.
        states: What those blocks give for the episodes: `FrozenStates`.
        device: Where they compute.
    """
    groups = _groups(completions, minibatch, split)
    over_all = functools.partial(_over_all, completions, groups, states, device)
    other = policy if reference is None else reference
    found: dict[str, Tensor] = {}
    together = one_pass(value)
    if together:
        found["logprobs"], found["entropies"], found["values"] = over_all(
            policy,
            lambda ids, at, below: forward.token_logprobs_entropies_and_values(
                policy, value, ids, at, temperature, below
            ),
            needed=other is policy,
        )
    else:
        found["logprobs"], found["entropies"] = over_all(
            policy,
            lambda ids, at, below: forward.token_logprobs_and_entropies(policy, ids, at, temperature, below),
            needed=policy in (other, value.hf),
        )
    with adapters.using(policy, None) if reference is None else contextlib.nullcontext():
        (found["ref_logprobs"],) = over_all(
            other,
            lambda ids, at, below: (forward.token_logprobs(other, ids, at, temperature, hydra.given(other, below)),),
            needed=other is value.hf and not together,
        )
    if not together:
        with value.in_use():
            (found["values"],) = over_all(
                value.hf,
                lambda ids, at, below: (forward.token_values(value, ids, at, hydra.given(value.hf, below)),),
                needed=False,
            )
    return TokenPasses(**found)


def _over_all(
    completions: Completions,
    groups: Sequence[Int[Tensor, " _"]],
    states: Below | None,
    device: torch.device,
    model: nn.Module,
    function: Callable[[Tensor, Tensor, Below | None], tuple[Tensor, ...]],
    *,
    needed: bool,
) -> list[Float[Tensor, "batch response"]]:
    """The function's values of every episode, by response.

    Args:
        completions: The episodes.
        groups: Micro-batches of them.
        states: Of the frozen blocks, for every episode.
        device: Where it is computed.
        model: What computes; if it is sharded it is gathered once for all of them.
        function: (ids, where the response is, states) -> values of the response tokens, row after row.
        needed: It stays gathered if it was, for a later pass.
    """
    found = []
    with sharding.gathered(model):
        for picked in groups:
            ids, scored = response_tokens(completions.rows_at(picked))
            values = function(sent(ids, device), scored, states and states.rows_at(picked, ids.shape[1]))
            found.append(torch.stack(values))
    if not needed:
        sharding.free(model)  # also where the caller has gathered it
    mask = completions.mask[torch.cat([*groups])]
    return [forward.in_order(forward.by_response(flat, mask), groups) for flat in torch.cat(found, dim=1).cpu()]


def reward_scores(
    reward: ScalarModel, completions: Completions, micro_batch_tokens: int, device: torch.device
) -> Float[Tensor, " batch"]:
    """The reward model's score of each whole response, EOS included. Arguments: see `token_passes`, `AlignModule`."""
    found, groups = [], trials.micro_batches(completions.lengths, micro_batch_tokens, device, reward.hf)
    with sharding.gathered(reward.hf), reward.in_use():
        for part in (completions.rows_at(group) for group in groups):
            ids = forward.fitted(part.ids, part.lengths)
            found.append(forward.final_scores(reward, sent(ids, device), part.lengths))
    return forward.in_order(torch.cat(found).cpu(), groups)


def response_tokens(part: Completions) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Ids without common padding, and where the response tokens are: what every pass over a micro-batch takes."""
    return forward.fitted(part.ids, part.lengths), forward.fitted(part.token_mask, part.lengths)


def mismatch(rollout: Rollout) -> dict[str, Float[Tensor, ""]]:
    """How far the sampler's log-probabilities are from those of π_old that the update uses, in nats a token.

    Nothing if the sampler does not say what it sampled from.
    """
    sampled = rollout.completions.sampled_logprobs
    if sampled is None:
        return {}
    apart = ((sampled - rollout.logprobs) * rollout.mask).abs()
    return {"rollout/mismatch": masked_mean(apart, rollout.mask), "rollout/mismatch_max": apart.max()}
