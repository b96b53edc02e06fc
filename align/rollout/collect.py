"""The passes that turn completions into numbers for PPO: log-probabilities, reference, values, reward.

Each is made in the micro-batches in which the update will see the same episodes, through the same functions, so the
first minibatch's ratio π/π_old is exactly 1 and the KL to an equal reference exactly 0.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models import adapters, forward, sharding
from align.models.heads import ScalarModel
from align.types import Completions, Record


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
    """
    mask = completions.mask
    rows = torch.arange(len(mask)).split(minibatch)
    groups = [
        own[group] for own in rows for group in forward.micro_batches(completions.lengths[own], micro_batch_tokens)
    ]

    other = policy if reference is None else reference

    def over_all(
        model: nn.Module, function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], *later: nn.Module
    ) -> list[Tensor]:
        """The function's values of every episode, by response; a sharded model stays whole until its last pass."""
        found: list[Tensor] = []
        with sharding.gathered(model):
            for picked in groups:
                values = function(*response_tokens(completions.rows_at(picked)))
                found = found or [torch.zeros(mask.shape, device=mask.device) for _ in values]
                for out, flat in zip(found, values, strict=True):
                    out[picked] = forward.by_response(flat, mask[picked])
        if all(model is not one for one in later):
            sharding.free(model)  # also where the caller has gathered it
        return found

    logprobs, entropies = over_all(
        policy,
        lambda ids, scored: forward.token_logprobs_and_entropies(policy, ids, scored, temperature),
        other,
        value.hf,
    )
    with adapters.using(policy, None) if reference is None else contextlib.nullcontext():
        (ref_logprobs,) = over_all(
            other, lambda ids, scored: (forward.token_logprobs(other, ids, scored, temperature),), value.hf
        )
    with value.in_use():
        (values,) = over_all(value.hf, lambda ids, scored: (forward.token_values(value, ids, scored),))
    return TokenPasses(logprobs, entropies, ref_logprobs, values)


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
