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
from align.models import adapters, forward, sharding
from align.models.heads import ScalarModel
from align.models.hydra import Hydra
from align.models.trunk import one_pass
from align.types import Completions, Record, Rollout


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


def token_passes(
    completions: Completions,
    *,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    value: ScalarModel,
    temperature: float,
    minibatch: int,
    micro_batch_tokens: int,
    hydra: Hydra | None = None,
) -> TokenPasses:
    """Policy, reference and value network over every episode.

    Args:
        completions: The episodes, in the order in which minibatches will be cut from them.
        policy: π_old.
        reference: π_ref; None: the policy without its adapter.
        value: V.
        temperature: The one the responses were sampled at.
        minibatch: Episodes in a minibatch.
        micro_batch_tokens: See `AlignModule`.
        hydra: Which of them have frozen blocks in common, computed once.
    """
    own = torch.arange(completions.size).split(minibatch)
    groups = [
        rows[part] for rows in own for part in forward.micro_batches(completions.lengths[rows], micro_batch_tokens)
    ]
    over_all = functools.partial(_over_all, completions, groups)
    if hydra is not None and hydra.depth and reference is not None:
        every = functools.partial(_every_pass, hydra, policy, reference, value, temperature)
        logprobs, entropies, values, ref_logprobs = over_all(policy, every, needed=False)
        return TokenPasses(logprobs=logprobs, entropies=entropies, values=values, ref_logprobs=ref_logprobs)
    other = policy if reference is None else reference
    found: dict[str, Tensor] = {}
    together = one_pass(value)
    if together:
        found["logprobs"], found["entropies"], found["values"] = over_all(
            policy,
            lambda ids, scored: forward.token_logprobs_entropies_and_values(policy, value, ids, scored, temperature),
            needed=other is policy,
        )
    else:
        found["logprobs"], found["entropies"] = over_all(
            policy,
            lambda ids, scored: forward.token_logprobs_and_entropies(policy, ids, scored, temperature),
            needed=policy in (other, value.hf),
        )
    with adapters.using(policy, None) if reference is None else contextlib.nullcontext():
        (found["ref_logprobs"],) = over_all(
            other,
            lambda ids, scored: (forward.token_logprobs(other, ids, scored, temperature),),
            needed=other is value.hf and not together,
        )
    if not together:
        with value.in_use():
            (found["values"],) = over_all(
                value.hf, lambda ids, scored: (forward.token_values(value, ids, scored),), needed=False
            )
    return TokenPasses(**found)


def _every_pass(
    hydra: Hydra,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    value: ScalarModel,
    temperature: float,
    ids: Int[Tensor, "batch time"],
    scored: Bool[Tensor, "batch time"],
) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies, values and the reference's log-probabilities of a micro-batch."""
    states = hydra.below(ids)
    if one_pass(value):
        own = forward.token_logprobs_entropies_and_values(policy, value, ids, scored, temperature, states)
    else:
        own = (
            *forward.token_logprobs_and_entropies(policy, ids, scored, temperature, states),
            forward.token_values(value, ids, scored, hydra.given(value.hf, states)),
        )
    return *own, forward.token_logprobs(reference, ids, scored, temperature, hydra.given(reference, states))


def _over_all(
    completions: Completions,
    groups: Sequence[Int[Tensor, " _"]],
    model: nn.Module,
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    *,
    needed: bool,
) -> list[Float[Tensor, "batch response"]]:
    """The function's values of every episode, by response.

    Args:
        completions: The episodes.
        groups: Micro-batches of them.
        model: What computes; if it is sharded it is gathered once for all of them.
        function: (ids, where the response is) -> values of the response tokens, row after row.
        needed: It stays gathered if it was, for a later pass.
    """
    mask, found = completions.mask, []
    with sharding.gathered(model):
        for picked in groups:
            values = function(*response_tokens(completions.rows_at(picked)))
            found = found or [torch.zeros(mask.shape, device=mask.device) for _ in values]
            for out, flat in zip(found, values, strict=True):
                out[picked] = forward.by_response(flat, mask[picked])
    if not needed:
        sharding.free(model)  # also where the caller has gathered it
    return found


def reward_scores(reward: ScalarModel, completions: Completions, micro_batch_tokens: int) -> Float[Tensor, " batch"]:
    """The reward model's score of each whole response, EOS included."""
    scores = torch.zeros(len(completions.ids), device=completions.ids.device)
    with sharding.gathered(reward.hf), reward.in_use():
        for group in forward.micro_batches(completions.lengths, micro_batch_tokens):
            part = completions.rows_at(group)
            scores[group] = forward.final_scores(reward, forward.fitted(part.ids, part.lengths), part.lengths)
    return scores


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
