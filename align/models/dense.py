"""Causal attention on a CPU as products of whole matrices: probabilities are kept for the backward pass.

torch's attention on a CPU never holds a sequence's probabilities: it computes them block by block, and once more for
the gradients, in products too small for the units at hand. Short sequences have few probabilities. Kept, they leave
four large products to the backward pass, and in mixed precision all but the scores come from products in 16 bits. It
adds up the same sums.

Sequences of like length are copied to a block, filled up to one of few sizes: with a library that prepares for every
new shape (oneDNN, in 16 bits) attention took more than three times as long at new shapes as at known ones.
"""

import functools
import math
from collections.abc import Iterator, Sequence
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
    """Sequences as a batch, filled up to sizes of which there are few."""

    sequences: int
    own: int
    """Tokens of each that ask."""
    seen: int
    """Tokens of each that are asked, own ones last."""
    later: Float[Tensor, "apart own seen"]
    """-∞ where the second comes later in its sequence than the first, else 0; once where sequences are alike."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a row are in blocks that lie one behind the other. Axes: `asking`, `seen`, of all blocks.

    Behind a sequence's end its last token is repeated, behind a block's last sequence all of it.
    """

    blocks: tuple[Block, ...]
    asking: Int[Tensor, " asking"]
    """The token whose query is at each place."""
    seen: Int[Tensor, " seen"]
    """The token whose key and value are."""
    asked: Int[Tensor, " asking"]
    """As `asking`, but what is a repetition stands for the one behind the row's last token."""
    places: Int[Tensor, " tokens"]
    """Where each token's query is; behind all of them where a token is of no sequence."""


@functools.lru_cache(maxsize=8)
def lay_out(runs: tuple[Run, ...], tokens: int) -> Layout:
    """The blocks that cost least, of runs in order of length. All layers of a pass ask for the same.

    Args:
        runs: Sequences of the row.
        tokens: Of the row, where some may be of no sequence.
    """
    blocks = [_filled(part) for part in _cut(sorted(runs, key=lambda run: (run.own, run.before), reverse=True))]
    sequences = torch.cat([sequences for _, sequences in blocks])
    sizes = torch.tensor([size for size, _ in blocks])
    starts, owns, befores, before_starts, real = sequences.unbind(1)
    of, within = _places(sizes[:, 0], sizes[:, 1])
    asking = starts[of] + torch.minimum(within, owns[of] - 1)
    asked = torch.where((within < owns[of]) & (real[of] > 0), asking, tokens)
    places = torch.full((tokens + 1,), len(asking)).index_copy(0, asked, torch.arange(len(asking)))[:-1]
    of, within = _places(sizes[:, 0], sizes[:, 2])
    within = torch.minimum(within, befores[of] + owns[of] - 1)
    seen = within + torch.where(within < befores[of], before_starts[of], starts[of] - befores[of])
    made = (Block(*size, _later(befores, *size)) for size, befores in ((size, rows[:, 2]) for size, rows in blocks))
    return Layout(tuple(made), asking, seen, asked, places)


def _cut(runs: Sequence[Run]) -> list[Sequence[Run]]:
    """Into blocks."""
    cheapest: list[tuple[float, int]] = [(0, 0)]  # of the first runs: the least cost, and where the last block starts
    for end in range(1, len(runs) + 1):
        best, sizes = (math.inf, end), (0, 0, 0)
        for start in range(end - 1, -1, -1):
            sizes = _joined(sizes, runs[start])
            count, own, seen = _filled_up(sizes)
            cost = CALL + count * own * (seen + COPIED)
            if cost >= best[0]:  # all larger blocks cost more
                break
            best = min(best, (cheapest[start][0] + cost, start))
        cheapest.append(best)
    parts, end = [], len(runs)
    while end > 0:
        start = cheapest[end][1]
        parts.append(runs[start:end])
        end = start
    return parts[::-1]


def _joined(sizes: tuple[int, int, int], run: Run) -> tuple[int, int, int]:
    """How many sequences, own tokens of each, and tokens seen, with a run more."""
    count, own, seen = sizes
    return count + run.count, max(own, run.own), max(seen, run.own + run.before)


def _filled_up(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """To numbers of which there are few: with at most four binary digits that count."""
    steps = (1 << max(least, size.bit_length() - 4) for size, least in zip(sizes, FINEST, strict=True))
    count, own, seen = (-(-size // step) * step for size, step in zip(sizes, steps, strict=True))
    return count, own, seen


def _filled(runs: Sequence[Run]) -> tuple[tuple[int, int, int], Int[Tensor, "sequences numbers"]]:
    """A block's sizes, and of each sequence: start, own tokens, tokens before, their start, and whether it is real."""
    size = _filled_up(functools.reduce(_joined, runs, (0, 0, 0)))
    each = [
        (run.start + number * run.own, run.own, run.before, run.before_start, 1)
        for run in runs
        for number in range(run.count)
    ]
    return size, torch.tensor(each + [(*each[-1][:-1], 0)] * (size[0] - len(each)))


def _places(
    sequences: Int[Tensor, " blocks"], widths: Int[Tensor, " blocks"]
) -> tuple[Int[Tensor, " places"], Int[Tensor, " places"]]:
    """Of every place of all blocks, of which sequence it is, and which of its tokens."""
    sizes = widths.repeat_interleave(sequences)
    of = torch.arange(len(sizes)).repeat_interleave(sizes)
    return of, torch.arange(len(of)) - (sizes.cumsum(0) - sizes)[of]


def _later(befores: Int[Tensor, " filled"], sequences: int, own: int, seen: int) -> Float[Tensor, "apart own seen"]:
    """See `Block.later`."""
    alike = bool((befores == befores[0]).all())
    begun = befores[: 1 if alike else sequences, None, None]
    later = torch.arange(seen) > torch.arange(own)[:, None] + begun
    return torch.zeros(later.shape).masked_fill_(later, -math.inf)


def attend_densely(
    query: Float[Tensor, "heads tokens d"],
    key: Float[Tensor, "shared tokens d"],
    value: Float[Tensor, "shared tokens e"],
    layout: Layout,
    scaling: float | None,
) -> Float[Tensor, "tokens heads e"]:
    """Attention of tokens to all before them in their sequence and themselves; 0 where a token is of no sequence.

    Under autocast, scores and softmax are in float32 and all else is multiplied in 16 bits. Scores rounded to these,
    too, put gradients off by 5 % where they were spread by 16 (docs/performance.md).

    Args:
        query: Heads that share a key lie next to each other.
        key, value: Of the same tokens.
        layout: Which sequences they are.
        scaling: Of the products; None: 1 / √d.
    """
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    rows, kind = [values.transpose(0, 1) for values in (query, key, value)], arithmetic(query.device, query.dtype)
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in rows)
    found: Tensor = _Dense.apply(*rows, layout, scaling, kind, learns)  # type: ignore[no-untyped-call]
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
        layout: Layout,
        scaling: float,
        dtype: torch.dtype,
        learns: bool,
    ) -> Tensor:
        heads, shared = query.shape[1], key.shape[1]
        exact, group, kept = torch.promote_types(dtype, torch.float32), heads // shared, []
        value, found = value.to(dtype), _Rows(len(layout.asking) + 1, heads, value.shape[2], dtype)
        for block, (asking, seen) in zip(layout.blocks, _apart(layout, layout.asking, layout.seen), strict=True):
            queries = _batch(query.index_select(0, asking), block.sequences, shared, exact)
            keys = _batch(key.index_select(0, seen), block.sequences, shared, exact)
            values = _batch(value.index_select(0, seen), block.sequences, shared, dtype)
            later = block.later.to(exact)
            later = later.repeat(1, group, 1) if group > 1 else later
            later = later.repeat_interleave(shared, 0) if len(later) > 1 else later
            scores = torch.baddbmm(later, queries, keys.transpose(1, 2), alpha=scaling)
            shares = torch.softmax(scores, dim=-1).to(dtype)
            if learns:
                kept += queries.to(dtype), keys.to(dtype), values, shares
            found.add(torch.bmm(shares, values), block.sequences, block.own)
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scaling, ctx.heads = layout, scaling, (heads, shared)
        return found.rows.index_select(0, layout.places)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, kept, (heads, shared) = ctx.layout, ctx.saved_tensors, ctx.heads
        _, keys, values, shares = kept[:4]
        exact, dtype = torch.promote_types(shares.dtype, torch.float32), shares.dtype
        for_query = _Rows(len(layout.asking) + 1, heads, keys.shape[2], exact)
        for_key = _Rows(len(layout.seen), shared, keys.shape[2], exact)
        for_value = _Rows(len(layout.seen), shared, values.shape[2], exact)
        grads = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])]).index_select(0, layout.asked)
        for number, (block, (part, _)) in enumerate(
            zip(layout.blocks, _apart(layout, grads, layout.seen), strict=True)
        ):
            queries, keys, values, shares = kept[4 * number : 4 * number + 4]
            asked = _batch(part, block.sequences, shared, dtype)
            nothing = asked.new_empty(1)
            # The narrow factor first, and the result turned: up to 1.4 times as fast.
            turned = torch.bmm(asked.transpose(1, 2), shares)
            for_value.add(turned.transpose(1, 2), block.sequences, block.seen)
            for_shares = torch.bmm(asked, values.transpose(1, 2))
            for_scores = torch.ops.aten._softmax_backward_data(for_shares, shares, -1, dtype)
            found = torch.baddbmm(nothing, for_scores, keys, beta=0, alpha=ctx.scaling)
            for_query.add(found, block.sequences, block.own)
            turned = torch.baddbmm(nothing, queries.transpose(1, 2), for_scores, beta=0, alpha=ctx.scaling)
            for_key.add(turned.transpose(1, 2), block.sequences, block.seen)
        # What fills blocks up has gradients of 0.
        sums = (part.rows.new_zeros(len(grad), *part.rows.shape[1:]) for part in (for_key, for_value))
        of_seen = (
            total.index_add_(0, layout.seen, part.rows) for total, part in zip(sums, (for_key, for_value), strict=True)
        )
        return for_query.rows.index_select(0, layout.places), *of_seen, None, None, None, None


def _apart(layout: Layout, asking: Tensor, seen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What is known of those asking and of those seen, block by block."""
    of_asking = asking.split([block.sequences * block.own for block in layout.blocks])
    return zip(of_asking, seen.split([block.sequences * block.seen for block in layout.blocks]), strict=True)


def _batch(
    rows: Float[Tensor, "places heads d"], sequences: int, shared: int, dtype: torch.dtype
) -> Float[Tensor, "batch asking d"]:
    """Tokens as a batch: those of one sequence and of heads that share a key are one of its matrices."""
    apart = rows.unflatten(0, (sequences, -1)).transpose(1, 2)
    whole = torch.empty(apart.shape, dtype=dtype).copy_(apart)  # what has to be copied is copied once
    return whole.view(sequences * shared, -1, rows.shape[2])


class _Rows:
    """The way back from batches: what belongs to one token next to each other. A last row that is not added stays 0."""

    def __init__(self, count: int, heads: int, size: int, dtype: torch.dtype) -> None:
        self.rows = torch.empty(count, heads, size, dtype=dtype)
        self.rows[-1:] = 0.0
        self.filled = 0

    def add(self, batch: Float[Tensor, "batch asking d"], sequences: int, tokens: int) -> None:
        count = sequences * tokens
        into = self.rows[self.filled : self.filled + count].unflatten(0, (sequences, tokens))
        into.copy_(batch.unflatten(1, (-1, tokens)).unflatten(0, (sequences, -1)).flatten(1, 2).transpose(1, 2))
        self.filled += count
