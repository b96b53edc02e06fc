"""What the machine can do at most: products of matrices of the shapes that the work consists of, and copies of memory.

A turn of it stands between the turns of the contenders, so that limit and work see the same machine.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tools.benchmark.kinds import BFLOAT16, FLOAT32
from tools.benchmark.protocol import Turn
from tools.benchmark.work import Size, Work

ROWS = 2048
"""Tokens of a product."""

SECONDS = 0.3
"""A turn repeats its product or copy for so long."""

COPIED = 2**28
"""Bytes of a copy: far more than caches hold."""

BLOCKS, HEAD, COPY = "blocks", "head", "copy"
"""What can be measured: tokens times a matrix of the blocks; times the output matrix; a copy."""


def products(precision: str) -> dict[str, str]:
    """`BLOCKS` and `HEAD`, and the name of each one's product in a precision."""
    return {shape: shape if precision == FLOAT32 else f"{shape}, {precision}" for shape in (BLOCKS, HEAD)}


def prepare(kind: str, setting: str, work: Work, precision: str) -> Callable[..., Turn]:
    """Makes the matrices; the result measures `what` it is asked for: a name of `products`, or `COPY`.

    Args:
        kind: The work whose limit it is; its shapes are those of all.
        setting: There is only one.
        work: The common work.
        precision: Of no account: `what` says which.
    """
    factors = {**_factors(work.size, FLOAT32), **_factors(work.size, BFLOAT16)}
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)

    def turn(what: str) -> Turn:
        """Units are floating-point operations; of a copy, bytes read and written.

        float32 is multiplied by torch's usual library and by oneDNN, which may be faster; the faster one counts.
        """
        if what == COPY:
            return repeated(lambda: target.copy_(source), 2 * COPIED)
        tokens, matrix = factors[what]
        out = torch.empty(ROWS, matrix.shape[1], dtype=matrix.dtype)
        units = 2 * ROWS * matrix.numel()
        found = [repeated(lambda: torch.mm(tokens, matrix, out=out), units)]
        if matrix.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            turned, multiply = matrix.t().contiguous(), torch.ops.mkldnn._linear_pointwise
            found.append(repeated(lambda: multiply(tokens, turned, None, "none", [], ""), units))
        return max(found, key=lambda one: one.rate)

    return turn


def _factors(size: Size, precision: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens and a matrix for each product in a precision."""
    widths, dtype = {BLOCKS: size.inner, HEAD: size.vocab}, getattr(torch, precision)
    return {
        name: (torch.randn(ROWS, size.hidden, dtype=dtype), torch.randn(size.hidden, widths[shape], dtype=dtype))
        for shape, name in products(precision).items()
    }


def repeated(work: Callable[[], object], units: int, seconds: float = SECONDS) -> Turn:
    """Does something again and again.

    Args:
        work: What is done.
        units: How much that is.
        seconds: For so long, at least.
    """
    work()
    start, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds or not count:
        work()
        count += 1
        taken = time.perf_counter() - start
    return Turn(taken, units * count)
