"""The keys and values of sequences that are being written, in memory that stays where it is.

`align.models.slots` lays rows out anew as they grow, leave and come, which takes little from a CPU and is most of the
work on a GPU. Here rows are as many and have as much room from the first token to the last, and a row's next sequence
begins where the last one was: so a step is the same to a GPU every time, and can be recorded once and replayed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.models.slots import Slots


@dataclass(frozen=True)
class Begun:
    """Prompts that are being computed end to end, for rows to begin with. Axes: `kept`, tokens of all these rows."""

    rows: Int[Tensor, " kept"]
    positions: Int[Tensor, " kept"]
    source: Int[Tensor, " kept"]
    """Which of the tokens computed each is; rows that begin alike have the same."""


class FixedSlots:
    """Keys and values of every layer, of one row behind the other.

    Attributes:
        starts: Where rows begin.
        lengths: Tokens each row holds: behind them the next token's keys and values go.
        growing: 1 for rows that are being written, 0 for the others.
        filling: What takes the prompts that are being computed; None while tokens are written.
        copied: Whether attention had to `put`.

    Args:
        capacities: Tokens that each row may come to hold, in host memory.
        device: Of the model.
    """

    def __init__(self, capacities: Int[Tensor, " rows"], device: torch.device) -> None:
        ends = capacities.cumsum(0)
        self._capacities, self._tokens, self._width = capacities, int(ends[-1]), int(capacities.max())
        self.starts = (ends - capacities).to(device)
        self.lengths: Int[Tensor, " rows"] = torch.zeros(len(ends), dtype=torch.int32, device=device)
        self.growing = torch.zeros_like(self.lengths)
        self.filling: Begun | None = None
        self.copied = False
        self._layers: dict[int, list[Tensor]] = {}

    @property
    def positions(self) -> Int[Tensor, " rows"]:
        """Tokens before each row's next one; 0 where none is wanted, since it could be one too many for a model."""
        return (self.lengths * self.growing).long()

    def begin(self) -> None:
        """Before each token there is nothing to lay out."""

    def end(self) -> None:
        """After each token: rows that are being written are one longer."""
        self.lengths.add_(self.growing)

    def fill(
        self,
        layer: int,
        keys: Float[Tensor, "one heads tokens dim"],
        values: Float[Tensor, "one heads tokens dim"],
    ) -> None:
        """Writes what a layer computed of prompts to the beginnings of their rows."""
        assert self.filling is not None
        places = self.starts[self.filling.rows] + self.filling.positions
        for kept, new in zip(self.of(layer, keys, values), (keys, values), strict=True):
            kept[places] = new[0].transpose(0, 1)[self.filling.source].to(kept.dtype)

    def put(
        self, layer: int, keys: Float[Tensor, "rows heads one dim"], values: Float[Tensor, "rows heads one dim"]
    ) -> list[Float[Tensor, "rows heads width dim"]]:
        """Writes a layer's keys and values of each row's next token.

        Returns:
            A copy of all that is kept of it, row beside row; what stands behind a row's end is any number.
        """
        kept, self.copied = self.of(layer, keys, values), True
        places = self.starts[:, None] + torch.arange(self._width, device=keys.device)
        for part, new in zip(kept, (keys, values), strict=True):
            part.index_put_((self.starts + self.lengths,), new[:, :, 0].to(part.dtype))
        return [part[places.clamp_max(self._tokens - 1)].transpose(1, 2) for part in kept]

    @property
    def mask(self) -> Bool[Tensor, "rows one one width"]:
        """What each row's next token may attend to, itself included, in what `put` returns."""
        return (torch.arange(self._width, device=self.lengths.device) <= self.lengths[:, None])[:, None, None]

    def of(
        self, layer: int, keys: Float[Tensor, "_ heads _ dim"], values: Float[Tensor, "_ heads _ dim"]
    ) -> list[Float[Tensor, "tokens heads dim"]]:
        """All that is kept of a layer, which has keys and values like these."""
        if layer not in self._layers:
            # Zeros, for what stands behind a row's end may be read and weighed with 0, not to be 0 times infinity.
            self._layers[layer] = [
                part.new_zeros(self._tokens, part.shape[1], part.shape[3]) for part in Slots.kept(keys, values)
            ]
        return self._layers[layer]

    @property
    def bytes_a_token(self) -> int:
        """What one token takes in all layers that anything is kept of."""
        return sum(part.nbytes for parts in self._layers.values() for part in parts) // self._tokens

    def only(self, rows: list[int]) -> "FixedSlots":
        """These rows in memory of their own; this is of no more use then."""
        left = FixedSlots(self._capacities[rows], self.starts.device)
        parts = zip(self.starts[rows].tolist(), left._capacities.tolist(), strict=True)
        places = torch.cat([torch.arange(start, start + size) for start, size in parts]).to(self.starts.device)
        left.lengths.copy_(self.lengths[rows])
        left.growing.copy_(self.growing[rows])
        for number in list(self._layers):  # one after the other, for each frees its former ones
            left._layers[number] = [part[places] for part in self._layers.pop(number)]
        return left
