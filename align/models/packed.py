"""Sequences end to end: a micro-batch as one long row, in which no token sees another sequence's.

All that is computed token by token (everything but attention) sees next to no padding and the largest matrices.
Attention needs sequences apart: those of like lengths lie next to each other and are a band, filled up to its longest
and read as a batch without being copied (`align.models.dense` copies). Positions begin anew with every sequence.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from align.models import products

CALL_TOKENS = 128
"""What a pass costs before its first token, in tokens: about 8 ms of Python for a model of four layers on two cores.

Larger models compute fewer tokens in that time; for them it only matters that the number is small.
"""

BAND_TOKENS = 16
"""What a band costs beside its tokens, in tokens: a call of attention and its backward pass in every block."""

GRAIN = 64
"""Tokens of a long row come in multiples of this where a CPU multiplies by oneDNN (in 16 bits, or see
`align.models.products`), which prepares for every new shape: that may take as long as 2,048 tokens times a matrix."""

padded: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models that get rows filled up to their longest, whatever they could."""


@dataclass(frozen=True)
class Packed:
    """How sequences lie end to end. Axes: `tokens`, all that are computed."""

    bands: tuple[tuple[int, int], ...]
    """Sequences, and tokens of each, of one band after the other; the last may be padding (`grain`). Empty where
    `starts` tells of sequences."""
    places: Int[Tensor, " tokens"]
    """Where in the flattened batch each token is."""
    positions: Int[Tensor, " tokens"]
    """Of each in its sequence."""
    starts: Int[Tensor, " ends"] | None = None
    """Where sequences begin and the last ends, where none is filled up (`align.models.flash`); int32."""
    longest: int = 0
    """Then at least the tokens of the longest; a power of 2, as code that is compiled may be compiled for each."""

    @property
    def padding(self) -> int:
        """Tokens of a last band that stand for nothing."""
        if self.starts is not None:
            return 0
        return sum(sequences * width for sequences, width in self.bands) - len(self.places)

    def filled_up(self, values: Shaped[Tensor, "tokens *_"]) -> Shaped[Tensor, "one row *_"]:
        """What is known of the tokens, in a row with its padding."""
        return (
            torch.cat([values, values.new_zeros(self.padding, *values.shape[1:])])[None]
            if self.padding
            else values[None]
        )

    def arguments(self, ids: Int[Tensor, "batch time"]) -> dict[str, Any]:
        """What a model is called with, whose attention is `align.models.attention`'s."""
        ids, positions = self.filled_up(ids.flatten()[self.places]), self.filled_up(self.positions)
        return {"input_ids": ids, "position_ids": positions, "packed": self}

    def find(self, places: Int[Tensor, " places"]) -> Int[Tensor, " places"]:
        """Which of the tokens are those at places of the flattened batch."""
        found = torch.empty(int(self.places.max()) + 1, dtype=torch.long)
        found[self.places] = torch.arange(len(self.places))
        return found[places.cpu()]


def grain(device: torch.device) -> int:
    """Of which number the tokens computed on a device shall be a multiple, in the arithmetic at hand."""
    return GRAIN if device.type == "cpu" and (torch.is_autocast_enabled("cpu") or products.by_onednn()) else 1


def pack(lengths: Int[Tensor, " batch"], time: int, multiple: int = 1, *, ragged: bool = False) -> Packed:
    """Lays the first tokens of right-padded sequences end to end.

    Args:
        lengths: How many tokens of each sequence are needed.
        time: Tokens of a row, padding included.
        multiple: Of the tokens computed; see `grain`.
        ragged: Attention takes sequences of any lengths at once, so none is filled up.
    """
    if ragged:
        return _pack_ragged(lengths.cpu(), time)
    bands, places, positions = bands_of(lengths), [], []
    for rows, width in bands:
        within = torch.arange(width)
        places.append((rows[:, None] * time + within).flatten())
        positions.append(within.repeat(len(rows)))
    sizes = [(len(rows), width) for rows, width in bands]
    if padding := -sum(sequences * width for sequences, width in sizes) % multiple:
        sizes.append((1, padding))
    return Packed(tuple(sizes), torch.cat(places), torch.cat(positions))


def _pack_ragged(lengths: Int[Tensor, " batch"], time: int) -> Packed:
    order = torch.argsort(lengths, descending=True, stable=True)
    sizes = lengths[order].clamp_min(1)
    ends = sizes.cumsum(0)
    positions = torch.arange(int(ends[-1])) - (ends - sizes).repeat_interleave(sizes)
    starts = nn.functional.pad(ends, (1, 0)).int()
    longest = 1 << (int(sizes[0]) - 1).bit_length()
    return Packed((), (order * time).repeat_interleave(sizes) + positions, positions, starts, longest)


def bands_of(lengths: Int[Tensor, " batch"]) -> list[tuple[Int[Tensor, " picked"], int]]:
    """The bands that compute least, where each costs `BAND_TOKENS` beside its tokens: rows, and tokens of each.

    Long ones first. A row of no tokens has one.
    """
    lengths = lengths.cpu()
    order = torch.argsort(lengths, descending=True, stable=True)
    sizes = lengths[order].clamp_min(1).tolist()
    cheapest: list[tuple[int, int]] = [(0, 0)]  # of the first rows: the least cost, and where the last band starts
    for end in range(1, len(sizes) + 1):
        best, padding = (cheapest[end - 1][0] + sizes[end - 1] + BAND_TOKENS, end - 1), 0
        for start in range(end - 2, -1, -1):
            padding += (end - 1 - start) * (sizes[start] - sizes[start + 1])
            if padding > BAND_TOKENS * (end - start):  # a band for each of these rows would cost less
                break
            best = min(best, (cheapest[start][0] + (end - start) * sizes[start] + BAND_TOKENS, start))
        cheapest.append(best)
    bands, end = [], len(sizes)
    while end > 0:
        start = cheapest[end][1]
        bands.append((order[start:end], sizes[start]))
        end = start
    return bands[::-1]


def micro_batches(lengths: Int[Tensor, " batch"], budget: int, *, packs: bool = False) -> list[Int[Tensor, " picked"]]:
    """Splits a batch into micro-batches of like lengths, none larger than `budget` tokens with its padding.

    The split depends on the lengths alone, so the rollout's scoring pass and the update see equal shapes.

    Args:
        lengths: Tokens of each sequence.
        budget: Tokens a micro-batch may hold, padding included; a longer sequence is a micro-batch of its own.
        packs: Sequences will lie end to end (`pack`), which makes micro-batches few. Otherwise each is filled up to
            its longest: of all such splits it is the one that computes least, where each micro-batch costs
            `CALL_TOKENS` beside its tokens.

    Returns:
        Row indices; every row once, longest sequences first (so that memory runs out at once or never).
    """
    return _packed_groups(lengths, budget) if packs else _padded_groups(lengths, budget)


def _packed_groups(lengths: Int[Tensor, " batch"], budget: int) -> list[Int[Tensor, " picked"]]:
    groups: list[list[Tensor]] = []
    left = 0
    for rows, width in bands_of(lengths):
        while len(rows):
            count = max(0, left - BAND_TOKENS) // width
            if not count:
                groups.append([])
                left = budget
                count = max(1, (left - BAND_TOKENS) // width)
            groups[-1].append(rows[:count])
            left -= len(rows[:count]) * width + BAND_TOKENS
            rows = rows[count:]
    return [torch.cat(group) for group in groups]


def _padded_groups(lengths: Int[Tensor, " batch"], budget: int) -> list[Int[Tensor, " picked"]]:
    order = torch.argsort(lengths.cpu(), descending=True, stable=True)
    sizes = lengths.cpu()[order].tolist()
    # cheapest[end]: the least cost of the first `end` rows, and where the last of their groups starts.
    cheapest: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(sizes) + 1):
        best = (cheapest[end - 1][0] + sizes[end - 1] + CALL_TOKENS, end - 1)
        for start in range(end - 2, -1, -1):
            computed = (end - start) * sizes[start]
            if computed > budget:
                break
            best = min(best, (cheapest[start][0] + computed + CALL_TOKENS, start))
        cheapest.append(best)
    groups, end = [], len(sizes)
    while end > 0:
        start = cheapest[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]
