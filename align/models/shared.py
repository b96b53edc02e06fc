"""Answers behind one prompt in a single pass: the prompt's tokens are computed once, not once for each answer.

Sequences lie end to end, each prompt once and behind it what its sequences have of their own, in bands of like lengths
(`align.models.packed`). Attention copies keys and values of a prompt, once for each sequence; all else it reads where
it lies, but for `align.models.dense`. A token attends to what stands before it in its own sequence, so it has the
hidden state of a pass of its own, to rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from align.models.packed import bands_of


@dataclass(frozen=True)
class Band:
    """Sequences without their common beginnings, filled up to the longest.

    Axes: `sequences`; `own`, tokens of each; `seen`, these and those that its part's sequences begin with.
    """

    sequences: int
    width: int
    """Tokens of each."""
    prompt: Int[Tensor, " sequences"] | None
    """Which of the part's prompts each has; None: there is one."""
    mask: Bool[Tensor, "sequences one own seen"] | None
    """True: the first attends to the second. None: to all that stands before it, as there is one prompt."""


@dataclass(frozen=True)
class Part:
    """Some prompts with their sequences: a call of attention for the prompts and for each band, unless all are one."""

    prompts: int
    common: int
    """The most tokens that sequences of one prompt begin with alike; each prompt is filled up to as many."""
    bands: tuple[Band, ...]

    @property
    def sizes(self) -> list[int]:
        """Tokens of what sequences begin with, then of each band."""
        return [self.prompts * self.common, *(band.sequences * band.width for band in self.bands)]

    def fits(self, most: int) -> bool:
        """Whether there is one prompt, and nobody attends to more tokens than these."""
        return self.prompts == 1 and all(self.common + band.width <= most for band in self.bands)


@dataclass(frozen=True)
class SharedPrompts:
    """Sequences without their common beginnings, and who attends to whom. Axes: `tokens`, all that are computed."""

    ids: Int[Tensor, "one tokens"]
    positions: Int[Tensor, "one tokens"]
    parts: tuple[Part, ...]
    """One behind the other; what comes after them is padding."""
    last: Int[Tensor, " batch"]
    """The last token of each sequence."""


def share(
    ids: Int[Tensor, "batch time"],
    lengths: Int[Tensor, " batch"],
    prompt_index: Int[Tensor, " batch"],
    *,
    apart: bool,
    multiple: int = 1,
) -> SharedPrompts:
    """Lays sequences out so that what those of one prompt begin with alike is there once.

    Args:
        ids: Right-padded; on the CPU, like all others.
        lengths: Tokens of each sequence.
        prompt_index: Equal for sequences of one prompt, which stand together.
        apart: Each prompt is a part, so that none is filled up to another's length; more calls of attention. Otherwise
            those are a part that have about as many tokens in common (`align.models.packed.bands_of`).
        multiple: Of the tokens computed (`align.models.packed.grain`); those that stand for nothing come last.
    """
    group, is_first, common, sizes = _beginnings(ids, lengths, prompt_index)
    firsts, own = is_first.nonzero()[:, 0], lengths - common
    prompts = torch.arange(len(sizes))
    together = prompts.split(1) if apart else [picked for picked, _ in bands_of(common[firsts])]
    parts: list[Part] = []
    places: list[Tensor] = []  # in the flattened batch, of one beginning or band after the other
    last = torch.empty_like(lengths)
    for picked in together:
        longest = int(common[firsts[picked]].max())
        places.append(_places(firsts[picked], torch.zeros_like(picked), longest, ids.shape[1]))
        bands = []
        members = torch.isin(group, picked).nonzero()[:, 0]
        for which, width in bands_of(own[members]):
            rows = members[which]
            prompt = mask = None
            if len(picked) > 1:
                prompt = (group[rows, None] == picked).int().argmax(1)
                mask = _mask(common[rows], longest, width)
            bands.append(Band(len(rows), width, prompt, mask))
            last[rows] = sum(map(len, places)) + torch.arange(len(rows)) * width + own[rows] - 1
            places.append(_places(rows, common[rows], width, ids.shape[1]))
        parts.append(Part(len(picked), longest, tuple(bands)))
    flat = torch.cat(places)
    tokens, positions = (
        nn.functional.pad(numbers, (0, -len(numbers) % multiple))[None]
        for numbers in (ids.flatten()[flat], flat % ids.shape[1])
    )
    return SharedPrompts(tokens, positions, tuple(parts), last)


def _places(rows: Int[Tensor, " rows"], start: Int[Tensor, " rows"], count: int, time: int) -> Int[Tensor, " tokens"]:
    """So many tokens of each row of the flattened batch; those behind a row's end are any."""
    return (rows[:, None] * time + (start[:, None] + torch.arange(count)).clamp_max(time - 1)).flatten()


def _mask(common: Int[Tensor, " sequences"], longest: int, width: int) -> Bool[Tensor, "sequences one own seen"]:
    """Who of a band attends to whom, where prompts have been filled up to the longest."""
    prompt = (torch.arange(longest) < common[:, None])[:, None].expand(-1, width, -1)
    own = torch.ones(width, width, dtype=torch.bool).tril().expand(len(common), -1, -1)
    return torch.cat([prompt, own], dim=2)[:, None]


def tokens(
    ids: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """How many tokens `share` computes for each sequence, prompts being apart; a prompt's first has the common ones."""
    _, is_first, common, sizes = _beginnings(ids, lengths, prompt_index)
    found = torch.where(is_first, common, 0)
    for rows in torch.arange(len(ids)).split(sizes.tolist()):
        for which, width in bands_of((lengths - common)[rows]):
            found[rows[which]] += width
    return found


def _beginnings(
    ids: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"], Int[Tensor, " batch"], Int[Tensor, " prompts"]]:
    """Of each sequence its prompt's number, whether it is the first, and how many tokens all of its prompt begin with.

    Each keeps one token of its own. Last, how many sequences each prompt has.
    """
    _, group, sizes = prompt_index.unique_consecutive(return_inverse=True, return_counts=True)
    first = (sizes.cumsum(0) - sizes)[group]
    places = torch.arange(ids.shape[1], device=ids.device)
    alike = (ids == ids[first]) & (places < lengths[:, None] - 1)
    least = torch.full_like(sizes, ids.shape[1]).scatter_reduce(0, group, alike.long().cumprod(1).sum(1), "amin")
    common = torch.where(sizes > 1, least, 0)[group]
    return group, torch.arange(len(ids), device=ids.device) == first, common, sizes
