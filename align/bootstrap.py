"""Means with 95 % confidence intervals by the bootstrap, and how to print them. Knows numbers, not where they are from.

What is resampled are clusters: a prompt with all that belongs to it, since numbers about one prompt are not independent
of each other. All columns see the same resamples, so differences and ratios of columns can be had in the same way.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEVELS = (0.025, 0.975)
"""Quantiles of the resampled values that bound a 95 % interval."""

DRAWS_AT_ONCE = 2**22
"""Resampled clusters held in memory at a time; each takes 16 bytes."""

MOST_DECIMALS = 3


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval.

    Attributes:
        mean: Of the sample itself.
        low: Lower end of the interval.
        high: Upper end.
        n: How many numbers the mean is of.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval, which need not be symmetric about the mean."""
        return (self.high - self.low) / 2.0

    @property
    def decimals(self) -> int:
        """Decimals worth printing: one digit of the half-width, two where it begins with 1; 0 where it is 0."""
        if not self.half_width > 0.0:
            return 0
        exponent = math.floor(math.log10(self.half_width))
        leading = self.half_width / 10.0**exponent
        return min(max(0, -exponent + (leading < 1.95)), MOST_DECIMALS)

    def shown(self, decimals: int) -> str:
        """`mean ± half-width`."""
        return f"{self.mean:.{decimals}f} ± {self.half_width:.{decimals}f}"


def mean_intervals(
    values: Float[Tensor, "clusters columns"], resamples: int, generator: torch.Generator
) -> list[Interval | None]:
    """The mean of each column over the clusters where it has a value, None for a column without any.

    Args:
        values: One row a cluster; NaN where there is nothing to average.
        resamples: How often to draw as many clusters as there are, with replacement.
        generator: Of the draws.
    """
    known = ~values.isnan()
    found = ratio_intervals(values.nan_to_num(0.0), known.to(values.dtype), resamples, generator)
    return [item if item.n else None for item in found]


def ratio_intervals(
    numerators: Float[Tensor, "clusters columns"],
    denominators: Float[Tensor, "clusters columns"],
    resamples: int,
    generator: torch.Generator,
) -> list[Interval]:
    """Σ numerators / Σ denominators of each column: means of clusters of any size, or ratios of paired sums.

    Args:
        numerators: One row a cluster, such as the summed loss of a prompt's texts.
        denominators: Likewise, such as the number of their tokens.
        resamples: How often to draw as many clusters as there are, with replacement.
        generator: Of the draws.

    Returns:
        One interval a column; `n` is the denominators' sum, rounded.
    """
    above, below = numerators.double(), denominators.double()
    drawn = _resampled(torch.stack([above, below]), resamples, generator)
    low, high = (drawn[:, 0] / drawn[:, 1]).nanquantile(torch.tensor(LEVELS, dtype=above.dtype), dim=0)
    means, counts = above.sum(0) / below.sum(0), below.sum(0).round().long()
    rows = zip(means.tolist(), low.tolist(), high.tolist(), counts.tolist(), strict=True)
    return [Interval(*row) for row in rows]


def cluster_sums(values: Float[Tensor, "rows columns"], keys: Sequence[Hashable]) -> Float[Tensor, "clusters columns"]:
    """The sum of the rows of each cluster, clusters in the order in which their keys first appear."""
    place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    index: Int[Tensor, " rows"] = torch.tensor([place[key] for key in keys], dtype=torch.long)
    return torch.zeros(len(place), values.shape[1], dtype=values.dtype).index_add_(0, index, values)


def _resampled(
    values: Float[Tensor, "kinds clusters columns"], resamples: int, generator: torch.Generator
) -> Float[Tensor, "resamples kinds columns"]:
    """Sums over clusters drawn with replacement; a resample is a row of counts, multiplied with the values."""
    clusters = values.shape[1]
    flat = values.transpose(0, 1).flatten(1)
    sums, left = [], resamples
    while left:
        size = min(left, max(1, DRAWS_AT_ONCE // clusters))
        drawn = torch.randint(clusters, (size, clusters), generator=generator)
        counts = torch.zeros(size, clusters, dtype=values.dtype).scatter_add_(
            1, drawn, torch.ones(size, clusters, dtype=values.dtype)
        )
        sums.append(counts @ flat)
        left -= size
    return torch.cat(sums).unflatten(1, (values.shape[0], values.shape[2]))
