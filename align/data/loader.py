"""Order and delivery of batches: which examples when, as a pure function of the seed, and a loader that can be resumed.

Knows indices and positions. Does not know what an example is.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader

from align import seeds


def stream(size: int, start: int, count: int, seed: int, purpose: str) -> Int[Tensor, " count"]:
    """Places `start .. start + count` of an endless stream that shuffles `size` examples anew in every pass.

    Args:
        size: Number of examples.
        start: Place in the stream, counted from its beginning.
        count: How many indices.
        seed: The run's seed.
        purpose: What the stream is for; different purposes are shuffled differently.
    """
    picked: list[Tensor] = []
    while count > 0:
        sweep, place = divmod(start, size)
        order = torch.randperm(size, generator=seeds.generator(seed, purpose, sweep))[place : place + count]
        picked.append(order)
        start, count = start + len(order), count - len(order)
    return torch.cat(picked) if picked else torch.empty(0, dtype=torch.long)


class ShuffledBatches:
    """The batches of each epoch, as lists of indices; the same for the same epoch, whatever came before it.

    The last batch may be smaller than the others: losses are weighted by counts, so nothing needs to be left out.
    With several ranks each takes its part of every batch, which may be nothing of the last one.

    Args:
        order: Epoch -> the indices of its examples in order.
        size: How many examples an epoch has.
        batch_size: Examples in a batch, all ranks together.
        rank: Which rank's part to give.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        order: Callable[[int], Int[Tensor, " size"]],
        size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < world_size:
            raise ValueError(
                f"batch_size={batch_size} is less than the {world_size} ranks that share a batch; raise it"
            )
        self.order, self.size, self.batch_size = order, size, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """This rank's part of every batch of the epoch."""
        return [chunk[self.rank :: self.world_size].tolist() for chunk in self.order(epoch).split(self.batch_size)]


class Loader:
    """A sized loader whose place is part of a checkpoint, so a run resumes in the middle of an epoch.

    It has a length, therefore Lightning does not fetch batches ahead and `position` counts the batches that training
    took. Lightning saves `state_dict()` with a checkpoint and announces each epoch to `loader.sampler.set_epoch`.
    An epoch that is iterated again starts at its beginning; only a loaded state starts elsewhere, once.
    Where a batch has nothing for this rank, it gets one example of which nothing counts, since ranks step together.
    """

    batch_sampler = None
    """Lightning asks for it to learn whether validation is shuffled by torch; it is not."""

    def __init__(
        self,
        examples: Sequence[Any],
        batches: ShuffledBatches,
        collate: Callable[[list[Any]], Any],
        num_workers: int = 0,
    ) -> None:
        self.examples, self.batches, self.collate = examples, batches, collate
        self.num_workers = num_workers
        self.current_epoch = 0
        self.position = 0
        self._start = 0

    @property
    def sampler(self) -> "Loader":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch; a new epoch starts at its first batch."""
        if epoch != self.current_epoch:
            self.current_epoch, self.position, self._start = epoch, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing happens before the first batch is asked for. Lightning calls iter() several times, also
        # before it announces the epoch.
        start, self._start = self._start, 0
        rest = self.batches.epoch(self.current_epoch)[start:]
        # The generator keeps torch's loader from drawing a worker seed from the default generator.
        unused = seeds.generator(0, "workers")
        loader = DataLoader(
            self.examples,  # type: ignore[arg-type]  # a sequence is all that torch needs
            batch_sampler=[own or [0] for own in rest],
            collate_fn=self.collate,
            num_workers=self.num_workers,
            generator=unused,
        )
        for position, (own, batch) in enumerate(zip(rest, loader, strict=True), start=start + 1):
            self.position = position
            yield batch if own else batch.uncounted()

    def state_dict(self, back: int = 0) -> dict[str, int]:
        """Epoch and number of batches taken in it, less the last `back` of them."""
        return {"epoch": self.current_epoch, "position": self.position - back}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after the batches that were taken when the state was saved."""
        self.current_epoch = state["epoch"]
        self.position = self._start = state["position"]
