"""The reward model: K forwards for all pairs of a prompt, divisors, centring, and its metrics by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from align.data.comparisons import ComparisonData
from align.models import packed, trials
from align.models.attention import use_attend
from align.modules.ranking import RankingMetrics
from align.modules.reward import RewardModule, prompt_groups
from align.optim import Optim
from align.types import Comparisons

ROWS = [
    {
        "prompt": f"w{3 + i}",
        "responses": [f"w{9 + j} w{5 + i}" for j in range(4)],
        "scores": [3, 1, 2, 2],
        "labeler": "a",
    }
    for i in range(6)
]


def module(micro_batch_tokens: int = 1000, **changes: object) -> RewardModule:
    return RewardModule(
        model=tiny.scalar_model(), tokenizer=tiny.tokenizer(), optim=Optim(lr=1e-3),
        micro_batch_tokens=micro_batch_tokens, **changes,
    )  # fmt: skip


def batch() -> Comparisons:
    episodes = tiny.completions([3, 3, 3, 5, 5, 2, 2, 2], [4, 1, 7, 5, 3, 2, 2, 6])
    return Comparisons(
        ids=episodes.ids,
        lengths=episodes.lengths,
        response_lengths=episodes.response_lengths,
        prompt_index=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]),
        scores=torch.tensor([1.0, 2.0, 2.0, 5.0, 4.0, 1.0, 1.0, 1.0]),
        labelers=("a",) * 3 + ("b",) * 2 + ("",) * 3,
    )


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_a_prompt_is_computed_once_for_the_same_gradient(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "BAND_TOKENS", 0)  # no answer is filled up to another's length
    text = batch()
    ids = text.ids.clone()
    for rows, prompt in ((slice(0, 3), 3), (slice(3, 5), 5), (slice(5, 8), 2)):
        ids[rows, :prompt] = ids[rows, :prompt][:1].clone()
    text = replace(text, ids=ids)
    found, computed = [], []
    for share in (True, False):
        reward = module(budget, share_prompts=share)
        use_attend(reward.model.hf)
        assert trials.shares_prompts(reward.model.hf, torch.device("cpu"))
        seen: list[int] = []
        reward.model.hf.base_model.embed_tokens.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(inputs[0].numel())
        )
        found.append(tiny.gradients(reward, reward.losses(text)))
        computed.append(sum(seen))
        torch.testing.assert_close(reward.rewards_of_all(text), rewards_alone(reward, text), rtol=1e-4, atol=1e-4)
    tiny.assert_same_gradients(*found)
    own = int(text.response_lengths.sum())
    assert computed[0] == own + 3 + 5 + 2 and computed[1] >= own + 3 * 3 + 2 * 5 + 3 * 2


def rewards_alone(reward: RewardModule, text: Comparisons) -> torch.Tensor:
    return torch.stack([reward.rewards(text.ids[i : i + 1], text.lengths[i : i + 1])[0] for i in range(len(text.ids))])


@pytest.mark.parametrize(("divisor", "share"), [("kept_pairs", 2), ("all_pairs", 3)])
def test_loss_equals_the_sum_over_explicit_pairs(divisor: str, share: int) -> None:
    reward, text = module(divisor=divisor), batch()
    r = rewards_alone(reward, text)
    first = sum(-torch.nn.functional.logsigmoid(r[w] - r[0]) for w in (1, 2)) / share  # 3 pairs, one a tie
    second = -torch.nn.functional.logsigmoid(r[3] - r[4])
    expected = (first + second) / 2  # the third prompt's answers all tie
    total = sum(loss for loss, _ in reward.losses(text))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 30])
def test_micro_batches_do_not_change_the_gradient(budget: int) -> None:
    whole, cut, text = module(), module(micro_batch_tokens=budget), batch()
    assert len(list(cut.losses(text))) > 1
    tiny.assert_same_gradients(tiny.gradients(cut, cut.losses(text)), tiny.gradients(whole, whole.losses(text)))


def test_each_completion_is_computed_once_a_step() -> None:
    reward, seen = module(micro_batch_tokens=30), []
    reward.model.hf.base_model.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    list(reward.losses(batch()))
    assert sum(seen) == 8


def test_prompts_stay_whole_and_within_the_budget() -> None:
    text = batch()
    groups = prompt_groups(text.prompt_index, text.lengths, 30)
    assert [group.tolist() for group in groups] == [[0, 1, 2], [3, 4], [5, 6, 7]]  # 3x10, 2x10, 3x8 tokens
    assert [len(group) for group in prompt_groups(text.prompt_index, text.lengths, 50)] == [5, 3]
    assert [len(group) for group in prompt_groups(text.prompt_index, text.lengths, 80)] == [8]


def test_after_training_demonstrations_average_zero(tmp_path: Path) -> None:
    demonstrations = [{"prompt": f"w{3 + i}", "response": f"w{7 + i}"} for i in range(9)]
    split = ComparisonData(
        tokenizer=tiny.tokenizer(), train=ROWS, batch_size=2, max_prompt_tokens=9, max_response_tokens=9,
        demonstrations=demonstrations,
    )  # fmt: skip
    reward = module()
    trainer = tiny.fit(reward, split, tmp_path / "run")
    assert trainer.global_step == 3
    assert reward.model.bias != 0.0
    means = torch.cat([reward.rewards_of_all(part) for part in split.demonstration_batches()])
    assert len(means) == 9 and float(means.mean()) == pytest.approx(0.0, abs=1e-5)
    reward.export(tmp_path / "hf")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    assert again.config.reward_bias == pytest.approx(reward.model.bias)


def test_it_learns_which_answers_are_preferred(tmp_path: Path) -> None:
    split = ComparisonData(
        tokenizer=tiny.tokenizer(), train=ROWS, valid=ROWS, batch_size=3, max_prompt_tokens=9, max_response_tokens=9
    )
    tiny.fit(module(), split, tmp_path, max_epochs=12)
    assert tiny.logged(tmp_path, "valid/accuracy")[-1] == 1.0
    assert tiny.logged(tmp_path, "train/loss")[-1] < 0.1 < tiny.logged(tmp_path, "train/loss")[0]


def test_ranking_metrics_by_hand() -> None:
    metrics, text = RankingMetrics(), batch()
    rewards = torch.tensor([0.0, 1.0, -1.0, 3.0, 1.0, 0.0, 0.0, 0.0])
    metrics.update(rewards, text)
    found = {name: float(value) for name, value in metrics.compute().items()}
    # Kept pairs: 1 over 0 (+1, right), 2 over 0 (-1, wrong), 3 over 4 (+2, right). Ties: one, and three of prompt 2.
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_with_ties"] == pytest.approx((2 + 0.5 * 4) / 7)
    assert found["margin"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.softplus(torch.tensor([-1.0, 1.0, -2.0])).mean()))
    assert found["accuracy_longer"] == pytest.approx(2 / 3)  # 1 < 4 wrong, 7 > 4 right, 5 > 3 right
    assert found["accuracy/a"] == pytest.approx(1 / 2) and found["accuracy/b"] == pytest.approx(1.0)
    # Row by row: P(0 before 1) = σ(-1), label 0; P(0 before 2) = σ(1), label 0; P(3 before 4) = σ(2), label 1.
    # Each probability falls into a bin of its own, so the error is the mean distance of probability and label.
    gaps = [torch.tensor(-1.0).sigmoid(), torch.tensor(1.0).sigmoid(), 1 - torch.tensor(2.0).sigmoid()]
    assert found["calibration_error"] == pytest.approx(float(sum(gaps)) / 3, rel=1e-5)
    metrics.reset()
    assert metrics.compute() == {}


def test_equal_rewards_are_half_right() -> None:
    metrics, text = RankingMetrics(), batch()
    metrics.update(torch.zeros(8), text)
    assert float(metrics.compute()["accuracy"]) == 0.5


def test_scores_do_not_depend_on_the_other_rows() -> None:
    reward, text = module(), batch()
    with torch.no_grad(), trials.evaluating(reward):
        together = reward.rewards(text.ids, text.lengths)
        torch.testing.assert_close(together, rewards_alone(reward, text), rtol=1e-4, atol=1e-5)
