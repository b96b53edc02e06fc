"""Drawing tokens from softmax(logits / temperature)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

STRETCH = 1024
"""Probabilities are added up in stretches of so many tokens, and one by one only within the stretch that is hit."""

SHORT = 8 * STRETCH
"""On a CPU a vocabulary up to this size is added up as a whole: fewer operations, each with a cost of its own."""


def draw(
    logits: Float[Tensor, "batch vocab"], temperature: float, points: Float[Tensor, " batch"]
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """One token a row from softmax(logits / temperature), and its log-probability.

    At temperature 0 the likeliest, which is certain: log 1.

    Args:
        logits: Of the next token, in float32.
        temperature: See `Sampler`.
        points: From [0, 1), uniform, in float64: which part of the distribution is hit. One number a row, where
            torch.multinomial draws one for each token of the vocabulary.
    """
    if temperature == 0.0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    scaled = logits / temperature if temperature != 1.0 else logits
    largest = scaled.amax(-1, keepdim=True)
    weights = (scaled - largest).exp_()
    short = weights.shape[1] <= SHORT and weights.device.type == "cpu"
    token, total = (_whole if short else _in_stretches)(weights, points[:, None])
    return token[:, 0], (scaled.gather(1, token) - largest - total.log())[:, 0].float()


def _whole(
    weights: Float[Tensor, "batch vocab"], points: Float[Tensor, "batch one"]
) -> tuple[Int[Tensor, "batch one"], Float[Tensor, "batch one"]]:
    """The token that is hit, and the sum of all weights. In float64, to add up a vocabulary exactly enough."""
    reached = weights.double().cumsum(-1)
    return _first_beyond(reached, points * reached[:, -1:]), reached[:, -1:]


def _in_stretches(
    weights: Float[Tensor, "batch vocab"], points: Float[Tensor, "batch one"]
) -> tuple[Int[Tensor, "batch one"], Float[Tensor, "batch one"]]:
    """See `_whole`."""
    vocab = weights.shape[1]
    stretches = torch.nn.functional.pad(weights, (0, -vocab % STRETCH)).unflatten(1, (-1, STRETCH))
    reached = _running_sums(stretches.sum(-1, dtype=torch.float64))
    wanted = points * reached[:, -1:]
    stretch = _first_beyond(reached, wanted)
    before = torch.where(stretch > 0, reached.gather(1, (stretch - 1).clamp_min(0)), 0.0)
    within = stretches.gather(1, stretch[:, :, None].expand(-1, -1, STRETCH))[:, 0].double()
    token = stretch * STRETCH + _first_beyond(_running_sums(within), wanted - before)
    return token.clamp_max(vocab - 1), reached[:, -1:]


def _running_sums(weights: Float[Tensor, "batch places"]) -> Float[Tensor, "batch places"]:
    """The sum of each place and all before it. On a GPU as a product: `cumsum` is none of torch's deterministic
    algorithms there, so that `trainer.deterministic` would refuse it."""
    if weights.device.type == "cpu":
        return weights.cumsum(-1)
    return weights @ weights.new_ones(weights.shape[1], weights.shape[1]).triu()


def _first_beyond(
    reached: Float[Tensor, "batch places"], wanted: Float[Tensor, "batch one"]
) -> Int[Tensor, "batch one"]:
    """The first place at which more than the wanted sum is reached; none that adds nothing to it, by rounding neither.

    A token of probability 0 covers no part of the line and is never hit. Where sums are no numbers, some place.
    """
    last = torch.searchsorted(reached, reached[:, -1:].contiguous()).clamp_max(reached.shape[1] - 1)
    return torch.minimum(torch.searchsorted(reached, wanted, right=True), last)
