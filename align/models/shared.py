"""Answers behind one prompt in a single pass: the prompt's tokens are computed once, not once for each answer.

Sequences are laid out flat, each prompt once and behind it what its sequences have of their own. A token attends to
what stands before it in its own sequence, so it has the hidden state of a pass of its own, to rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """Some prompts with their sequences, whose attention is computed at once.

    Axes: `prompts`; `common`, the most tokens that sequences of one prompt begin with alike; `sequences`; `own`, the
    most that one has besides; `seen`, both together. Places are those in the part, filled up with any token's.
    """

    tokens: int
    """How many it has, which lie next to each other."""
    beginnings: Int[Tensor, "prompts common"]
    """Which tokens sequences of a prompt begin with."""
    own: Int[Tensor, "sequences own"]
    """Which tokens a sequence has of its own."""
    seen: Int[Tensor, "sequences seen"]
    """The tokens of both kinds in a sequence."""
    mask: Bool[Tensor, "sequences one own seen"]
    """True: the first attends to the second."""


@dataclass(frozen=True)
class SharedPrompts:
    """Sequences without their common beginnings, and who attends to whom. Axes: `tokens`, all that are computed."""

    ids: Int[Tensor, "one tokens"]
    positions: Int[Tensor, "one tokens"]
    parts: tuple[Part, ...]
    back: Int[Tensor, " tokens"]
    """Where each token is in the parts' `beginnings` and `own`, one behind the other, flattened."""
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
        ids: Right-padded.
        lengths: Tokens of each sequence.
        prompt_index: Equal for sequences of one prompt, which stand together.
        apart: Each prompt is a part, so that none is filled up to another's length; more calls of attention.
        multiple: Of the tokens computed (`align.models.packed.grain`); those that stand for nothing come last.
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    _, is_first, common, sizes = _beginnings(ids, lengths, prompt_index)
    kept = (places < lengths[:, None]) & (is_first[:, None] | (places >= common[:, None]))
    position, row = places.expand_as(ids)[kept], torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[kept]
    counts = kept.sum(1)
    start = counts.cumsum(0) - counts
    parts, back, behind = [], torch.zeros_like(position), 0
    for rows in torch.arange(len(ids), device=ids.device).split(sizes.tolist() if apart else len(ids)):
        part, where = _part(counts[rows], is_first[rows], common[rows], lengths[rows])
        here = slice(first := int(start[rows[0]]), first + part.tokens)
        inside, own = row[here] - rows[0], position[here]
        back[here] = behind + where[inside, own]
        parts.append(part)
        behind += part.beginnings.numel() + part.own.numel()
    tokens, position, back = (
        nn.functional.pad(numbers, (0, -len(numbers) % multiple)) for numbers in (ids[kept], position, back)
    )
    return SharedPrompts(tokens[None], position[None], tuple(parts), back, counts.cumsum(0) - 1)


def _part(
    counts: Int[Tensor, " sequences"],
    is_first: Bool[Tensor, " sequences"],
    common: Int[Tensor, " sequences"],
    lengths: Int[Tensor, " sequences"],
) -> tuple[Part, Int[Tensor, "sequences time"]]:
    """The part of some sequences, and where each of their tokens is in its `beginnings` and `own`.

    Args:
        counts: How many tokens of each are kept.
        is_first, common, lengths: See `_beginnings`.
    """
    start, count = counts.cumsum(0) - counts, int(counts.sum())
    longest, width, time = (int(numbers.max()) for numbers in (common, lengths - common, lengths))
    places = torch.arange(time, device=start.device)
    group = is_first.cumsum(0) - 1
    inside = places[:longest] < common[:, None]
    beginnings = torch.where(inside, start[:, None] + places[:longest], 0)[is_first]
    own = ((start + torch.where(is_first, common, 0))[:, None] + places[:width]).clamp_max(count - 1)
    earlier = (places[:width] <= places[:width, None]).expand(len(start), -1, -1)
    part = Part(
        tokens=count,
        beginnings=beginnings,
        own=own,
        seen=torch.cat([beginnings[group], own], dim=1),
        mask=torch.cat([inside[:, None].expand(-1, width, -1), earlier], dim=2)[:, None],
    )
    rows = torch.arange(len(start), device=start.device)[:, None]
    behind = beginnings.numel() + rows * width + places - common[:, None]
    return part, torch.where(places < common[:, None], group[:, None] * longest + places, behind)


def tokens(
    ids: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """How many tokens `share` computes for each sequence; the first of a prompt has the common ones."""
    _, is_first, common, _ = _beginnings(ids, lengths, prompt_index)
    return torch.where(is_first, lengths, lengths - common)


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
