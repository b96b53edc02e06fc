"""Attention of tokens that are being written, on a GPU: each row's next token to all that is kept of its row.

Work of this kind is bound by reading keys and values, which torch's kernels read at half of a GPU's speed or less
(docs/performance.md). Here a program reads of one row and one head what is there, once for all query heads that share
it, and writes the new token's on the way.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

LEAST_QUERIES = 16
"""Rows of a product that matrix units take at least."""

TOKENS = 64
"""Read at once. This, and the next two, were the fastest on an H200 with 16 heads of 128 numbers and with 8 of 64, or
as fast (docs/performance.md)."""

WARPS = 4
"""Groups of 32 threads of a program."""

STAGES = 3
"""Reads of a program that are under way at a time."""

LARGE = 128
"""Of heads with more numbers half as many tokens are read at once, and less is under way: for want of room."""

ROUNDING = 0.05
"""Of a trial of numbers up to 1: more than 16 bits round, and far less than a wrong place changes."""


def works(group: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Tries it out against products written down plainly: two rows, of which one is empty and one of `TOKENS` + 1.

    Args:
        group: Heads of queries that share one of keys.
        size: Numbers of a head.
        dtype: Of what is kept.
        device: Of all.
    """
    lengths = torch.tensor([0, TOKENS + 1], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1], device=device)
    query = torch.linspace(-1, 1, 2 * group * size, device=device).sin().view(2, group, size)
    kept = torch.linspace(-9, 9, (TOKENS + 3) * size, device=device).sin().to(dtype).view(-1, 1, size)
    new = kept[[0, TOKENS + 2]]
    found = attend_to_kept(query, new, new, kept.clone(), kept.clone(), starts, lengths, lengths + 1, 1.0)
    seen = kept[1:, 0].float()
    asked = query[1].to(dtype).float()
    wanted = torch.stack([new[0].float().expand(group, -1), (asked @ seen.T).softmax(-1) @ seen])
    return bool((found - wanted).abs().max() <= ROUNDING)


def attend_to_kept(
    query: Float[Tensor, "rows heads d"],
    key: Float[Tensor, "rows shared d"],
    value: Float[Tensor, "rows shared d"],
    keys: Float[Tensor, "tokens shared d"],
    values: Float[Tensor, "tokens shared d"],
    starts: Int[Tensor, " rows"],
    lengths: Int[Tensor, " rows"],
    growing: Int[Tensor, " rows"],
    scaling: float,
) -> Float[Tensor, "rows heads d"]:
    """softmax(scaling · q kᵀ) v of one token a row, over what is kept of it and the token itself.

    Args:
        query: Heads that share a key lie next to each other.
        key, value: Of the tokens; they are written behind what is kept.
        keys, values: Of all rows, in one piece and in 16 bits, in which products are computed.
        starts: Where rows begin.
        lengths: Tokens kept of each row.
        growing: 0: the row is of no account, and its result is anything.
        scaling: Of the products.
    """
    rows, heads, size = query.shape
    shared = key.shape[1]
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    large = size > LARGE
    out = keys.new_empty(query.shape)
    _attend[rows, shared](
        query, key, value, keys, values, starts, lengths, growing, out,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        keys.stride(0), keys.stride(1), out.stride(0), out.stride(1), scaling,
        GROUP=heads // shared, QUERIES=max(LEAST_QUERIES, triton.next_power_of_2(heads // shared)),
        SIZE=size, WIDTH=max(LEAST_QUERIES, triton.next_power_of_2(size)), TOKENS=TOKENS // 2 if large else TOKENS,
        num_warps=WARPS, num_stages=STAGES - 1 if large else STAGES,
    )  # fmt: skip
    return out


def _compiled(function: Callable[..., None]) -> Any:
    """A kernel, from the function as it is written, whatever checks tests have put around it."""
    return triton.jit(inspect.unwrap(function))


@_compiled
def _attend(
    query, key, value, keys, values, starts, lengths, growing, out,
    query_row, query_head, key_row, key_head, value_row, value_head, kept_token, kept_head, out_row, out_head,
    scaling,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One row and one head of keys; the softmax is kept up to date from tokens to tokens (arXiv:1805.02867)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    count = tl.where(tl.load(growing + row) != 0, length, 0)
    which, within = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    is_query, is_number = which < GROUP, within < SIZE
    asked = query + row * query_row + (head * GROUP + which)[:, None] * query_head + within
    kind = keys.dtype.element_ty
    asked = tl.load(asked, mask=is_query[:, None] & is_number, other=0.0).to(kind)
    own_key = tl.load(key + row * key_row + head * key_head + within, mask=is_number, other=0.0).to(kind)
    own_value = tl.load(value + row * value_row + head * value_head + within, mask=is_number, other=0.0).to(kind)
    start = tl.load(starts + row).to(tl.int64) * kept_token + head * kept_head
    keys += start
    values += start
    tl.store(keys + length * kept_token + within, own_key, mask=is_number)
    tl.store(values + length * kept_token + within, own_value, mask=is_number)

    largest = tl.sum(asked.to(tl.float32) * own_key.to(tl.float32), 1) * scaling
    total = tl.full((QUERIES,), 1.0, tl.float32)
    found = tl.zeros((QUERIES, WIDTH), tl.float32) + own_value.to(tl.float32)
    for first in range(0, count, TOKENS):
        token = first + tl.arange(0, TOKENS)
        place, there = token[:, None] * kept_token + within, (token < count)[:, None] & is_number
        some = tl.load(keys + place, mask=there, other=0.0)
        scores = tl.where(token < count, tl.dot(asked, tl.trans(some)) * scaling, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shares, fading = tl.exp(scores - larger[:, None]), tl.exp(largest - larger)
        some = tl.load(values + place, mask=there, other=0.0)
        found = found * fading[:, None] + tl.dot(shares.to(kind), some)
        total = total * fading + tl.sum(shares, 1)
        largest = larger
    out += row * out_row + (head * GROUP + which)[:, None] * out_head + within
    tl.store(out, (found / total[:, None]).to(kind), mask=is_query[:, None] & is_number)
