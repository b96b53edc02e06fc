"""Causal attention on a CPU as products of whole matrices: probabilities are kept for the backward pass.

torch's attention on a CPU never holds a sequence's probabilities: it computes them block by block, and once more for
the gradients, in products too small for the units at hand. Short sequences have few probabilities. Kept, they leave
four large products to the backward pass, and in mixed precision all but the scores come from products in 16 bits. It
adds up the same sums.

Sequences of like length are copied to a block, filled up to one of few sizes: a library that prepares for every new
shape (oneDNN, in 16 bits) took three times as long over the preparing as over the products.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.models.products import arithmetic, has_bfloat16_vectors, has_matrix_units

LONGEST = {torch.float32: 256, torch.bfloat16: 512}
"""So many tokens may be attended to: up to here it was about as fast as torch's or faster (docs/performance.md)."""

CALL = 10_000
"""What a block costs before its first score, in scores."""

COPIED = 32
"""What a token of a block costs beside its scores, in scores."""

FINEST = (0, 3, 3)
"""Sequences of a block, own tokens and tokens seen come in multiples of two to the power of this, or of more."""


@functools.cache
def suits_cpu() -> bool:
    """Whether this CPU is of the kind on which it was faster (Zen 4): vectors for bfloat16, and no matrix units.

    It depends on the kind of CPU and is not timed, so that a run that goes on computes the same bits.
    """
    return has_bfloat16_vectors() and not has_matrix_units()


class Run(NamedTuple):
    """Sequences that lie one behind the other in a row of tokens, equally long."""

    count: int
    own: int
    """Tokens of each, which attend to those before them and themselves."""
    start: int
    """Where the first one is."""
    before: int = 0
    """Tokens that each attends to as well, as what stands before it."""
    before_start: int = 0
    """Where these are."""


@dataclass(frozen=True)
class Block:
    """Sequences as a batch, filled up. Axes: `asking`, sequences times their own tokens; `seen`, times all of them."""

    sequences: int
    asking: Int[Tensor, " asking"]
    """Which token is where. Behind a sequence's end its last one is repeated; behind the last sequence, all of it."""
    seen: Int[Tensor, " seen"]
    """The same of keys and values."""
    later: Float[Tensor, "apart own all"]
    """-∞ where the second comes later in its sequence than the first, else 0; once where sequences are alike."""
    tokens: Int[Tensor, " tokens"]
    """The tokens of the row that are here and are no repetitions."""
    places: Int[Tensor, " tokens"]
    """Where they are among those asking."""


@functools.lru_cache(maxsize=2)
def blocks_of(runs: tuple[Run, ...]) -> tuple[Block, ...]:
    """Lays sequences out in the blocks that cost least. The layers of a pass ask for the same one after the other."""
    ordered = sorted(runs, key=lambda run: (run.own, run.before), reverse=True)
    cheapest: list[tuple[int, int]] = [(0, 0)]  # of the first runs: the least cost, and where the last block starts
    for end in range(1, len(ordered) + 1):
        best, sizes = (0, -1), (0, 0, 0)
        for start in range(end - 1, -1, -1):
            sizes = _joined(sizes, ordered[start])
            count, own, seen = _filled_up(sizes)
            cost = CALL + count * own * (seen + COPIED)
            if best[1] >= 0 and cost >= best[0]:  # all larger blocks cost more
                break
            if best[1] < 0 or cheapest[start][0] + cost < best[0]:
                best = cheapest[start][0] + cost, start
        cheapest.append(best)
    blocks, end = [], len(ordered)
    while end > 0:
        start = cheapest[end][1]
        blocks.append(_block(ordered[start:end]))
        end = start
    return tuple(blocks[::-1])


def _joined(sizes: tuple[int, int, int], run: Run) -> tuple[int, int, int]:
    """How many sequences, own tokens of each, and tokens seen, with a run more."""
    count, own, seen = sizes
    return count + run.count, max(own, run.own), max(seen, run.own + run.before)


def _filled_up(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """To numbers of which there are few: with at most four binary digits that count."""
    steps = (1 << max(least, size.bit_length() - 4) for size, least in zip(sizes, FINEST, strict=True))
    count, own, seen = (-(-size // step) * step for size, step in zip(sizes, steps, strict=True))
    return count, own, seen


def _block(runs: Sequence[Run]) -> Block:
    count, own, seen = _filled_up(functools.reduce(_joined, runs, (0, 0, 0)))
    starts, owns, befores, before_starts = (
        torch.tensor(numbers)[:, None] for numbers in zip(*_each(runs), strict=True)
    )
    number = torch.arange(count).clamp_max(len(starts) - 1)
    within = torch.minimum(torch.arange(own), owns - 1)
    asking = starts + within
    all_of_it = torch.minimum(torch.arange(seen), befores + owns - 1)
    keys = torch.where(all_of_it < befores, before_starts + all_of_it, starts + all_of_it - befores)
    later = torch.arange(seen) > torch.arange(own)[:, None] + befores[:, :, None]
    real = torch.arange(own) < owns
    alike = bool((befores == befores[0]).all())
    later = later[:1] if alike else later[number]
    return Block(
        sequences=count,
        asking=asking[number].flatten(),
        seen=keys[number].flatten(),
        later=torch.zeros(later.shape).masked_fill_(later, -math.inf),
        tokens=asking[real],
        places=real.flatten().nonzero()[:, 0],
    )


def _each(runs: Iterable[Run]) -> Iterator[tuple[int, int, int, int]]:
    """Of each sequence: where it starts, own tokens, tokens before them, and where these start."""
    for run in runs:
        for number in range(run.count):
            yield run.start + number * run.own, run.own, run.before, run.before_start


def attend_densely(
    query: Float[Tensor, "heads tokens d"],
    key: Float[Tensor, "shared tokens d"],
    value: Float[Tensor, "shared tokens e"],
    blocks: tuple[Block, ...],
    scaling: float | None,
) -> Float[Tensor, "tokens heads e"]:
    """Attention of tokens to all before them in their sequence and themselves; 0 where a token is in no block.

    Under autocast, scores and softmax are in float32 and all else is multiplied in 16 bits. Scores rounded to these,
    too, put gradients off by 5 % where they were spread by 16 (docs/performance.md).

    Args:
        query: Heads that share a key lie next to each other.
        key, value: Of the same tokens.
        blocks: Which sequences they are.
        scaling: Of the products; None: 1 / √d.
    """
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    rows = (values.transpose(0, 1) for values in (query, key, value))
    found: Tensor = _Dense.apply(*rows, blocks, scaling, arithmetic(query.device, query.dtype))  # type: ignore[no-untyped-call]
    return found


class _Dense(torch.autograd.Function):
    """softmax(scaling · q kᵀ + later) v and its gradients, block by block. All come as (tokens, heads, d)."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[Block, ...],
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        (tokens, heads, _), shared = query.shape, key.shape[1]
        exact, group, kept = torch.promote_types(dtype, torch.float32), heads // shared, []
        found = query.new_zeros(tokens, heads * value.shape[2], dtype=dtype)
        for block in blocks:
            queries = _batch(query.index_select(0, block.asking), block.sequences, shared, exact)
            keys = _batch(key.index_select(0, block.seen), block.sequences, shared, exact)
            values = _batch(value.index_select(0, block.seen), block.sequences, shared, dtype)
            later = block.later.to(exact).repeat(1, group, 1)
            if len(later) > 1:
                later = later.repeat_interleave(shared, 0)
            scores = torch.baddbmm(later, queries, keys.transpose(1, 2), alpha=scaling)
            shares = torch.softmax(scores, dim=-1).to(dtype)
            kept += queries.to(dtype), keys.to(dtype), values, shares
            rows = _rows(torch.bmm(shares, values), block.sequences, group)
            found.index_copy_(0, block.tokens, rows.index_select(0, block.places))
        ctx.save_for_backward(*kept)
        ctx.blocks, ctx.scaling, ctx.group = blocks, scaling, group
        return found.view(tokens, heads, -1)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, kept, group = len(grad), iter(ctx.saved_tensors), ctx.group
        totals: list[Tensor] = []
        for block in ctx.blocks:
            queries, keys, values, shares = (next(kept) for _ in range(4))
            asked = grad.new_zeros(len(block.asking), *grad.shape[1:])
            asked.index_copy_(0, block.places, grad.index_select(0, block.tokens))
            asked = _batch(asked, block.sequences, len(keys) // block.sequences, shares.dtype)
            nothing = asked.new_empty(1)
            # The narrow factor first, and the result turned: up to 1.4 times as fast.
            for_value = torch.bmm(asked.transpose(1, 2), shares).transpose(1, 2)
            for_shares = torch.bmm(asked, values.transpose(1, 2))
            for_scores = torch.ops.aten._softmax_backward_data(for_shares, shares, -1, shares.dtype)
            for_query = torch.baddbmm(nothing, for_scores, keys, beta=0, alpha=ctx.scaling)
            for_key = torch.baddbmm(nothing, queries.transpose(1, 2), for_scores, beta=0, alpha=ctx.scaling)
            rows = (
                _rows(for_query, block.sequences, group),
                _rows(for_key.transpose(1, 2), block.sequences),
                _rows(for_value, block.sequences),
            )
            if not totals:
                exact = torch.promote_types(shares.dtype, torch.float32)
                totals = [part.new_zeros(tokens, part.shape[1], dtype=exact) for part in rows]
            # What fills a block up has gradients of 0.
            for total, part, places in zip(totals, rows, (block.asking, block.seen, block.seen), strict=True):
                total.index_add_(0, places, part.to(total.dtype))
        sizes = (queries, keys, values)
        return (
            *(total.view(tokens, -1, part.shape[2]) for total, part in zip(totals, sizes, strict=True)),
            None,
            None,
            None,
        )


def _batch(
    rows: Float[Tensor, "places heads d"], sequences: int, shared: int, dtype: torch.dtype
) -> Float[Tensor, "batch asking d"]:
    """Tokens as a batch: those of one sequence and of heads that share a key are one of its matrices."""
    apart = rows.unflatten(0, (sequences, -1)).transpose(1, 2)
    whole = torch.empty(apart.shape, dtype=dtype).copy_(apart)  # what has to be copied is copied once
    return whole.view(sequences * shared, -1, rows.shape[2])


def _rows(batch: Float[Tensor, "batch asking d"], sequences: int, group: int = 1) -> Float[Tensor, "places numbers"]:
    """The way back: what belongs to one token next to each other."""
    apart = batch.unflatten(1, (group, -1)).unflatten(0, (sequences, -1))
    return apart.permute(0, 3, 1, 2, 4).reshape(sequences * apart.shape[3], -1)
