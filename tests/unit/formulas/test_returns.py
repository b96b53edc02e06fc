"""KL estimates, token rewards, EOS rules, GAE and adaptive β: worked examples and identities."""

import math

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from align.formulas.returns import (
    MISSING_EOS,
    adaptive_kl,
    generalized_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    missing_eos_keep,
    missing_eos_replace,
    missing_eos_subtract,
    token_rewards,
)

NAN = float("nan")
LOGPROBS = tensor([[-1.0, -0.5, -2.0, -0.1]])
REF_LOGPROBS = tensor([[-1.2, -0.4, -1.5, -0.1]])
REWARDS = tensor([[-0.004, 0.002, 0.010, 0.700]])
VALUES = tensor([[0.1, 0.2, 0.15, 0.4]])
WHOLE = torch.ones(1, 4, dtype=torch.bool)


def ragged() -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards and values of three responses of 5, 2 and 1 tokens, NaN outside, in float64."""
    mask = torch.arange(5) < tensor([[5], [2], [1]])
    rewards, values = torch.randn(2, 3, 5, dtype=torch.float64).masked_fill(~mask, NAN)
    return rewards, values, mask


def test_kl_estimates() -> None:
    # log π − log π_ref = ln 2, so π_ref/π = 1/2: k1 = ln 2, k2 = ½ (ln 2)², k3 = ½ − 1 + ln 2; and the other way round.
    logprobs, ref = tensor([-1.0, -1.0 - math.log(2)]), tensor([-1.0 - math.log(2), -1.0])
    ln2 = math.log(2)
    assert_close(kl_k1(logprobs, ref), tensor([ln2, -ln2]))
    assert_close(kl_k2(logprobs, ref), tensor([0.5 * ln2**2, 0.5 * ln2**2]))
    assert_close(kl_k3(logprobs, ref), tensor([ln2 - 0.5, 1.0 - ln2]))


def test_k1_and_k3_are_unbiased() -> None:
    """Weighted by π, both sum to the exact KL(π‖π_ref) over a vocabulary; k2 does not."""
    logprobs = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    ref = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    kl = torch.nn.functional.kl_div(ref, logprobs, log_target=True, reduction="sum")
    assert_close((logprobs.exp() * kl_k1(logprobs, ref)).sum(), kl)
    assert_close((logprobs.exp() * kl_k3(logprobs, ref)).sum(), kl)
    assert abs((logprobs.exp() * kl_k2(logprobs, ref)).sum() - kl) > 1e-3


def test_k3_is_exact_close_to_zero() -> None:
    # (r − 1) − log r is x²/2 + x³/6 with x = log r; computed as exp(x) − 1 in float32 rounding would be a tenth of it.
    assert_close(kl_k3(tensor([1e-3]), tensor([0.0])), tensor([5e-7 - 1e-9 / 6]), rtol=1e-3, atol=0)


def test_token_rewards() -> None:
    actual = token_rewards(LOGPROBS, REF_LOGPROBS, tensor([0.7]), WHOLE, 0.02)
    assert_close(actual, REWARDS, rtol=1e-5, atol=1e-7)
    assert_close(kl_k1(LOGPROBS, REF_LOGPROBS).sum(), tensor(-0.4))


def test_score_lands_on_the_last_counted_token_of_each_row() -> None:
    mask = torch.arange(3) < tensor([[3], [2], [1], [0]])
    logprobs = torch.zeros(4, 3).masked_fill(~mask, NAN)
    scores = tensor([1.0, 2.0, 3.0, 4.0])
    expected = tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert_close(token_rewards(logprobs, logprobs, scores, mask, 0.5), expected, rtol=0, atol=0)


def test_kl_outside_the_mask_is_not_charged() -> None:
    mask = tensor([[True, False]])
    logprobs, ref = tensor([[-1.0, NAN]]), tensor([[-2.0, -3.0]])
    actual = token_rewards(logprobs, ref, tensor([0.25]), mask, 0.5)
    assert_close(actual, tensor([[0.25 - 0.5 * 1.0, 0.0]]))
    actual = token_rewards(ref, logprobs, tensor([0.25]), mask, 0.5)
    assert_close(actual, tensor([[0.25 + 0.5 * 1.0, 0.0]]))


def test_no_penalty_where_policy_is_reference() -> None:
    actual = token_rewards(LOGPROBS, LOGPROBS, tensor([0.7]), WHOLE, 123.0)
    assert_close(actual, tensor([[0.0, 0.0, 0.0, 0.7]]), rtol=0, atol=0)


def test_missing_eos() -> None:
    scores, finished = tensor([0.5, 0.7]), tensor([True, False])
    assert_close(missing_eos_replace(scores, finished, -1), tensor([0.5, -1.0]))
    assert_close(missing_eos_subtract(scores, finished, 0.3), tensor([0.5, 0.4]))
    assert_close(missing_eos_keep(scores, finished, 0.3), tensor([0.5, 0.7]))
    by_name = [MISSING_EOS[name](scores, finished, 0.3)[1] for name in ("keep", "replace", "subtract")]
    assert_close(torch.stack(by_name), tensor([0.7, 0.3, 0.4]))


def test_gae() -> None:
    # δ = (.096, -.048, .26, .3); A_4 = .3, A_3 = .26 + .95·.3 = .545, A_2 = -.048 + .95·.545, A_1 = .096 + .95·.46975.
    advantages, returns = generalized_advantages(REWARDS, VALUES, WHOLE, gamma=1.0, lam=0.95)
    assert_close(advantages, tensor([[0.5422625, 0.469750, 0.545000, 0.300000]]), rtol=1e-5, atol=0)
    assert_close(returns, tensor([[0.6422625, 0.669750, 0.695000, 0.700000]]), rtol=1e-5, atol=0)


def test_gae_discounts_values_and_recursion() -> None:
    # γ = ½, λ = ½: A_2 = 4 − 2 = 2; A_1 = 1 + ½·2 − 3 + ¼·2 = −½; returns add V.
    rewards, values, mask = tensor([[1.0, 4.0]]), tensor([[3.0, 2.0]]), tensor([[True, True]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    assert_close(advantages, tensor([[-0.5, 2.0]]), rtol=0, atol=0)
    assert_close(returns, tensor([[2.5, 4.0]]), rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_with_lambda_one_is_the_monte_carlo_return(gamma: float) -> None:
    rewards, values, mask = ragged()
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=1.0)
    for row, length in enumerate([5, 2, 1]):
        for t in range(length):
            future = sum(gamma ** (u - t) * rewards[row, u] for u in range(t, length))
            assert_close(returns[row, t], future)
            assert_close(advantages[row, t], future - values[row, t])


def test_gae_with_lambda_zero_is_the_one_step_error() -> None:
    rewards, values, mask = ragged()
    advantages, _ = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.0)
    assert_close(advantages[0, 1], rewards[0, 1] + 0.9 * values[0, 2] - values[0, 1])
    assert_close(advantages[0, 4], rewards[0, 4] - values[0, 4])
    assert_close(advantages[1, 0], rewards[1, 0] + 0.9 * values[1, 1] - values[1, 0])
    assert_close(advantages[1, 1], rewards[1, 1] - values[1, 1])
    assert_close(advantages[2, 0], rewards[2, 0] - values[2, 0])


def test_masked_entries_do_not_reach_earlier_ones() -> None:
    """NaN stands outside the mask; each row alone, cut to its length, gives the same numbers."""
    rewards, values, mask = ragged()
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for row, length in enumerate([5, 2, 1]):
        cut = (slice(row, row + 1), slice(0, length))
        alone = generalized_advantages(rewards[cut], values[cut], mask[cut], gamma=0.9, lam=0.8)
        assert_close(advantages[cut], alone[0], rtol=0, atol=0)
        assert_close(returns[cut], alone[1], rtol=0, atol=0)


def test_score_reaches_the_eos_token_with_weight_one() -> None:
    """∂A_t/∂score = (γλ)^(T−t): 1 at the EOS token, one factor less for each token before it, 0 after it."""
    mask = tensor([[True, True, True, False]])
    score = tensor([0.7], requires_grad=True)
    values = torch.randn(1, 4)
    for t, weight in enumerate([0.81 * 0.95**2, 0.9 * 0.95, 1.0, 0.0]):
        rewards = token_rewards(LOGPROBS, REF_LOGPROBS, score, mask, 0.02)
        advantages, _ = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.95)
        (gradient,) = torch.autograd.grad(advantages[0, t], score)
        assert_close(gradient, tensor([weight]))


def test_adaptive_kl() -> None:
    # Errors −0.2, 0, 0.2 (clipped) and 1/6, each times 512 / 10,000.
    kl_coef = 0.15
    for kl in (3, 6, 12, 7):
        kl_coef = adaptive_kl(kl_coef, kl, target=6, horizon=10_000, batch=512)
    assert kl_coef == pytest.approx(0.151264, rel=1e-5)
    assert adaptive_kl(0.1, 6.6, target=6, horizon=100, batch=10) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adaptive_kl(0.1, 60, target=6, horizon=100, batch=10) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adaptive_kl(0.1, 0, target=6, horizon=100, batch=10) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
