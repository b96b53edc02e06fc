"""How many floating-point operations a piece of work needs, whoever does it: no padding, nothing computed twice.

And of writing responses, which reads more than it computes, how many bytes.

A product of a (m, k) and a (k, n) matrix counts 2mkn. Backward passes count twice their forward pass. Elementwise
operations, softmax and the optimizer are left out: they are few, and no peak of matrix products applies to them.
"""

from collections.abc import Iterable, Sequence

from tools.benchmark.work import Size, Work, response_length

TOGETHER = 256
"""Responses written at a time: `batch_size` of our samplers."""

TRAINING = 3
"""Forward and backward pass, in forward passes."""


def trunk(size: Size, tokens: int, attended: int) -> int:
    """A forward pass through all blocks.

    Args:
        size: The model's shape.
        tokens: How many pass.
        attended: Pairs of a token and one that it attends to, itself included.
    """
    weights = 2 * size.hidden**2 + 2 * size.hidden * shared_width(size) + 3 * size.hidden * size.inner
    return size.layers * (2 * weights * tokens + 4 * size.hidden * attended)


def shared_width(size: Size) -> int:
    """Numbers of a token's keys in a block, or of its values."""
    return size.hidden // size.sharing


def head(size: Size, tokens: int) -> int:
    """The logits of so many tokens."""
    return 2 * size.hidden * size.vocab * tokens


def causal(own: int, before: int = 0) -> int:
    """Pairs of so many tokens, each with those before it and itself; `before` more stand before all of them."""
    return own * before + own * (own + 1) // 2


def sft(size: Size, lengths: Iterable[tuple[int, int]]) -> int:
    """One pass of learning over demonstrations of (prompt, response) tokens; logits of the response only."""
    return TRAINING * sum(
        trunk(size, prompt + own, causal(prompt + own)) + head(size, own) for prompt, own in lengths
    )  # fmt: skip


def reward(size: Size, comparisons: Iterable[tuple[int, Sequence[int]]]) -> int:
    """One pass of learning over (prompt, answers) tokens: every prompt once for all of its answers."""
    return TRAINING * sum(
        trunk(size, prompt, causal(prompt)) + sum(trunk(size, own, causal(own, prompt)) for own in answers)
        for prompt, answers in comparisons
    )  # fmt: skip


def ppo_update(size: Size, episodes: Iterable[tuple[int, int]], epochs: int, networks: float = 2) -> int:
    """So many epochs over episodes of (prompt, response) tokens; two networks: a policy and a value network.

    Of networks in which only some blocks learn, only those count: what the others give is known from the rollout.
    """
    one_epoch = sum(
        networks * trunk(size, prompt + own, causal(prompt + own)) + head(size, own) for prompt, own in episodes
    )  # fmt: skip
    return int(TRAINING * epochs * one_epoch)


def read(size: Size, responses: Iterable[tuple[int, int]], together: int, itemsize: int = 2) -> int:
    """Bytes that are read at least to write responses of (prompt, response) tokens, so many at a time.

    Every step reads all weights but the input embeddings, and the keys and values of what each response has so far.
    That steps are as few as can be takes all places to be full to the end; prompts are computed for nothing.
    """
    pairs = list(responses)
    block = 2 * size.hidden**2 + 2 * size.hidden * shared_width(size) + 3 * size.hidden * size.inner
    weights = size.layers * block + size.vocab * size.hidden
    steps = -(-sum(own for _, own in pairs) // together)
    seen = sum(causal(own, prompt) for prompt, own in pairs)
    return itemsize * (weights * steps + 2 * size.layers * shared_width(size) * seen)


def of(kind: str, work: Work, networks: float = 2) -> int:
    """What one turn of a kind of work needs; of PPO, only its updates of so many networks; of writing, bytes."""
    if kind == "rollout":
        return read(work.size, [(len(prompt), response_length(prompt, work.size)) for prompt in work.prompts], TOGETHER)
    if kind == "sft":
        return sft(work.size, [(len(row["prompt"]), len(row["response"])) for row in work.demonstrations])
    if kind == "ppo":
        episodes = [(len(prompt), response_length(prompt, work.size)) for prompt in work.episodes]
        return ppo_update(work.size, episodes, work.size.epochs, networks)
    rows = work.comparisons[int(kind.removeprefix("reward"))]
    return reward(work.size, [(len(row["prompt"]), [len(answer) for answer in row["responses"]]) for row in rows])
