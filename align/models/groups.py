"""Several answers to a prompt, written together: its keys and values are kept once, and read once for all of them.

Rows of `Slots` hold a prompt each. Here a row holds what it has of its own, and what it begins with is kept as it was
computed, in runs of prompts of like length. A token attends to both: one softmax over the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.models.slots import Slots


@dataclass
class Beginnings:
    """Prompts that were computed at once, and the rows that begin with them, which lie side by side.

    Attributes:
        lengths: Tokens of each prompt.
        of: Which of the prompts each row begins with, in ascending order.
        layers: Keys and values of every layer.
        places: The rows of each prompt; where it has fewer than others, any.
        back: The place of each row.
        mask: Where a prompt has tokens.
    """

    lengths: Int[Tensor, " prompts"]
    of: Int[Tensor, " rows"]
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    places: Int[Tensor, "prompts group"] = field(init=False)
    back: Int[Tensor, " rows"] = field(init=False)
    mask: Bool[Tensor, "prompts width"] = field(init=False)

    def __post_init__(self) -> None:
        """Gives each prompt as many places as the most rows of one need."""
        counts, numbers = self.of.bincount(minlength=len(self.lengths)), torch.arange(len(self.of)).to(self.of)
        most, first = int(counts.max()), counts.cumsum(0) - counts
        self.back = self.of * most + numbers - first[self.of]
        self.places = numbers.new_zeros(len(counts) * most).index_copy(0, self.back, numbers).view(-1, most)
        self.mask = torch.arange(self.width).to(self.lengths) < self.lengths[:, None]

    @property
    def width(self) -> int:
        """Tokens of the longest prompt; at least one, for models take no less."""
        return max(1, int(self.lengths.max()))

    def kept(self, rows: Bool[Tensor, " rows"]) -> "Beginnings":
        """What is left when only these rows, of which there are some, stay; this is of no more use then."""
        alive, of = self.of[rows].unique(return_inverse=True)
        left = Beginnings(self.lengths[alive], of, self.layers)
        if len(alive) < len(self.lengths):
            for layer, (keys, values) in self.layers.items():  # one after the other, for each frees its former ones
                self.layers[layer] = (keys[alive, :, : left.width], values[alive, :, : left.width])
        return left

    def grouped(self, rows: Float[Tensor, "rows heads repeats last"]) -> Float[Tensor, "prompts heads queries last"]:
        """What rows have, prompt by prompt: the query heads of a key head, row after row, behind one another."""
        return rows[self.places].transpose(1, 2).flatten(2, 3)

    def rowwise(self, found: Float[Tensor, "prompts heads queries last"]) -> Float[Tensor, "rows heads repeats last"]:
        """The inverse of `grouped`."""
        laid = found.unflatten(2, (self.places.shape[1], -1)).transpose(1, 2)
        return laid.flatten(0, 1)[self.back]


class GroupedSlots(Slots):
    """Keys and values of every layer, those of prompts once for all rows that begin with them.

    Attributes:
        lengths: Tokens that each row has of its own. Rows of a prompt lie side by side, in the order they came.

    Args:
        device: Of the model.
        most: Tokens that a row may come to hold of its own.
    """

    def __init__(self, device: torch.device, *, most: int) -> None:
        super().__init__(device, most=most)
        self.beginnings: list[Beginnings] = []
        self._begun = self.lengths

    @property
    def positions(self) -> Int[Tensor, " rows"]:
        """See `Slots`."""
        return self._begun + self.lengths

    def order(self, lengths: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """See `Slots`: as they come."""
        return torch.arange(len(lengths), device=lengths.device)

    def _cut(self, lengths: list[int]) -> Iterator[tuple[int, int, int]]:
        yield 0, len(lengths), max(lengths)

    def lay_out(self, source: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"]) -> None:
        """See `Slots`; old rows keep their order, new ones come behind them and are to be filled."""
        old = source >= 0
        stays = torch.zeros(len(self.lengths), dtype=torch.bool, device=source.device).index_fill(0, source[old], True)
        parts = stays.split([len(part.of) for part in self.beginnings])
        pairs = zip(self.beginnings, parts, strict=True)
        self.beginnings = [part.kept(rows) for part, rows in pairs if rows.any()]
        own = torch.zeros_like(lengths)
        own[old] = self.lengths[source[old]]
        self._begun = lengths - own
        super().lay_out(source, own)

    def begin_with(self, lengths: Int[Tensor, " prompts"], of: Int[Tensor, " rows"]) -> Beginnings:
        """The next prompts that are computed are these, and the next rows begin with them.

        Args:
            lengths: Of the prompts.
            of: See `Beginnings`.
        """
        self.filling = Beginnings(lengths, of)
        self.beginnings.append(self.filling)
        return self.filling

    def fill(
        self,
        layer: int,
        keys: Float[Tensor, "prompts heads time dim"],
        values: Float[Tensor, "prompts heads time dim"],
    ) -> None:
        """Keeps what a layer computed of whole prompts."""
        assert isinstance(self.filling, Beginnings)
        keys, values = self.kept(keys, values)
        self.filling.layers[layer] = (keys.contiguous(), values.contiguous())

    @staticmethod
    def kept(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `Slots`. On a CPU keys stay in float32 in any case, since `attend_in_groups` wants them so."""
        as_slots = Slots.kept(keys, values)
        return (keys if keys.device.type == "cpu" else as_slots[0]), as_slots[1]

    def in_parts(self, layer: int) -> Iterator[tuple[slice, Beginnings, Tensor, Tensor]]:
        """Run after run of prompts: their rows, and a layer's keys and values of them."""
        start = 0
        for part in self.beginnings:
            yield slice(start, start + len(part.of)), part, *part.layers[layer]
            start += len(part.of)


def attend_in_groups(
    query: Float[Tensor, "rows heads one dim"],
    keys: Float[Tensor, "rows few one dim"],
    values: Float[Tensor, "rows few one dim"],
    layer: int,
    slots: GroupedSlots,
    scaling: float | None = None,
) -> Float[Tensor, "rows one heads dim"]:
    """Puts each row's next token in and attends to its prompt and to what it has of its own.

    Args:
        query, keys, values: Of the next token; a head of keys may serve several of queries.
        layer: Number of the layer.
        slots: Of all rows.
        scaling: Of the products of queries and keys; None: one over the root of their size.
    """
    ((_, own_keys, own_values, mask),) = slots.put(layer, keys, values)
    # Products of 16 bits would be rounded to 16 bits before they are weighed; kernels of attention do not do that.
    kind = torch.promote_types(own_keys.dtype, torch.float32)
    scaled = query[:, :, 0].to(kind) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scaled = scaled.unflatten(1, (keys.shape[1], -1))  # the query heads of each key head
    found = []
    with torch.autocast(query.device.type, enabled=False):
        of_own = (scaled @ own_keys.to(kind).mT).masked_fill(~mask, float("-inf"))
        for rows, part, prompt_keys, prompt_values in slots.in_parts(layer):
            of_prompt = part.grouped(scaled[rows]) @ prompt_keys.to(kind).mT
            of_prompt = part.rowwise(of_prompt.masked_fill(~part.mask[:, None, None], float("-inf")))
            both = torch.cat([of_prompt, of_own[rows]], dim=-1)
            to_prompt, to_own = both.softmax(-1).split([of_prompt.shape[-1], of_own.shape[-1]], dim=-1)
            answer = part.rowwise(part.grouped(to_prompt) @ prompt_values.to(kind))
            found.append(answer + to_own @ own_values[rows].to(kind))
    return torch.cat(found).flatten(1, 2)[:, None].to(query.dtype)
