"""What the machine can do at most: products of matrices of the shapes that the work consists of, and copies of memory.

A turn of it stands between the turns of the contenders, so that limit and work see the same machine.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tools.benchmark.kinds import BFLOAT16, CPU, CUDA, FLOAT32
from tools.benchmark.protocol import Turn
from tools.benchmark.work import Work

ROWS = {CPU: 2048, CUDA: 8192}
"""Tokens of a product: as many as are computed at once by default."""

SECONDS = 0.3
"""A turn repeats its product or copy for so long."""

COPIED = {CPU: 2**28, CUDA: 2**31}
"""Bytes of a copy: far more than caches hold."""

ASKED = {CPU: 1, CUDA: 32}
"""Times that it is asked for before it is waited for: while a GPU is, it does nothing."""

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
    with torch.device(work.device):
        factors = {**_factors(work, FLOAT32), **_factors(work, BFLOAT16)}
        source = torch.ones(COPIED[work.device] // 4)
    target = torch.empty_like(source)

    def turn(what: str) -> Turn:
        """Units are floating-point operations; of a copy, bytes read and written.

        float32 is multiplied by torch's usual library and by oneDNN, which may be faster; the faster one counts.
        """
        if what == COPY:
            return repeated(lambda: target.copy_(source), 2 * COPIED[work.device], device=work.device)
        tokens, matrix = factors[what]
        out = tokens.new_empty(len(tokens), matrix.shape[1])
        units = 2 * len(tokens) * matrix.numel()
        found = [repeated(lambda: torch.mm(tokens, matrix, out=out), units, device=work.device)]
        if work.device == CPU and matrix.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            turned, multiply = matrix.t().contiguous(), torch.ops.mkldnn._linear_pointwise
            found.append(repeated(lambda: multiply(tokens, turned, None, "none", [], ""), units))
        return max(found, key=lambda one: one.rate)

    return turn


def _factors(work: Work, precision: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens and a matrix for each product in a precision."""
    size, rows = work.size, ROWS[work.device]
    widths, dtype = {BLOCKS: size.inner, HEAD: size.vocab}, getattr(torch, precision)
    return {
        name: (torch.randn(rows, size.hidden, dtype=dtype), torch.randn(size.hidden, widths[shape], dtype=dtype))
        for shape, name in products(precision).items()
    }


def done(device: str) -> None:
    """Waits until a device has done what it was asked to."""
    if device == CUDA:
        torch.cuda.synchronize()


def repeated(work: Callable[[], object], units: int, seconds: float = SECONDS, device: str = CPU) -> Turn:
    """Does something again and again.

    Args:
        work: What is done.
        units: How much that is.
        seconds: For so long, at least.
        device: Which does it.
    """
    work()
    done(device)
    start, count, taken = time.perf_counter(), 0, 0.0
    while taken < seconds:
        for _ in range(ASKED[device]):
            work()
        done(device)
        count += ASKED[device]
        taken = time.perf_counter() - start
    return Turn(taken, units * count)
