"""Masked sums, moments and whitening against numbers worked out by hand."""

import torch
from torch import tensor
from torch.testing import assert_close

from align.formulas.masked import (
    masked_mean,
    masked_sum,
    masked_var,
    standardise,
    whiten,
    whiten_keep_mean,
    zero_outside,
)

NAN, INF = float("nan"), float("inf")
# The counted values are 1, 3, 5, 11: sum 20, mean 5, squared deviations 16 + 4 + 0 + 36 = 56, variance 14.
VALUES = tensor([[1.0, 3.0, NAN], [5.0, 11.0, INF]])
MASK = tensor([[True, True, False], [True, True, False]])
DEVIATIONS = tensor([[-4.0, -2.0, 0.0], [0.0, 6.0, 0.0]])


def test_zero_outside_replaces_whatever_stood_there() -> None:
    assert_close(zero_outside(VALUES, MASK), tensor([[1.0, 3.0, 0.0], [5.0, 11.0, 0.0]]), rtol=0, atol=0)


def test_moments() -> None:
    assert masked_sum(VALUES, MASK) == 20.0
    assert masked_mean(VALUES, MASK) == 5.0
    assert masked_var(VALUES, MASK) == 14.0


def test_one_value_has_variance_zero_and_whitens_to_zero() -> None:
    values, mask = tensor([7.0, NAN]), tensor([True, False])
    assert masked_var(values, mask) == 0.0
    assert_close(whiten(values, mask), tensor([0.0, 0.0]), rtol=0, atol=0)
    assert_close(whiten_keep_mean(values, mask), tensor([7.0, 0.0]), rtol=0, atol=0)


def test_no_value_has_no_mean() -> None:
    assert masked_sum(VALUES, torch.zeros_like(MASK)) == 0.0
    assert masked_mean(VALUES, torch.zeros_like(MASK)).isnan()


def test_whiten() -> None:
    assert_close(whiten(VALUES, MASK), DEVIATIONS / 14**0.5, rtol=1e-6, atol=0)


def test_whiten_keep_mean() -> None:
    assert_close(whiten_keep_mean(VALUES, MASK), (DEVIATIONS / 14**0.5 + 5.0) * MASK, rtol=1e-6, atol=0)


def test_standardise_takes_the_moments_of_a_larger_population() -> None:
    actual = standardise(VALUES, MASK, mean=tensor(3.0), variance=tensor(4.0))
    assert_close(actual, tensor([[-1.0, 0.0, 0.0], [1.0, 4.0, 0.0]]))


def test_the_variance_floor_tames_tiny_deviations() -> None:
    # Variance 1e-8 and floor 1e-8 make the divisor √2e-8, so deviations of 1e-4 become 1/√2 and not 1.
    values = tensor([-1e-4, 1e-4], dtype=torch.float64)
    assert_close(whiten(values, tensor([True, True])), tensor([-1.0, 1.0], dtype=torch.float64) / 2**0.5)


def test_whitened_appendix_numbers() -> None:
    """Advantages and rewards of the worked example in test_returns.py, whitened over the population."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    advantages = tensor([[0.5422625, 0.469750, 0.545000, 0.300000]])
    expected = tensor([[0.783877, 0.055235, 0.811384, -1.650496]])
    assert_close(whiten(advantages, mask), expected, rtol=1e-5, atol=1e-6)
    rewards = tensor([[-0.004, 0.002, 0.010, 0.700]])
    expected = tensor([[-0.422348, -0.402480, -0.375989, 1.908816]])
    assert_close(whiten_keep_mean(rewards, mask), expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_reaches_values_that_do_not_count() -> None:
    values = VALUES.clone().requires_grad_()
    (whiten_keep_mean(values, MASK) * torch.arange(6.0).view(2, 3)).sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert (values.grad[~MASK] == 0).all()
    assert (values.grad[MASK] != 0).all()
