"""The passes that turn completions into numbers for PPO: log-probabilities, reference, values, reward.

Each is made in the micro-batches in which the update will see the same episodes, through the same functions, so the
first minibatch's ratio π/π_old is exactly 1 and the KL to an equal reference exactly 0.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from align.models import forward
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
    reference: PreTrainedModel,
    value: ScalarModel,
    temperature: float,
    minibatch: int,
    micro_batch_tokens: int,
) -> TokenPasses:
    """Policy, reference and value network over every episode.

    Args:
        completions: The episodes, in the order in which minibatches will be cut from them.
        policy: π_old.
        reference: π_ref.
        value: V.
        temperature: The one the responses were sampled at.
        minibatch: Episodes in a minibatch.
        micro_batch_tokens: See `AlignModule`.
    """
    mask = completions.mask
    out = {name: torch.zeros(mask.shape, device=mask.device) for name in ("logp", "entropy", "ref", "value")}
    for rows in torch.arange(len(mask)).split(minibatch):
        for group in forward.micro_batches(completions.lengths[rows], micro_batch_tokens):
            picked = rows[group]
            ids, scored = response_tokens(completions.rows_at(picked))
            logp, entropy = forward.token_logprobs_and_entropies(policy, ids, scored, temperature)
            flat = {
                "logp": logp,
                "entropy": entropy,
                "ref": forward.token_logprobs(reference, ids, scored, temperature),
                "value": forward.token_values(value, ids, scored),
            }
            for name, values in flat.items():
                out[name][picked] = forward.by_response(values, mask[picked])
    return TokenPasses(out["logp"], out["entropy"], out["ref"], out["value"])


def reward_scores(reward: ScalarModel, completions: Completions, micro_batch_tokens: int) -> Float[Tensor, " batch"]:
    """The reward model's score of each whole response, EOS included."""
    scores = torch.zeros(len(completions.ids), device=completions.ids.device)
    for group in forward.micro_batches(completions.lengths, micro_batch_tokens):
        part = completions.rows_at(group)
        scores[group] = forward.final_scores(reward, forward.fitted(part.ids, part.lengths), part.lengths)
    return scores


def response_tokens(part: Completions) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Ids without common padding, and where the response tokens are: what every pass over a micro-batch takes."""
    return forward.fitted(part.ids, part.lengths), forward.fitted(part.token_mask, part.lengths)
