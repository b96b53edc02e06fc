"""Randomness as a pure function: (seed, purpose, step, rank) -> generator. Nothing random is ever left over or saved.

Every draw of a run (data order, sampling, minibatch permutation, dropout, head initialisation) names its purpose and
the step it belongs to, so a run that was stopped and started again draws what it would have drawn.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor


def derive(seed: int, purpose: str, step: int = 0, rank: int = 0) -> int:
    """A 63-bit seed that depends on all four numbers, the same on every machine and Python version."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, step: int = 0, rank: int = 0) -> torch.Generator:
    """A CPU generator for draws that take one, such as permutations."""
    return torch.Generator().manual_seed(derive(seed, purpose, step, rank))


def derive_all(seed: int, purpose: str, steps: Iterable[int]) -> Int[Tensor, " steps"]:
    """`derive` for many steps."""
    return torch.tensor([derive(seed, purpose, step) for step in steps])


@contextlib.contextmanager
def forked(seed: int, purpose: str, step: int = 0, rank: int = 0) -> Iterator[None]:
    """Seeds the default generators (CPU and current CUDA device) inside the block and restores them after it.

    For draws that take no generator: dropout, `torch.multinomial` inside a sampler, weight initialisation.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, purpose, step, rank))
        yield
