"""The loops that a competent user writes by hand with PyTorch and transformers, in an hour, without align or TRL.

Batches are padded to their longest sequence and carry an attention mask; logits are computed of all tokens. Each answer
that is compared is scored once, not once for each of its pairs. PPO has four networks, samples with transformers'
`generate` and learns from all episodes at once.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tools.benchmark.kinds import BFLOAT16, CUDA
from tools.benchmark.machine import done
from tools.benchmark.plain_ppo import ppo, rollout
from tools.benchmark.protocol import Turn
from tools.benchmark.work import LEARNING_RATE, PAD, Work

AT_ONCE = {CUDA: 8}
"""Demonstrations on a GPU: the logits of all tokens take 3 GB for eight of the longest."""

IGNORED = -100
"""The label of a token that is not learned."""


def prepare(kind: str, setting: str, work: Work, precision: str) -> Callable[[], Turn]:
    """Loads what a kind of work needs; the result does it once.

    Args:
        kind: See `tools.benchmark.kinds`.
        setting: There is only one.
        work: The common work.
        precision: bfloat16, by autocast, only on a GPU, and there only SFT.
    """
    if kind == "sft":
        return _sft(work, precision)
    if kind in ("ppo", "rollout"):
        return ppo(work) if kind == "ppo" else rollout(work)
    return _reward(work, int(kind.removeprefix("reward")))


def _sft(work: Work, precision: str) -> Callable[[], Turn]:
    model = AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32).train().to(work.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    tokens = sum(len(row["prompt"]) + len(row["response"]) for row in work.demonstrations)

    def losses(batch: list[Any]) -> Iterator[Tensor]:
        for rows in batches(batch, AT_ONCE.get(work.device, len(batch))):
            ids, mask = padded([row["prompt"] + row["response"] for row in rows], PAD)
            labels, _ = padded([[IGNORED] * len(row["prompt"]) + row["response"] for row in rows], IGNORED)
            ids, mask, wanted = (part.to(work.device) for part in (ids, mask.long(), labels[:, 1:]))
            with torch.autocast(work.device, torch.bfloat16, enabled=precision == BFLOAT16):
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
                loss = F.cross_entropy(logits, wanted.flatten(), ignore_index=IGNORED, reduction="sum")
            yield loss

    def turn() -> Turn:
        start = time.perf_counter()
        for rows in batches(work.demonstrations, work.size.batch):
            count = sum(len(row["response"]) for row in rows)
            step((loss / count for loss in losses(rows)), model, optimizer)
        done(work.device)
        return Turn(time.perf_counter() - start, tokens)

    return turn


def _reward(work: Work, count: int) -> Callable[[], Turn]:
    model = AutoModelForSequenceClassification.from_pretrained(work.reward, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    rows = work.comparisons[count]
    pairs = len(rows) * count * (count - 1) // 2

    def turn() -> Turn:
        start = time.perf_counter()
        for picked in batches(rows, work.size.compared[count]):
            ids, mask = padded([row["prompt"] + answer for row in picked for answer in row["responses"]], PAD)
            rewards = model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].view(len(picked), count)
            better, worse = ordered_pairs([row["scores"] for row in picked])
            place = torch.arange(len(picked))[:, None]
            loss = -F.logsigmoid(rewards[place, better] - rewards[place, worse]).mean()
            step([loss], model, optimizer)
        return Turn(time.perf_counter() - start, pairs)

    return turn


def batches(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """All rows in random order, so many at a time."""
    shuffled = random.sample(rows, len(rows))
    for start in range(0, len(rows), size):
        yield shuffled[start : start + size]


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Rows filled up on the right, and where they are."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) < lengths[:, None]


def ordered_pairs(
    scores: Sequence[Sequence[float]],
) -> tuple[Int[Tensor, "prompts pairs"], Int[Tensor, "prompts pairs"]]:
    """The better and the worse answer of every pair of each prompt, whose scores all differ."""
    pairs = [[sorted(pair, key=lambda one: -own[one]) for pair in combinations(range(len(own)), 2)] for own in scores]
    both = torch.tensor(pairs)
    return both[:, :, 0], both[:, :, 1]


def step(losses: Iterable[Float[Tensor, ""]], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One clipped optimizer step on the sum of losses."""
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
