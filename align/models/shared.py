"""Answers behind one prompt in a single pass: the prompt's tokens are computed once, not once for each answer.

Sequences are laid out flat, each prompt once and behind it what its sequences have of their own. A token attends to
what stands before it in its own sequence, so it has the hidden state of a pass of its own, to rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """Sequences without their common beginnings, and who attends to whom.

    Axes: `tokens`, all that are computed; `prompts`; `width`, the most tokens of a prompt and its answers.
    """

    ids: Int[Tensor, "one tokens"]
    positions: Int[Tensor, "one tokens"]
    place: Int[Tensor, "prompts width"]
    """Which tokens a prompt and its answers are; filled up with any."""
    back: Int[Tensor, " tokens"]
    """Where each token is in `place`, flattened."""
    mask: Bool[Tensor, "prompts one width width"]
    """True: the first attends to the second."""
    last: Int[Tensor, " batch"]
    """The last token of each sequence."""


def share(
    ids: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]
) -> SharedPrompts:
    """Lays sequences out so that what those of one prompt begin with alike is there once.

    Args:
        ids: Right-padded.
        lengths: Tokens of each sequence.
        prompt_index: Equal for sequences of one prompt, which stand together.
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    group, is_first, common, sizes = _beginnings(ids, lengths, prompt_index)
    common = common[:, None]
    kept = (places < lengths[:, None]) & (is_first[:, None] | (places >= common))
    position, row = places.expand_as(ids)[kept], torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[kept]
    in_prompt = (is_first[:, None] & (places < common))[kept]
    counts = kept.sum(1)
    tokens = torch.zeros_like(sizes).index_add(0, group, counts)
    start, width = tokens.cumsum(0) - tokens, int(tokens.max())
    back = group[row] * width + torch.arange(len(row), device=ids.device) - start[group[row]]
    inside = torch.arange(width, device=ids.device) < tokens[:, None]
    place = (start[:, None] + torch.arange(width, device=ids.device)).clamp_max(len(row) - 1)
    before = position[place][:, None, :] <= position[place][:, :, None]
    own = in_prompt[place][:, None, :] | (row[place][:, None, :] == row[place][:, :, None])
    itself = torch.eye(width, dtype=torch.bool, device=ids.device)  # what fills up attends to something, too
    return SharedPrompts(
        ids=ids[kept][None],
        positions=position[None],
        place=place,
        back=back,
        mask=((before & own & inside[:, None, :]) | itself)[:, None],
        last=counts.cumsum(0) - 1,
    )


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
