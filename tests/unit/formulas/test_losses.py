"""Cross-entropy and PPO's losses: worked examples, finite differences, and shares of micro-batches that add up."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from align.formulas.losses import (
    clipped_value_loss,
    cross_entropy,
    entropy,
    explained_variance,
    policy_loss,
    ratio_max,
    value_loss,
)
from align.formulas.masked import whiten

NAN = float("nan")
# The worked example of test_returns.py: log-probs, values, advantages and returns of four tokens.
OLD_LOGPROBS = tensor([[-1.0, -0.5, -2.0, -0.1]])
ADVANTAGES = tensor([[0.5422625, 0.469750, 0.545000, 0.300000]])
OLD_VALUES = tensor([[0.1, 0.2, 0.15, 0.4]])
RETURNS = tensor([[0.6422625, 0.669750, 0.695000, 0.700000]])
WHOLE = torch.ones(1, 4, dtype=torch.bool)


def policy_gradient(log_ratio: float, advantage: float, clip: float = 0.2) -> float:
    """∂ loss/∂ log π of a single token whose log π is `log_ratio` above log π_old."""
    logprobs = tensor([-1.0 + log_ratio], dtype=torch.float64, requires_grad=True)
    old, weight = tensor([-1.0], dtype=torch.float64), tensor([advantage], dtype=torch.float64)
    loss, _ = policy_loss(logprobs, old, weight, tensor([True]), clip=clip, count=1)
    loss.backward()
    assert logprobs.grad is not None
    return logprobs.grad.item()


def value_gradient(value: float, old_value: float, target: float) -> float:
    """∂ loss/∂V of a single token, clipped at ± 0.2."""
    values = tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = tensor([old_value], dtype=torch.float64), tensor([target], dtype=torch.float64)
    loss, _ = clipped_value_loss(values, old, returns, tensor([True]), clip=0.2, count=1)
    loss.backward()
    assert values.grad is not None
    return values.grad.item()


def test_cross_entropy() -> None:
    logprobs = tensor([[-1.0, -2.0, NAN], [-4.0, NAN, NAN]])
    mask = tensor([[True, True, False], [True, False, False]])
    assert cross_entropy(logprobs, mask, 3) == 7 / 3
    assert cross_entropy(logprobs, mask, tensor(14)) == 0.5


def test_entropy() -> None:
    # Uniform over 4, certain, and (3/4, 1/4); −∞ marks tokens that cannot be drawn.
    logits = tensor(
        [[0.0, 0.0, 0.0, 0.0], [5.0, -math.inf, -math.inf, -math.inf], [math.log(3), 0, -math.inf, -math.inf]]
    )
    expected = tensor([math.log(4), 0.0, math.log(4) - 0.75 * math.log(3)])
    assert_close(entropy(logits), expected)


def test_policy_loss() -> None:
    logprobs = (OLD_LOGPROBS + tensor([[0.3, -0.3, 0.1, 0.0]])).requires_grad_()
    loss, stats = policy_loss(logprobs, OLD_LOGPROBS, whiten(ADVANTAGES, WHOLE), WHOLE, clip=0.2, count=4)
    assert_close(loss.detach(), tensor(-0.056948), rtol=1e-5, atol=1e-6)
    assert_close(stats["clip_fraction"], tensor(0.25))
    assert_close(stats["approx_kl"], tensor(0.023750))
    assert_close(stats["approx_kl_k3"], tensor(0.023962), rtol=1e-5, atol=5e-7)
    assert_close(stats["ratio"], tensor((math.exp(0.3) + math.exp(-0.3) + math.exp(0.1) + 1.0) / 4))
    assert all(not stat.requires_grad for stat in stats.values())


def test_policy_loss_clips_at_each_end() -> None:
    # One token each: ρ = 2 and ½ with A = 1 and −2, ε = 0.2; the larger of −Aρ and −A clip(ρ) is taken.
    logprobs, old = tensor([2.0, 2.0, 0.5, 0.5]).log(), torch.zeros(4)
    advantages, mask = tensor([1.0, -2.0, 1.0, -2.0]), torch.ones(4, dtype=torch.bool)
    each = [
        policy_loss(logprobs[i : i + 1], old[:1], advantages[i : i + 1], mask[:1], clip=0.2, count=1) for i in range(4)
    ]
    assert_close(torch.stack([loss for loss, _ in each]), tensor([-1.2, 4.0, -0.5, 1.6]))
    assert [stats["clip_fraction"].item() for _, stats in each] == [1.0, 0.0, 0.0, 1.0]


def test_policy_gradient_is_zero_only_where_clipping_helps() -> None:
    outside = math.log(1.3)
    assert policy_gradient(outside, 2.0) == 0.0
    assert policy_gradient(-outside, -2.0) == 0.0
    assert policy_gradient(outside, -2.0) == pytest.approx(2.0 * 1.3)
    assert policy_gradient(-outside, 2.0) == pytest.approx(-2.0 / 1.3)
    assert policy_gradient(math.log(1.1), 2.0) == pytest.approx(-2.0 * 1.1)


def test_first_update_is_the_policy_gradient() -> None:
    """At ratio 1 the gradient is that of −Σ A log π / count, and nothing is clipped."""
    logprobs = OLD_LOGPROBS.clone().requires_grad_()
    loss, stats = policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, WHOLE, clip=0.2, count=4)
    loss.backward()
    assert_close(logprobs.grad, -ADVANTAGES / 4)
    assert_close(loss.detach(), -ADVANTAGES.sum() / 4)
    assert stats["ratio"] == 1.0
    assert stats["approx_kl"] == stats["approx_kl_k3"] == stats["clip_fraction"] == 0.0


def test_ratio_max() -> None:
    logprobs, old = tensor([0.5, -0.5, NAN, 9.0]).requires_grad_(), tensor([0.0, 0.5, 0.0, 0.0])
    mask = tensor([True, True, False, False])
    assert_close(ratio_max(logprobs, old, mask), tensor(math.exp(0.5)))
    assert_close(ratio_max(logprobs, old, tensor([False, True, False, False])), tensor(math.exp(-1.0)))
    assert ratio_max(logprobs, old, torch.zeros_like(mask)) == 0.0
    assert not ratio_max(logprobs, old, mask).requires_grad


def test_value_losses() -> None:
    values = OLD_VALUES + tensor([[0.5, -0.1, 0.05, 0.3]])
    loss, stats = clipped_value_loss(values, OLD_VALUES, RETURNS, WHOLE, clip=0.2, count=4)
    assert_close(loss, tensor(0.087098), rtol=1e-5, atol=5e-7)
    # V = (.6, .1, .2, .7), clipped (.3, .1, .2, .6): the clipped error is larger at the first and the last token.
    assert_close(stats["clip_fraction"], tensor(0.5))
    # Past the clip range but away from R, the clipped error is the smaller one.
    _, stats = clipped_value_loss(-values, OLD_VALUES, RETURNS, WHOLE, clip=0.2, count=4)
    assert stats["clip_fraction"] == 0.0
    # Unclipped: ½ · (.0422625² + .56975² + .495² + 0²) / 4.
    loss, stats = value_loss(values, RETURNS, WHOLE, count=4)
    assert_close(loss, tensor(0.07142827), rtol=1e-6, atol=0)
    assert stats == {}


def test_value_gradient_is_zero_only_where_clipping_hurts() -> None:
    # V_old = 0. Past ±0.2 towards R the clipped error is the larger one and has no gradient; away from R it is not.
    assert value_gradient(0.5, 0.0, 1.0) == 0.0
    assert value_gradient(-0.5, 0.0, -1.0) == 0.0
    assert value_gradient(-0.5, 0.0, 1.0) == pytest.approx(-1.5)
    assert value_gradient(0.5, 0.0, -1.0) == pytest.approx(1.5)
    assert value_gradient(0.1, 0.0, 1.0) == pytest.approx(-0.9)


def test_explained_variance() -> None:
    # var(R) over (1, 3, 5, 11) is 14 (see test_masked.py); the error (1, −1, 1, −1) has variance 1.
    returns, mask = tensor([1.0, 3.0, 5.0, 11.0, NAN]), tensor([True, True, True, True, False])
    assert_close(explained_variance(tensor([0.0, 4.0, 4.0, 12.0, 0.0]), returns, mask), tensor(1 - 1 / 14))
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((5,), 2.0), returns, mask) == 0.0


def random_tokens() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eight responses of 1 to 8 tokens, in float64: what is learned, what was, targets, mask."""
    torch.manual_seed(1)
    mask = torch.arange(8) < tensor([8, 1, 5, 3, 7, 2, 6, 4])[:, None]
    now, old, target = torch.randn(3, 8, 8, dtype=torch.float64)
    return 0.5 * now, 0.5 * old, target, mask


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, dict[str, Tensor]]]
LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda now, old, target, mask, count: (cross_entropy(now, mask, count), {}),
    "policy": lambda now, old, target, mask, count: policy_loss(now, old, target, mask, clip=0.2, count=count),
    "value": lambda now, old, target, mask, count: value_loss(now, target, mask, count=count),
    "clipped_value": lambda now, old, target, mask, count: clipped_value_loss(
        now, old, target, mask, clip=0.2, count=count
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_shares_of_micro_batches_add_up(loss: Loss) -> None:
    """Loss, gradient and stats of one batch are the sums over 2 and over 8 micro-batches."""
    now, old, target, mask = random_tokens()
    count = int(mask.sum())
    results = []
    for parts in (1, 2, 8):
        learned = now.clone().requires_grad_()
        shares = [
            loss(learned[i], old[i], target[i], mask[i], count)
            for i in torch.arange(8).view(parts, 8 // parts).unbind()
        ]
        total = torch.stack([share for share, _ in shares]).sum()
        total.backward()
        stats = {key: torch.stack([stat[key] for _, stat in shares]).sum() for key in shares[0][1]}
        results.append((total.detach(), learned.grad, stats))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_padding_and_packing_change_nothing(loss: Loss) -> None:
    """The flat vector of counted tokens gives what the padded rectangle gives, whose padding is NaN throughout."""
    now, old, target, mask = random_tokens()
    dirty = [x.masked_fill(~mask, NAN) for x in (now, old, target)]
    padded, flat = dirty[0].requires_grad_(), now[mask].requires_grad_()
    loss_padded, stats_padded = loss(padded, dirty[1], dirty[2], mask, 36)
    loss_flat, stats_flat = loss(flat, old[mask], target[mask], mask[mask], 36)
    assert_close((loss_padded, stats_padded), (loss_flat, stats_flat))
    loss_padded.backward()
    loss_flat.backward()
    assert padded.grad is not None
    assert_close(padded.grad[mask], flat.grad)
    assert (padded.grad[~mask] == 0).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_gradients_agree_with_finite_differences(loss: Loss) -> None:
    now, old, target, mask = random_tokens()
    assert torch.autograd.gradcheck(lambda x: loss(x, old, target, mask, 36)[0], now.requires_grad_())
