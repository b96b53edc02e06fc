"""The reward model's ranking loss: worked examples, an explicit loop over pairs, and the two divisors under ties."""

import itertools

import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from align.formulas.losses import (
    Pairs,
    compared_prompts,
    pair_weights_all,
    pair_weights_kept,
    preference_pairs,
    ranking_loss,
    reward_bias,
)

# Prompt 0 has K = 4 with one tie, so 5 of 6 pairs; prompt 1 has K = 5 without ties, so 10 pairs.
REWARDS = tensor([1.2, 0.3, -0.5, 0.1, 0.0, 0.4, 0.2, -0.1, 0.6])
SCORES = -tensor([1.0, 2.0, 3.0, 3.0, 3.0, 1.0, 2.0, 5.0, 4.0])
PROMPTS = tensor([0] * 4 + [1] * 5)


def loss_kept(rewards: Tensor, scores: Tensor, prompt_index: Tensor) -> Tensor:
    """The loss of a whole batch with the default divisor."""
    pairs = preference_pairs(scores, prompt_index)
    return ranking_loss(rewards, pairs, pair_weights_kept(pairs, compared_prompts(pairs)))


def test_pairs_are_ordered_and_within_a_prompt() -> None:
    pairs = preference_pairs(tensor([1.0, 3.0, 2.0, 2.0, 9.0]), tensor([7, 7, 2, 2, 7]))
    found = set(zip(pairs.winner.tolist(), pairs.loser.tolist(), pairs.prompt_index.tolist(), strict=True))
    assert found == {(1, 0, 7), (4, 0, 7), (4, 1, 7)}
    assert pairs.completions.tolist() == [3, 3, 3]


def test_one_prompt_with_a_tie() -> None:
    pairs = preference_pairs(SCORES[:4], PROMPTS[:4])
    assert len(pairs.winner) == 5
    kept = ranking_loss(REWARDS[:4], pairs, pair_weights_kept(pairs, 1))
    assert_close(kept, tensor(0.353103), rtol=1e-5, atol=0)
    possible = ranking_loss(REWARDS[:4], pairs, pair_weights_all(pairs, 1))
    assert_close(possible, tensor(0.294252), rtol=1e-5, atol=0)


def test_each_prompt_counts_the_same() -> None:
    """The mean of 0.353103 and 0.653395, not the mean 0.553298 over all 15 pairs."""
    assert_close(loss_kept(REWARDS[4:], SCORES[4:], PROMPTS[4:]), tensor(0.653395), rtol=1e-5, atol=0)
    assert_close(loss_kept(REWARDS, SCORES, PROMPTS), tensor(0.503249), rtol=1e-5, atol=0)


def test_loss_is_an_explicit_loop_over_pairs() -> None:
    sizes, expected, expected_all = [2, 9, 4, 7], [], []
    rewards, scores = torch.randn(22, dtype=torch.float64), torch.randint(0, 4, (22,)).double()
    prompt_index = torch.repeat_interleave(torch.arange(4), tensor(sizes))
    scores[:2] = tensor([0.0, 1.0])
    for prompt, size in enumerate(sizes):
        rows = (prompt_index == prompt).nonzero()[:, 0].tolist()
        terms = [
            torch.log1p(torch.exp(rewards[j] - rewards[i]))
            for i, j in itertools.permutations(rows, 2)
            if scores[i] > scores[j]
        ]
        expected.append(sum(terms) / len(terms))
        expected_all.append(sum(terms) / (size * (size - 1) / 2))
    order = torch.randperm(22)
    shuffled = loss_kept(rewards[order], scores[order], prompt_index[order])
    assert_close(shuffled, torch.stack(expected).mean(), rtol=1e-6, atol=0)
    pairs = preference_pairs(scores, prompt_index)
    actual = ranking_loss(rewards, pairs, pair_weights_all(pairs, compared_prompts(pairs)))
    assert_close(actual, torch.stack(expected_all).mean(), rtol=1e-6, atol=0)


def test_weights_sum_to_one_over_kept_pairs() -> None:
    pairs = preference_pairs(SCORES, PROMPTS)
    assert_close(pair_weights_kept(pairs, compared_prompts(pairs)).sum(), tensor(1.0))
    assert_close(pair_weights_all(pairs, tensor(2)).sum(), tensor((5 / 6 + 1) / 2))


def test_a_prompt_of_ties_does_not_count() -> None:
    rewards, scores = torch.cat([REWARDS, tensor([5.0, -5.0])]), torch.cat([SCORES, tensor([1.0, 1.0])])
    prompt_index = torch.cat([PROMPTS, tensor([2, 2])])
    assert compared_prompts(preference_pairs(scores, prompt_index)) == 2
    assert_close(loss_kept(rewards, scores, prompt_index), loss_kept(REWARDS, SCORES, PROMPTS), rtol=0, atol=0)


def test_a_batch_of_ties_gives_no_loss_and_no_gradient() -> None:
    rewards = tensor([5.0, -5.0], requires_grad=True)
    loss = loss_kept(rewards, tensor([1.0, 1.0]), tensor([0, 0]))
    loss.backward()
    assert loss == 0.0
    assert_close(rewards.grad, tensor([0.0, 0.0]))


def test_prompts_in_micro_batches_add_up() -> None:
    """Loss and gradient are sums over micro-batches of whole prompts, given the count of the whole batch."""
    whole = REWARDS.clone().requires_grad_()
    total = loss_kept(whole, SCORES, PROMPTS)
    total.backward()
    parts, shares = REWARDS.clone().requires_grad_(), []
    for rows in (slice(0, 4), slice(4, 9)):
        pairs = preference_pairs(SCORES[rows], PROMPTS[rows])
        shares.append(ranking_loss(parts[rows], pairs, pair_weights_kept(pairs, 2)))
    torch.stack(shares).sum().backward()
    assert_close(torch.stack(shares).sum(), total)
    assert_close(parts.grad, whole.grad)


def test_only_differences_of_rewards_matter_and_wide_ones_stay_finite() -> None:
    pairs = Pairs(winner=tensor([0]), loser=tensor([1]), prompt_index=tensor([0]), completions=tensor([2]))
    rewards = tensor([-500.0, 500.0], requires_grad=True)
    loss = ranking_loss(rewards, pairs, tensor([1.0]))
    loss.backward()
    assert_close(loss.detach(), tensor(1000.0))
    assert_close(rewards.grad, tensor([-1.0, 1.0]))
    assert_close(loss_kept(REWARDS + 3.0, SCORES, PROMPTS), loss_kept(REWARDS, SCORES, PROMPTS), rtol=1e-5, atol=0)


def test_gradient_agrees_with_finite_differences() -> None:
    rewards = REWARDS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_kept(x, SCORES, PROMPTS), rewards)


def test_reward_bias() -> None:
    assert reward_bias(tensor([1.0, 2.0, 6.0])) == 3.0
