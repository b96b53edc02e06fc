"""A whole PPO batch against TRL 1.12.0, from log-probs to weights after two updates. README.md says what is recorded.

Where the conventions differ the test maps ours onto theirs, and says so:
the score stands one token after EOS there, so their values, rewards and returns cover one token more (`extended`);
their whitening divides by the number of tokens less one; they average each micro-batch on its own.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from align.formulas.losses import clipped_value_loss, policy_loss
from align.formulas.masked import masked_mean, masked_var, standardise
from align.formulas.returns import generalized_advantages, kl_k1, missing_eos_subtract, token_rewards
from align.models.forward import by_response, final_scores, token_logprobs, token_values
from align.models.heads import ScalarModel
from align.optim import Optim
from align.types import Completions

HERE = Path(__file__).parent
RUN = json.loads((HERE / "trl112_k1.json").read_text())
CONFIG = RUN["config"]
TEMPERATURE = CONFIG["temperature"] + 1e-7  # TRL adds this before it divides
PAD = RUN["pad"]
MICRO_BATCHES = 4  # two to an update: the numbers 0 and 1 make the first update, 2 and 3 the second

assert_same = functools.partial(assert_close, rtol=1e-6, atol=1e-8)
"""For what both sides compute from the same recorded tensors."""

assert_near = functools.partial(assert_close, rtol=1e-5, atol=1e-5)
"""For what models compute, whose float32 sums round in another order; log-probs here reach −10, values and scores 5."""


@functools.cache
def recorded() -> dict[str, Tensor]:
    """Every tensor of TRL's batch."""
    return load_file(HERE / "trl112_k1.safetensors")


def micro(number: int, name: str) -> Tensor:
    """A tensor of one of TRL's micro-batches."""
    return recorded()[f"micro{number}.{name}"]


def load(cls: type[PreTrainedModel], name: str) -> PreTrainedModel:
    """One of the four networks with its weights from before the first update."""
    model = cls(LlamaConfig(**{**RUN["model"], "id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}))
    weights = load_file(HERE / "trl112_k1_weights.safetensors")
    model.load_state_dict({key[len(name) + 1 :]: weights[key] for key in weights if key.startswith(f"{name}.")})
    return model


@functools.cache
def completions() -> Completions:
    """The batch in our layout: unpadded prompts with their responses up to EOS, filled on the right."""
    o = recorded()
    prompts = [query[query != PAD] for query in o["queries"]]
    rows = [torch.cat([prompt, response]) for prompt, response in zip(prompts, o["responses"], strict=True)]
    return Completions(
        ids=nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        response_lengths=o["sequence_lengths"] + 1,
        finished=o["contain_eos_token"],
        rows=({},) * len(rows),
    )


@functools.cache
def extended() -> Completions:
    """The same with one more token counted after each EOS, where TRL puts the score if there is room."""
    lengths = (completions().response_lengths + 1).clamp(max=CONFIG["response_length"])
    return replace(completions(), response_lengths=lengths)


def logprobs_of(model: PreTrainedModel, batch: Completions, mask: Tensor) -> Tensor:
    """Log-probs at the sampling temperature, by response."""
    return by_response(token_logprobs(model, batch.ids, batch.token_mask, TEMPERATURE), mask)


def test_layout_maps() -> None:
    """Our masks are the complements of theirs, and every finished response ends with EOS."""
    assert (completions().mask == ~recorded()["padding_mask"]).all()
    assert (extended().mask == ~recorded()["padding_mask_p1"]).all()
    last = completions().ids[torch.arange(16), completions().lengths - 1]
    assert ((last == RUN["eos"]) == completions().finished).all()
    assert completions().finished.sum() == 13


def test_rollout_from_the_models() -> None:
    """Log-probs, KL, values and scores of our forward passes, and the returns that follow from them."""
    o, batch, mask = recorded(), completions(), completions().mask
    with torch.no_grad():
        logprobs = logprobs_of(load(LlamaForCausalLM, "policy"), batch, mask)
        ref_logprobs = logprobs_of(load(LlamaForCausalLM, "ref"), batch, mask)
        value, reward = (ScalarModel(load(LlamaForSequenceClassification, name)) for name in ("value", "reward"))
        values = by_response(token_values(value, batch.ids, extended().token_mask), extended().mask)
        scores = final_scores(reward, batch.ids, batch.lengths)
    assert_near(logprobs[mask], o["logprobs"][mask])
    assert_near(ref_logprobs[mask], o["ref_logprobs"][mask])
    assert_close(kl_k1(logprobs, ref_logprobs), o["kl"], rtol=1e-5, atol=2e-5)  # two roundings
    assert_near(values, o["values"])
    scores = missing_eos_subtract(scores, batch.finished, CONFIG["missing_eos_penalty"])
    assert_near(scores, o["scores"])
    mask = extended().mask
    rewards = token_rewards(logprobs, ref_logprobs, scores, mask, CONFIG["kl_coef"])
    _, returns = generalized_advantages(rewards, values, mask, gamma=CONFIG["gamma"], lam=CONFIG["lam"])
    assert_near(returns, o["returns"])


def test_token_rewards() -> None:
    """Equal to theirs with the extended mask; with ours, the score moves from the token after EOS onto EOS."""
    o, mask = recorded(), completions().mask
    arguments = (o["logprobs"], o["ref_logprobs"], o["scores"])
    assert_same(token_rewards(*arguments, extended().mask, CONFIG["kl_coef"]), o["rewards"])
    ours = token_rewards(*arguments, mask, CONFIG["kl_coef"])
    assert_close(ours.sum(1), o["rewards"].sum(1), rtol=1e-5, atol=1e-6)
    last = completions().response_lengths - 1
    moved = o["non_score_reward"].scatter_add(1, last[:, None], o["scores"][:, None])
    assert_same(ours, torch.where(mask, moved, torch.zeros_like(moved)))


def test_advantages_and_returns() -> None:
    o, mask = recorded(), completions().mask
    advantages, returns = generalized_advantages(
        o["rewards"], o["values"], extended().mask, gamma=CONFIG["gamma"], lam=CONFIG["lam"]
    )
    assert_same(returns, o["returns"])
    count = mask.sum()
    unbiased = masked_var(advantages, mask) * count / (count - 1)
    whitened = standardise(advantages, mask, mean=masked_mean(advantages, mask), variance=unbiased)
    assert_same(whitened, o["advantages"])


@pytest.mark.parametrize("number", range(MICRO_BATCHES))
def test_losses_and_stats(number: int) -> None:
    """Both losses and their clip fractions from the recorded log-probs and values of each micro-batch."""
    o, rows = recorded(), micro(number, "inds")
    mask, value_mask = completions().mask[rows], extended().mask[rows]
    tokens, value_tokens = mask.sum(), value_mask.sum()
    policy, stats = policy_loss(
        micro(number, "new_logprobs"),
        o["logprobs"][rows],
        o["advantages"][rows],
        mask,
        clip=CONFIG["cliprange"],
        count=tokens,
    )
    value, value_stats = clipped_value_loss(
        micro(number, "vpred"),
        o["values"][rows],
        o["returns"][rows],
        value_mask,
        clip=CONFIG["cliprange_value"],
        count=value_tokens,
    )
    assert_same(policy, micro(number, "pg_loss"))
    assert_same(value, micro(number, "vf_loss"))
    assert_same(policy + CONFIG["vf_coef"] * value, micro(number, "loss"))
    assert_same(stats["clip_fraction"], micro(number, "pg_clipfrac"))
    assert_same(value_stats["clip_fraction"], micro(number, "vf_clipfrac"))
    # TRL averages these two over padding as well, where log-ratio is 0 and ratio 1.
    assert_same(stats["approx_kl"] * tokens / mask.numel(), micro(number, "approxkl"))
    padding = mask.numel() - tokens
    assert_same((stats["ratio"] * tokens + padding) / mask.numel(), micro(number, "ratio").mean())


def test_two_updates() -> None:
    """Gradients of the first update, log-probs and values before each micro-batch, weights after both updates."""
    policy = load(LlamaForCausalLM, "policy")
    value = ScalarModel(load(LlamaForSequenceClassification, "value"))
    networks: dict[str, nn.Module] = {"policy": policy, "value_model": value.hf}
    # The recorded learning rate is stepped once a batch, so it is the same in both updates.
    optim = Optim(lr=CONFIG["learning_rate"], betas=(0.9, 0.999), epsilon=1e-8, max_grad_norm=0.0)
    optimizer, _ = optim.build(networks, steps=2)
    for number in range(MICRO_BATCHES):
        _accumulate(policy, value, number)
        if number < 2:
            _check_gradients(networks, number)
        if number % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    loose = total = 0
    for name, network in networks.items():
        for key, weight in network.named_parameters():
            ours, theirs = weight.detach(), recorded()[f"{name.removesuffix('_model')}_after.{key}"]
            # Adam's first step is lr · sign(g): where g is all rounding, which differs from CPU to CPU, so is the step.
            first = micro(1, f"grad.{name}.{key}").abs()
            rounding = (first > 0.0) & (first < 1e-6 * first.max())
            assert_close(ours[~rounding], theirs[~rounding], rtol=1e-5, atol=2e-6)
            assert_close(ours[rounding], theirs[rounding], rtol=1e-5, atol=2.0 * CONFIG["learning_rate"])
            loose, total = loose + int(rounding.sum()), total + rounding.numel()
    assert loose < 1e-4 * total


def _accumulate(policy: PreTrainedModel, value: ScalarModel, number: int) -> None:
    """Adds the gradient of one micro-batch, half of the update; each half is a mean over its own tokens."""
    o, rows = recorded(), micro(number, "inds")
    batch, longer = completions().rows_at(rows), extended().rows_at(rows)
    mask, value_mask = completions().mask[rows], extended().mask[rows]
    logprobs = logprobs_of(policy, batch, mask)
    values = by_response(token_values(value, longer.ids, longer.token_mask), value_mask)
    assert_near(logprobs[mask], micro(number, "new_logprobs")[mask])
    assert_near(values, micro(number, "vpred"))
    policy_share, _ = policy_loss(
        logprobs,
        o["logprobs"][rows],
        o["advantages"][rows],
        mask,
        clip=CONFIG["cliprange"],
        count=2 * mask.sum(),
    )
    value_share, _ = clipped_value_loss(
        values,
        o["values"][rows],
        o["returns"][rows],
        value_mask,
        clip=CONFIG["cliprange_value"],
        count=2 * value_mask.sum(),
    )
    (policy_share + CONFIG["vf_coef"] * value_share).backward()


def _check_gradients(networks: dict[str, nn.Module], number: int) -> None:
    """The gradients accumulated so far, each to 1e-5 of the largest entry of its parameter's gradient."""
    for name, network in networks.items():
        for key, weight in network.named_parameters():
            expected = micro(number, f"grad.{name}.{key}")
            assert weight.grad is not None
            assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
