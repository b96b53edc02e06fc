"""Sums, moments and whitening over the counted entries of a tensor.

The lowest layer of the formulas: everything here takes values and a mask of the same shape (True = counts) and does
not know what the values mean. Entries that do not count are replaced by zero before anything is computed with them,
because multiplying by the mask afterwards would keep NaN and infinity (NaN · 0 = NaN).
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

Scalar = float | int | Shaped[Tensor, ""]
"""A plain number or a tensor without axes, for coefficients and for counts that were summed over ranks."""

VARIANCE_FLOOR = 1e-8
"""Added to the variance before its root is taken, as in OpenAI's lm-human-preferences."""


def zero_outside(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The values where the mask counts and 0 elsewhere, whatever stood there; no gradient flows to the rest."""
    return torch.where(mask, values, torch.zeros_like(values))


def masked_sum(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of the counted values: Σ mᵢ vᵢ."""
    return zero_outside(values, mask).sum()


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of the counted values: μ = Σ mᵢ vᵢ / Σ mᵢ. NaN if nothing counts."""
    return masked_sum(values, mask) / mask.sum()


def masked_var(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Population variance of the counted values: Σ mᵢ (vᵢ − μ)² / Σ mᵢ. NaN if nothing counts.

    The divisor is the number of values, not that number minus one: a single value has variance 0.
    """
    return masked_mean((zero_outside(values, mask) - masked_mean(values, mask)).square(), mask)


def standardise(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    mean: Float[Tensor, ""],
    variance: Float[Tensor, ""],
) -> Float[Tensor, "*shape"]:
    """(vᵢ − mean) / √(variance + 1e-8) where the mask counts, 0 elsewhere.

    Args:
        values: what to shift and scale.
        mask: which of them count.
        mean: of the population that the values belong to, which may be larger than `values` (all ranks).
        variance: population variance of the same population.
    """
    scaled = (zero_outside(values, mask) - mean) * torch.rsqrt(variance + VARIANCE_FLOOR)
    return zero_outside(scaled, mask)


def whiten(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Counted values shifted and scaled to mean 0 and population variance 1; 0 elsewhere.

    For advantages: `whiten` of `lm_human_preferences/utils/core.py` in openai/lm-human-preferences @cbfd210.
    """
    return standardise(values, mask, mean=masked_mean(values, mask), variance=masked_var(values, mask))


def whiten_keep_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Counted values scaled to population variance 1 about their own mean, which stays; 0 elsewhere.

    For rewards, whose level means something: `whiten` with `shift_mean=False` in the same file as above.
    """
    return zero_outside(whiten(values, mask) + masked_mean(values, mask), mask)
