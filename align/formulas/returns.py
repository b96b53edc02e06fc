"""From log-probs and scores to advantages: KL estimates, token rewards, the missing-EOS rules, GAE, adaptive β.

Runs once per rollout, before any gradient step. Tensors are (batch, response): one row a response, one column a
response token, and a row's counted tokens stand contiguously from column 0. Nothing here knows a model.

Symbols: π_old the policy that sampled (`logprobs`), π_ref the KL reference (`ref_logprobs`), β `kl_coef`,
V `values`, γ `gamma`, λ `lam`, T the last counted token of a row.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.formulas.masked import Scalar, zero_outside

MAX_KL_ERROR = 0.2
"""The relative error that adaptive β reacts to is clipped to ± this, as in Ziegler et al., arXiv:1909.08593, 2.2."""


def kl_k1(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """k1 = log π − log π_ref at tokens sampled from π: unbiased for KL(π‖π_ref), signed, and what the reward charges.

    Schulman, "Approximating KL divergence" (2020), joschu.net/blog/kl-approx.html, like k2 and k3 below.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """k2 = ½ (log π − log π_ref)² at tokens sampled from π: never negative, low variance, biased."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """k3 = (r − 1) − log r with r = π_ref/π at tokens sampled from π: never negative and unbiased; for logs."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(
    logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"],
    scores: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch response"],
    kl_coef: Scalar,
) -> Float[Tensor, "batch response"]:
    """r_t = −β (log π_old(a_t|s_t) − log π_ref(a_t|s_t)) + 1[t = T] · score; 0 outside the mask.

    Eq. 2 of InstructGPT (arXiv:2203.02155) for γ = 0, written per token as its section 3.5 says. The score lands on
    the last counted token itself, the EOS token where the response has one.

    Args:
        logprobs: log π_old of each response token, in nats, at the sampling temperature.
        ref_logprobs: log π_ref of the same tokens at the same temperature.
        scores: reward of each whole response. A response without a counted token gives its score to no token.
        mask: which tokens count.
        kl_coef: β, reward per nat.
    """
    penalty = kl_coef * zero_outside(kl_k1(logprobs, ref_logprobs), mask)
    follows = torch.nn.functional.pad(mask[:, 1:], (0, 1), value=False)
    last = mask & ~follows
    return zero_outside(scores[:, None].expand_as(logprobs), last) - penalty


def missing_eos_keep(
    scores: Float[Tensor, " batch"], finished: Bool[Tensor, " batch"], unused: Scalar
) -> Float[Tensor, " batch"]:
    """A response cut before its EOS token has the score that the reward model gave it."""
    return scores


def missing_eos_replace(
    scores: Float[Tensor, " batch"], finished: Bool[Tensor, " batch"], replacement: Scalar
) -> Float[Tensor, " batch"]:
    """A response cut before its EOS token scores `replacement`, whatever the reward model said.

    Replacement by −1 is the "EOS trick" of arXiv:2403.17031, detail 23, and `penalty_reward_value` of
    openai/lm-human-preferences @cbfd210; it takes rewards on a unit scale around 0 for granted.
    """
    return torch.where(finished, scores, replacement)


def missing_eos_subtract(
    scores: Float[Tensor, " batch"], finished: Bool[Tensor, " batch"], penalty: Scalar
) -> Float[Tensor, " batch"]:
    """A response cut before its EOS token loses `penalty` from its score, as TRL's `missing_eos_penalty` does."""
    return torch.where(finished, scores, scores - penalty)


MISSING_EOS = {"keep": missing_eos_keep, "replace": missing_eos_replace, "subtract": missing_eos_subtract}
"""The missing-EOS rules by name."""


def generalized_advantages(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    gamma: Scalar,
    lam: Scalar,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """Generalized advantage estimation, Schulman et al., arXiv:1506.02438, Eq. 16, for episodes that end at T.

        δ_t = r_t + γ V_{t+1} − V_t  with V_{T+1} = 0
        A_t = δ_t + γ λ A_{t+1}      with A_{T+1} = 0
        returns_t = A_t + V_t

    λ = 1 gives the Monte-Carlo return minus the value, λ = 0 the one-step error δ_t.

    Args:
        rewards: r_t, received for emitting token t.
        values: V_t, the value before token t is emitted.
        mask: which tokens count; contiguous from column 0 in each row. Other entries are never read.
        gamma: discount per token, 1 in InstructGPT.
        lam: 0.95 in the code that InstructGPT builds on; the paper does not say.

    Returns:
        Advantages and returns, both 0 outside the mask. Whitening the advantages afterwards leaves the returns alone.
    """
    rewards, values = zero_outside(rewards, mask), zero_outside(values, mask)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    errors = rewards + gamma * next_values - values
    advantage = torch.zeros_like(errors[:, 0])
    columns = []
    # Beyond T rewards and values are 0, so the recursion arrives at T with A_{T+1} = 0 without looking at the mask.
    for error in reversed(errors.unbind(1)):
        advantage = error + gamma * lam * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + values


def adaptive_kl(
    kl_coef: float | int, kl: float | int, *, target: float | int, horizon: float | int, batch: int
) -> float:
    """β ← β (1 + e · batch/horizon) with e = clip(KL/target − 1, −0.2, 0.2).

    Ziegler et al., arXiv:1909.08593, section 2.2. InstructGPT itself keeps β constant.

    Args:
        kl_coef: β so far.
        kl: mean over the batch of the KL summed over each sequence, in nats.
        target: the KL to steer to, in nats a sequence; 6 in that code.
        horizon: in episodes; 10,000 in that code. Larger reacts more slowly.
        batch: episodes collected since the last change.
    """
    error = min(max(kl / target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
    return kl_coef * (1.0 + error * batch / horizon)
