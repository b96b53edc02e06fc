"""PPO by hand: rollout, scoring and update with four networks.

Prompts are padded on the left and answers on the right. Every pass computes the logits of all places, as the obvious
code does.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel

from tools.benchmark.protocol import Turn
from tools.benchmark.work import CLIP, EOS, GAMMA, KL, LAMBDA, LEARNING_RATE, PAD, VALUE_COEF, Work

TINY = 1e-8
"""Added to a variance before it divides."""


@dataclass(frozen=True)
class Episodes:
    """What the update needs of a rollout; `mask` is True at response tokens."""

    ids: Int[Tensor, "batch time"]
    prompt: int
    mask: Bool[Tensor, "batch response"]
    logprobs: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"]


def ppo(work: Work) -> Callable[[], Turn]:
    """Loads the networks; the result collects a rollout and learns from it."""
    policy = AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32)
    reference = copy.deepcopy(policy).requires_grad_(False)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(work.reward, dtype=torch.float32) for _ in range(2)
    )  # fmt: skip
    learned = nn.ModuleList([policy, value])
    optimizer = torch.optim.AdamW(learned.parameters(), lr=LEARNING_RATE, fused=True)
    prompts = left_padded(work.episodes)

    def turn() -> Turn:
        start = time.perf_counter()
        with torch.no_grad():
            ids = generated(policy, prompts, work.size.response.high)
            sampled = time.perf_counter()
            episodes = scored(ids, prompts.shape[1], policy, reference, value, reward)
        collected = time.perf_counter()
        for _ in range(work.size.epochs):
            logprobs = token_logprobs(policy, ids, episodes.prompt)
            values = token_values(value, ids)[:, episodes.prompt - 1 : -1]
            loss = objective(logprobs, values, episodes)
            optimizer.zero_grad()
            loss.backward()
            for network in learned:
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        ended = time.perf_counter()
        phases = {"rollout": sampled - start, "scoring": collected - sampled, "update": ended - collected}
        return Turn(ended - start, len(ids), phases)

    return turn


def rollout(work: Work) -> Callable[[], Turn]:
    """Only the answers."""
    policy = AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32)
    prompts = left_padded(work.prompts)

    def turn() -> Turn:
        start = time.perf_counter()
        ids = generated(policy, prompts, work.size.response.high)
        return Turn(time.perf_counter() - start, int((ids[:, prompts.shape[1] :] != PAD).sum()))

    return turn


def left_padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "batch prompt"]:
    """Prompts that end in the same column."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*[PAD] * (width - len(row)), *row] for row in rows])


@torch.no_grad()
def generated(policy: PreTrainedModel, prompts: Int[Tensor, "batch prompt"], limit: int) -> Int[Tensor, "batch time"]:
    """Prompts with their answers, padded on the right."""
    settings = GenerationConfig(
        max_new_tokens=limit, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=PAD, eos_token_id=EOS
    )
    return policy.generate(prompts, attention_mask=(prompts != PAD).long(), generation_config=settings)  # type: ignore


def scored(
    ids: Int[Tensor, "batch time"],
    prompt: int,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    value: PreTrainedModel,
    reward: PreTrainedModel,
) -> Episodes:
    """Log-probabilities, values, reward; and from these advantages and returns."""
    mask = ids[:, prompt:] != PAD
    logprobs = token_logprobs(policy, ids, prompt) * mask
    kl = logprobs - token_logprobs(reference, ids, prompt) * mask
    values = token_values(value, ids)[:, prompt - 1 : -1] * mask
    rewards = -KL * kl
    last = mask.sum(1) - 1
    rewards[torch.arange(len(ids)), last] += token_values(reward, ids)[torch.arange(len(ids)), prompt + last]
    advantages = torch.zeros_like(rewards)
    ahead = torch.zeros(len(ids))
    for place in reversed(range(rewards.shape[1])):
        later = values[:, place + 1] if place + 1 < rewards.shape[1] else torch.zeros(len(ids))
        ahead = rewards[:, place] + GAMMA * later - values[:, place] + GAMMA * LAMBDA * ahead
        advantages[:, place] = ahead
    returns = advantages + values
    mean = masked_mean(advantages, mask)
    spread = masked_mean((advantages - mean).square(), mask)
    return Episodes(ids, prompt, mask, logprobs, values, (advantages - mean) * (spread + TINY).rsqrt(), returns)


def objective(
    logprobs: Float[Tensor, "batch response"], values: Float[Tensor, "batch response"], episodes: Episodes
) -> Float[Tensor, ""]:
    """Clipped policy loss and clipped value loss."""
    ratio = (logprobs - episodes.logprobs).exp()
    gains = torch.minimum(
        ratio * episodes.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * episodes.advantages
    )  # fmt: skip
    near = episodes.values + (values - episodes.values).clamp(-CLIP, CLIP)
    errors = torch.maximum((values - episodes.returns).square(), (near - episodes.returns).square())
    return -masked_mean(gains, episodes.mask) + 0.5 * VALUE_COEF * masked_mean(errors, episodes.mask)


def token_logprobs(
    model: PreTrainedModel, ids: Int[Tensor, "batch time"], prompt: int
) -> Float[Tensor, "batch response"]:
    """Of the response tokens; what stands at padding means nothing."""
    logits = model(**with_mask(ids)).logits[:, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]


def token_values(model: PreTrainedModel, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """The scalar head at every place."""
    return model.score(model.model(**with_mask(ids)).last_hidden_state)[..., 0]  # type: ignore[operator]


def with_mask(ids: Int[Tensor, "batch time"]) -> dict[str, Tensor]:
    """A model's input; positions count from the first token that is no padding."""
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def masked_mean(values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """The mean where the mask is True."""
    return (values * mask).sum() / mask.sum()
