"""The keys and values of sequences that are being written: a row each, its tokens at the left.

transformers' caches are rectangles: prompts are padded on the left to the longest, and every new token copies the whole
cache into a larger one. Here each row has a length of its own, a token's keys and values are written where they belong,
and attention reads each row no further than the longest of its band, rows of like length.

A model reaches it through its attention function (`align.models.attention`), not as `past_key_values`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.models.products import has_matrix_units

GROWTH = 256
"""Tokens to write before the rows are laid out anew."""

BAND_ROWS = 8
"""A band has at least this many rows: calling attention costs about as much as reading them."""

BAND_LENGTH = 0.8
"""A row shorter than this share of the longest of its band begins the next band."""


@dataclass(frozen=True)
class Filling:
    """Prompts that are being computed, for rows to begin with."""

    rows: Int[Tensor, " rows"]
    source: Int[Tensor, " rows"]
    """Which of the prompts each row gets; several may get the same."""


class Slots:
    """Keys and values of every layer, rows in order of their lengths.

    Attributes:
        lengths: Tokens each row holds, longest first. Where the next token's keys and values go.
        filling: What takes the prompts that are being computed; None while tokens are written.

    Args:
        device: Of the model.
        most: Tokens that a row may come to hold.
    """

    def __init__(self, device: torch.device, *, most: int) -> None:
        self.most = most
        self.lengths: Int[Tensor, " rows"] = torch.zeros(0, dtype=torch.long, device=device)
        self.filling: object = None
        self._layers: dict[int, list[Tensor]] = {}
        self._longest, self._width, self._rows = 0, 0, 0
        self._bands: list[tuple[int, int, int]] = []
        self._masks: list[Bool[Tensor, "band one one width"]] = []

    @property
    def positions(self) -> Int[Tensor, " rows"]:
        """Tokens before each row's next one."""
        return self.lengths

    def order(self, lengths: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """In which rows of these lengths are to be laid out."""
        return lengths.argsort(descending=True, stable=True)

    @property
    def full(self) -> bool:
        """Whether the longest row has no room for another token."""
        return self._longest >= self._width

    def lay_out(self, source: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"]) -> None:
        """Takes rows along, leaves others behind, makes new ones, and sees to it that each has room to grow.

        Args:
            source: The old row that each row is; -1: a new one.
            lengths: Of each row, in `order`.
        """
        of_all = lengths.tolist()
        longest = max(of_all)
        larger = len(source) > self._rows or longest >= self._width
        if larger:
            self._rows, self._width = len(source), min(longest + GROWTH, self.most)
        old, reach = (source >= 0).nonzero()[:, 0], min(self._longest, self._width)
        for number, parts in self._layers.items():
            self._layers[number] = [self._moved(part, source[old], old, reach, larger) for part in parts]
        self.lengths, self._longest = lengths, longest
        self._bands = list(self._cut(of_all))

    def _cut(self, lengths: list[int]) -> Iterator[tuple[int, int, int]]:
        return _bands(lengths)

    def _moved(self, part: Tensor, source: Tensor, rows: Tensor, reach: int, larger: bool) -> Tensor:
        """What is in rows of `source` in `rows`, in the same memory or in larger."""
        kept = part[source, :, :reach]
        if larger:
            part = self._empty(part)
        part[rows, :, :reach] = kept
        return part

    def _empty(self, like: Float[Tensor, "_ heads _ dim"]) -> Float[Tensor, "capacity heads width dim"]:
        # Zeros, for what stands behind a row's end is read and weighed with 0, which must not be 0 times infinity.
        return like.new_zeros(self._rows, like.shape[1], self._width, like.shape[3])

    def begin(self) -> None:
        """Before each token: what every row may attend to, itself included."""
        grown = self._longest - self._bands[0][2]
        self._masks = [
            (torch.arange(longest + grown + 1, device=self.lengths.device) <= self.lengths[start:end, None])[
                :, None, None
            ]
            for start, end, longest in self._bands
        ]

    def end(self) -> None:
        """After each token: every row is one longer."""
        self.lengths = self.lengths + 1
        self._longest += 1

    def fill(
        self,
        layer: int,
        keys: Float[Tensor, "prompts heads time dim"],
        values: Float[Tensor, "prompts heads time dim"],
    ) -> None:
        """Writes what a layer computed of whole prompts to the beginnings of their rows."""
        assert isinstance(self.filling, Filling)
        rows, source, time = self.filling.rows, self.filling.source, keys.shape[2]
        for kept, new in zip(self._of(layer, keys, values), (keys, values), strict=True):
            kept[rows, :, :time] = new[source].to(kept.dtype)

    def put(
        self, layer: int, keys: Float[Tensor, "rows heads one dim"], values: Float[Tensor, "rows heads one dim"]
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Writes a layer's keys and values of each row's next token.

        Yields:
            Band after band: its rows, all their keys and values, and the mask.
        """
        rows, kept = torch.arange(len(keys), device=keys.device), self._of(layer, keys, values)
        for part, new in zip(kept, (keys, values), strict=True):
            part[rows, :, self.lengths] = new[:, :, 0].to(part.dtype)
        for (start, end, _), mask in zip(self._bands, self._masks, strict=True):
            width = mask.shape[-1]
            yield slice(start, end), kept[0][start:end, :, :width], kept[1][start:end, :, :width], mask

    def _of(
        self, layer: int, keys: Float[Tensor, "_ heads _ dim"], values: Float[Tensor, "_ heads _ dim"]
    ) -> list[Float[Tensor, "capacity heads width dim"]]:
        if layer not in self._layers:
            self._layers[layer] = [self._empty(part) for part in self.kept(keys, values)]
        return self._layers[layer]

    @staticmethod
    def kept(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in the number format in which they are kept: that of the values.

        But in float32 where a CPU has no matrix units: there attention in 16 bits takes two to four times as long.
        """
        if values.device.type == "cpu" and not has_matrix_units():
            kind = torch.promote_types(values.dtype, torch.float32)
            return keys.to(kind), values.to(kind)
        # In mixed precision keys come in float32, having been rotated; attention would round all for every token.
        return keys.to(values.dtype), values


def _bands(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts rows, longest first, into runs of like length: first row, the row behind the last, the longest's length."""
    start = 0
    for row in range(1, len(lengths) + 1):
        shorter = row < len(lengths) and lengths[row] < BAND_LENGTH * lengths[start]
        if row == len(lengths) or (shorter and row - start >= BAND_ROWS):
            yield start, row, lengths[start]
            start = row
