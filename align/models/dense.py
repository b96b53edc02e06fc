"""Causal attention on a CPU as products of whole matrices: probabilities are kept for the backward pass.

torch's attention on a CPU never holds a sequence's probabilities: it computes them block by block, and once more for
the gradients, in products too small for the units at hand. Short sequences have few probabilities. Kept, they leave
four large products to the backward pass, and in mixed precision all but the scores come from products in 16 bits. It
adds up the same sums.
"""

import functools
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.models.products import arithmetic, has_bfloat16_vectors, has_matrix_units

LONGEST = {torch.float32: 256, torch.bfloat16: 512}
"""So many tokens may be attended to: up to here it was about as fast as torch's or faster (docs/performance.md)."""


@functools.cache
def suits_cpu() -> bool:
    """Whether this CPU is of the kind on which it was faster (Zen 4): vectors for bfloat16, and no matrix units.

    It depends on the kind of CPU and is not timed, so that a run that goes on computes the same bits.
    """
    return has_bfloat16_vectors() and not has_matrix_units()


def attend_densely(
    query: Float[Tensor, "sequences heads own d"],
    key: Float[Tensor, "sequences shared seen d"],
    value: Float[Tensor, "sequences shared seen e"],
    scaling: float | None,
) -> Float[Tensor, "sequences own heads e"]:
    """Attention of tokens to all before them and themselves, where the queries are the last of those seen.

    Under autocast, scores and softmax are in float32 and all else is multiplied in 16 bits. Scores rounded to these,
    too, put gradients off by 5 % where they were spread by 16 (docs/performance.md).

    Args:
        query: Heads that share a key lie next to each other.
        key, value: Of all tokens, own ones last.
        scaling: Of the products; None: 1 / √d.
    """
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    found: Tensor = _Dense.apply(query, key, value, scaling, arithmetic(query.device, query.dtype))  # type: ignore[no-untyped-call]
    return found.transpose(1, 2)


class _Dense(torch.autograd.Function):
    """softmax(scaling · q kᵀ + mask) v and its gradients."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        (sequences, heads, own, _), (_, shared, seen, _) = query.shape, key.shape
        exact = torch.promote_types(dtype, torch.float32)
        queries = _contiguous(query, exact).view(sequences * shared, heads // shared * own, -1)
        keys = _contiguous(key, exact).view(sequences * shared, seen, -1)
        values = _contiguous(value, dtype).view(sequences * shared, seen, -1)
        later = queries.new_full((own, seen), -math.inf).triu_(1 + seen - own).repeat(heads // shared, 1)
        scores = torch.baddbmm(later, queries, keys.transpose(1, 2), alpha=scaling)
        shares = torch.softmax(scores, dim=-1).to(dtype)
        ctx.save_for_backward(queries.to(dtype), keys.to(dtype), values, shares)
        ctx.scaling = scaling
        return torch.bmm(shares, values).view(sequences, heads, own, -1)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, shares = ctx.saved_tensors
        sequences, heads, own, _ = grad.shape
        grad = _contiguous(grad, shares.dtype).view(*queries.shape[:2], -1)
        nothing = grad.new_empty(1)
        # The narrow factor first, and the result turned: up to 1.4 times as fast.
        for_value = torch.bmm(grad.transpose(1, 2), shares).transpose(1, 2)
        for_shares = torch.bmm(grad, values.transpose(1, 2))
        for_scores = torch.ops.aten._softmax_backward_data(for_shares, shares, -1, shares.dtype)
        for_query = torch.baddbmm(nothing, for_scores, keys, beta=0, alpha=ctx.scaling)
        for_key = torch.baddbmm(nothing, queries.transpose(1, 2), for_scores, beta=0, alpha=ctx.scaling).transpose(1, 2)
        apart = (sequences, len(queries) // sequences)
        return (
            for_query.view(sequences, heads, own, -1),
            for_key.unflatten(0, apart),
            for_value.unflatten(0, apart),
            None,
            None,
        )


def _contiguous(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In a format, and in one piece: what has to be copied is copied once."""
    return values.contiguous() if values.dtype == dtype else torch.empty(values.shape, dtype=dtype).copy_(values)
