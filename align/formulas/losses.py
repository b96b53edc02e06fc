"""What the three stages minimise: cross-entropy (SFT, ptx), the ranking loss (reward model), PPO's two losses.

A loss here is the share of one micro-batch in the loss of the whole optimizer step: a *sum* over the micro-batch,
divided by a count of the whole step that the caller knows (over all micro-batches and ranks). Shares add up to the
step's loss, and so do their gradients and their `stats`, so the cut into micro-batches changes nothing but rounding.
Nothing here knows how the numbers were computed or what becomes of them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.formulas.masked import Scalar, masked_sum, masked_var, zero_outside
from align.formulas.returns import kl_k2, kl_k3

Stats = dict[str, Float[Tensor, ""]]
"""Detached shares, divided by the same count as the loss: add them up over micro-batches and ranks."""


def cross_entropy(
    logprobs: Float[Tensor, "*tokens"], mask: Bool[Tensor, "*tokens"], count: Scalar
) -> Float[Tensor, ""]:
    """−Σ mᵢ log pᵢ / count: the negative log-likelihood a token, of SFT (InstructGPT 3.5) and of the ptx term in Eq. 2.

    Args:
        logprobs: of the tokens that were written, in nats.
        mask: which of them the model is trained to predict.
        count: counted tokens of the whole optimizer step.
    """
    return -masked_sum(logprobs, mask) / count


@dataclass(frozen=True)
class Pairs:
    """Comparisons drawn from ranked completions, one entry a pair in each field."""

    winner: Int[Tensor, " pairs"]
    """Which completion of the batch was preferred."""
    loser: Int[Tensor, " pairs"]
    """Which completion it was preferred to."""
    prompt_index: Int[Tensor, " pairs"]
    """Which prompt of the batch both answer."""
    completions: Int[Tensor, " pairs"]
    """K, how many completions of that prompt were ranked, with those that tie."""


def preference_pairs(scores: Float[Tensor, " completions"], prompt_index: Int[Tensor, " completions"]) -> Pairs:
    """All pairs of completions of the same prompt that do not tie: C(K,2) a prompt, less its ties.

    Args:
        scores: the labeler's; higher is better, equal is a tie. Only compared, and only within a prompt.
        prompt_index: which prompt each completion answers.
    """
    same_prompt = prompt_index[:, None] == prompt_index[None, :]
    preferred = scores[:, None] > scores[None, :]
    winner, loser = (same_prompt & preferred).nonzero(as_tuple=True)
    return Pairs(winner, loser, prompt_index[winner], same_prompt.sum(1)[winner])


def compared_prompts(pairs: Pairs) -> Int[Tensor, ""]:
    """How many prompts have at least one pair. One whose completions all tie teaches nothing and does not count."""
    return (torch.bincount(pairs.prompt_index) > 0).sum()


def pair_weights_kept(pairs: Pairs, count: Scalar) -> Float[Tensor, " pairs"]:
    """1 / (pairs kept of the prompt · count): every prompt weighs the same, however many of its completions tie.

    Args:
        pairs: complete for each of their prompts.
        count: `compared_prompts` of the whole optimizer step.
    """
    kept = torch.bincount(pairs.prompt_index)[pairs.prompt_index]
    return 1.0 / (kept * count)


def pair_weights_all(pairs: Pairs, count: Scalar) -> Float[Tensor, " pairs"]:
    """1 / (C(K,2) · count): Eq. 1 to the letter, where a prompt weighs less the more of its completions tie.

    Args:
        pairs: complete for each of their prompts.
        count: `compared_prompts` of the whole optimizer step.
    """
    possible = pairs.completions * (pairs.completions - 1) / 2
    return 1.0 / (possible * count)


def ranking_loss(
    rewards: Float[Tensor, " completions"], pairs: Pairs, weights: Float[Tensor, " pairs"]
) -> Float[Tensor, ""]:
    """−Σ weight · log σ(r_winner − r_loser): Eq. 1 of InstructGPT, the mean over a prompt's pairs, then over prompts.

    Args:
        rewards: the reward model's, one a completion.
        pairs: which completion was preferred to which.
        weights: `pair_weights_kept` or `pair_weights_all`.
    """
    return -(weights * logsigmoid(rewards[pairs.winner] - rewards[pairs.loser])).sum()


def reward_bias(demonstration_rewards: Float[Tensor, " demonstrations"]) -> Float[Tensor, ""]:
    """The constant to subtract from rewards so that labeler demonstrations have mean 0 (InstructGPT 3.5)."""
    return demonstration_rewards.mean()


def entropy(logits: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens"]:
    """H = −Σ p log p over the vocabulary, in nats, with p = softmax(logits) and 0 log 0 = 0."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def policy_loss(
    logprobs: Float[Tensor, "*tokens"],
    old_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    clip: float | int,
    count: Scalar,
) -> tuple[Float[Tensor, ""], Stats]:
    """Σ mᵢ max(−Aᵢ ρᵢ, −Aᵢ clip(ρᵢ, 1 − ε, 1 + ε)) / count with ρ = π/π_old.

    The clipped surrogate of PPO, arXiv:1707.06347, Eq. 7, with the sign turned to minimise.

    Args:
        logprobs: log π of each token under the policy that learns.
        old_logprobs: log π_old of the same tokens, fixed since the rollout.
        advantages: A, usually whitened.
        mask: which tokens count.
        clip: ε, 0.2 in InstructGPT (C.4).
        count: counted tokens of the whole optimizer step.

    Returns:
        The loss, and as means over tokens: `approx_kl` ½ (log ρ)², `approx_kl_k3` (ρ − 1) − log ρ, both of
        KL(π_old‖π); `clip_fraction`, tokens where the clipped term is the larger one; `ratio`, ρ itself.
    """
    ratio = zero_outside(logprobs - old_logprobs, mask).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    with torch.no_grad():
        stats = {
            "approx_kl": masked_sum(kl_k2(old_logprobs, logprobs), mask) / count,
            "approx_kl_k3": masked_sum(kl_k3(old_logprobs, logprobs), mask) / count,
            "clip_fraction": masked_sum((clipped > plain).to(ratio.dtype), mask) / count,
            "ratio": masked_sum(ratio, mask) / count,
        }
    return masked_sum(torch.maximum(plain, clipped), mask) / count, stats


def ratio_max(
    logprobs: Float[Tensor, "*tokens"], old_logprobs: Float[Tensor, "*tokens"], mask: Bool[Tensor, "*tokens"]
) -> Float[Tensor, ""]:
    """The largest π/π_old of a counted token, detached; 0 if nothing counts. Combine micro-batches by their maximum."""
    log_ratio = (logprobs - old_logprobs).detach()
    return torch.where(mask, log_ratio, torch.full_like(log_ratio, -torch.inf)).exp().max()


def value_loss(
    values: Float[Tensor, "*tokens"],
    returns: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    count: Scalar,
) -> tuple[Float[Tensor, ""], Stats]:
    """½ Σ mᵢ (Vᵢ − Rᵢ)² / count, with nothing to report beside it.

    Args:
        values: V of each token from the value function that learns.
        returns: R, fixed since the rollout.
        mask: which tokens count.
        count: counted tokens of the whole optimizer step.
    """
    return 0.5 * zero_outside(values - returns, mask).square().sum() / count, {}


def clipped_value_loss(
    values: Float[Tensor, "*tokens"],
    old_values: Float[Tensor, "*tokens"],
    returns: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    clip: float | int,
    count: Scalar,
) -> tuple[Float[Tensor, ""], Stats]:
    """½ Σ mᵢ max((Vᵢ − Rᵢ)², (clip(Vᵢ, V_old,ᵢ ± ε) − Rᵢ)²) / count.

    `vf_loss` of `lm_human_preferences/train_policy.py` in openai/lm-human-preferences @cbfd210; InstructGPT does not
    say whether it clips values.

    Args:
        values: V of each token from the value function that learns.
        old_values: V at the time of the rollout.
        returns: R, fixed since the rollout.
        mask: which tokens count.
        clip: ε, in units of reward.
        count: counted tokens of the whole optimizer step.

    Returns:
        The loss, and `value_clip_fraction`, the share of tokens where the clipped error is the larger one.
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    plain = zero_outside(values - returns, mask).square()
    clipped = zero_outside(near - returns, mask).square()
    stats = {"clip_fraction": (clipped > plain).to(plain.dtype).sum() / count}
    return 0.5 * torch.maximum(plain, clipped).sum() / count, stats


def explained_variance(
    values: Float[Tensor, "*tokens"], returns: Float[Tensor, "*tokens"], mask: Bool[Tensor, "*tokens"]
) -> Float[Tensor, ""]:
    """1 − var(R − V) / var(R) over counted tokens: 1 is perfect, 0 no better than a constant.

    NaN or −∞ where R is constant. Not a share: compute it over the whole rollout at once.
    """
    return 1.0 - masked_var(returns - values, mask) / masked_var(returns, mask)
