"""PPO: identities at step 0, gradients that do not depend on cutting, ptx, the EOS rules, and that it learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jaxtyping import Float
from torch import Tensor

from align.callbacks.ema import EMA
from align.callbacks.kl import AdaptiveKL
from align.callbacks.tables import RolloutTable, SampleTable
from align.data.experience import ExperienceData
from align.formulas.returns import adaptive_kl
from align.models.attention import use_attend
from align.models.heads import ScalarModel
from align.modules.ppo import PPO, PPOModule
from align.optim import Optim
from align.rollout.collect import mismatch
from align.rollout.sampler import DecodeSampler
from align.types import Completions, Minibatch, Rollout, Sequences

ROWS = [{"prompt": " ".join(f"w{3 + (i * j) % 40}" for j in range(1, 3 + i % 5))} for i in range(32)]
TEXTS = [{"text": " ".join(f"w{5 + (i + j) % 30}" for j in range(6))} for i in range(20)]


class Collecting(PPOModule):
    """Keeps every batch it trains on."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: list[tuple[Minibatch, dict[str, Tensor]]] = []

    def training_step(self, batch: Minibatch, batch_idx: int) -> dict[str, Any]:
        out = super().training_step(batch, batch_idx)
        self.seen.append((batch, out["metrics"]))
        return out


def module(kind: type[PPOModule] = Collecting, micro_batch_tokens: int = 40, lr: float = 1e-3, **ppo: Any) -> PPOModule:
    return kind(
        policy=tiny.llama(initializer_range=0.1), value=tiny.scalar_model(1), reward=tiny.scalar_model(2),
        sampler=DecodeSampler(max_new_tokens=9, temperature=0.7), tokenizer=tiny.tokenizer(), ppo=PPO(**ppo),
        optim=Optim(lr=lr, max_grad_norm=0.0), micro_batch_tokens=micro_batch_tokens,
    )  # fmt: skip


def data(**changes: Any) -> ExperienceData:
    settings = {"train": ROWS, "episodes": 32, "rollout_batch": 16, "minibatch": 8, "max_prompt_tokens": 20}
    return ExperienceData(tokenizer=tiny.tokenizer(), **{**settings, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Collecting, Path]:
    """Two rollouts of two minibatches, learned twice each, at learning rate 0."""
    folder = tmp_path_factory.mktemp("run")
    ppo = module(lr=0.0)
    tiny.fit(ppo, data(epochs=2), folder)
    return ppo, folder  # type: ignore[return-value]


def test_first_ratio_is_exactly_one_and_kl_exactly_zero(run: tuple[Collecting, Path]) -> None:
    ppo, folder = run
    batch, metrics = ppo.seen[0]
    assert float(metrics["policy/ratio_max"]) == 1.0 and float(metrics["policy/approx_kl"]) == 0.0
    assert batch.fresh is not None and torch.equal(batch.fresh.logprobs, batch.fresh.ref_logprobs)
    assert tiny.logged(folder, "rollout/kl") == [0.0, 0.0] == tiny.logged(folder, "rollout/kl_k3")
    assert all(abs(float(stats["policy/ratio_max"]) - 1.0) < 1e-4 for _, stats in ppo.seen)  # lr 0: nothing moves


def test_first_ratio_is_exactly_one_in_bfloat16_too(tmp_path: Path) -> None:
    ppo = module()
    for model in (ppo.policy, ppo.reference):
        use_attend(model)
    tiny.fit(ppo, data(), tmp_path, precision="bf16-mixed")
    batch, metrics = ppo.seen[0]  # type: ignore[attr-defined]
    assert float(metrics["policy/ratio_max"]) == 1.0 and float(metrics["policy/approx_kl"]) == 0.0
    assert batch.fresh is not None and torch.equal(batch.fresh.logprobs, batch.fresh.ref_logprobs)


def test_one_minibatch_is_one_optimizer_step(run: tuple[Collecting, Path]) -> None:
    ppo, _ = run
    assert len(ppo.seen) == ppo.trainer.global_step == 8
    assert [batch.fresh is not None for batch, _ in ppo.seen] == [True, False, False, False] * 2


def test_the_score_reaches_the_last_token_and_only_it(run: tuple[Collecting, Path]) -> None:
    rollout = run[0].seen[0][0].fresh
    assert rollout is not None
    last = rollout.completions.response_lengths - 1
    at_last = rollout.rewards.gather(1, last[:, None])[:, 0]
    torch.testing.assert_close(at_last, rollout.scores)  # KL is 0, so the rewards are the score and nothing else
    assert float(rollout.rewards.sum()) == pytest.approx(float(rollout.scores.sum()), rel=1e-5)


def test_scores_are_the_reward_models_on_the_whole_text(run: tuple[Collecting, Path]) -> None:
    ppo, rollout = run[0], run[0].seen[0][0].fresh
    assert rollout is not None
    with torch.no_grad():
        for row in range(4):
            ids = rollout.completions.ids[row : row + 1, : int(rollout.completions.lengths[row])]
            hidden = ppo.reward.hf.base_model(ids).last_hidden_state[0, -1]
            torch.testing.assert_close(rollout.scores[row], ppo.reward.hf.score(hidden)[0], rtol=1e-4, atol=1e-5)


def test_it_is_told_how_far_the_sampler_is_from_what_is_learned(run: tuple[Collecting, Path]) -> None:
    ppo, folder = run
    rollout = ppo.seen[4][0].fresh  # in which some responses end early
    assert rollout is not None and rollout.completions.sampled_logprobs is not None
    assert max(tiny.logged(folder, "rollout/mismatch_max")) < 1e-4 and min(tiny.logged(folder, "rollout/mismatch")) > 0
    shifted = torch.where(rollout.mask, rollout.completions.sampled_logprobs + 1.0, torch.tensor(9.0))
    shifted[0, 0] -= 3.0
    off = replace(rollout, completions=replace(rollout.completions, sampled_logprobs=shifted))
    count = int(rollout.mask.sum())
    assert float(mismatch(off)["rollout/mismatch"]) == pytest.approx((count + 1) / count, rel=1e-4)
    assert float(mismatch(off)["rollout/mismatch_max"]) == pytest.approx(2.0, rel=1e-4)
    assert mismatch(replace(rollout, completions=replace(rollout.completions, sampled_logprobs=None))) == {}


def test_nothing_is_kept_outside_the_response(run: tuple[Collecting, Path]) -> None:
    rollout = run[0].seen[4][0].fresh  # the second one, in which some responses end early
    assert rollout is not None and not rollout.mask.all()
    for name in ("logprobs", "ref_logprobs", "values", "entropies", "rewards", "advantages", "returns"):
        assert not getattr(rollout, name)[~rollout.mask].any(), name
        assert getattr(rollout, name)[rollout.mask].any(), name


def stale(rollout: Rollout) -> Rollout:
    """As if the policy had moved since: ratios and values on both sides of the clip."""
    shift = torch.linspace(-0.5, 0.5, rollout.mask.numel()).reshape(rollout.mask.shape) * rollout.mask
    return replace(rollout, logprobs=rollout.logprobs + shift, values=rollout.values + shift)


@pytest.mark.parametrize("budget", [1, 20, 60])
def test_micro_batches_do_not_change_the_gradient(run: tuple[Collecting, Path], budget: int) -> None:
    episodes = stale(run[0].seen[0][0].episodes)
    whole, cut = module(micro_batch_tokens=10_000), module(micro_batch_tokens=budget)
    assert len(list(cut.ppo_losses(episodes))) > 1
    ours, theirs = (tiny.gradients(m, m.ppo_losses(episodes)) for m in (cut, whole))
    tiny.assert_same_gradients(ours, theirs)


def test_padding_columns_do_not_change_the_gradient(run: tuple[Collecting, Path]) -> None:
    from dataclasses import replace

    episodes, ppo = stale(run[0].seen[0][0].episodes), module()
    wider = replace(episodes.completions, ids=torch.nn.functional.pad(episodes.completions.ids, (0, 5), value=tiny.EOS))
    tiny.assert_same_gradients(
        tiny.gradients(ppo, ppo.ppo_losses(replace(episodes, completions=wider))),
        tiny.gradients(ppo, ppo.ppo_losses(episodes)),
    )


@pytest.mark.parametrize(
    "changed", [{"clip": 0.05}, {"value_clip": None}, {"value_clip": 0.01}, {"whiten_advantages": False}]
)
def test_every_update_option_changes_the_gradient(run: tuple[Collecting, Path], changed: dict[str, Any]) -> None:
    episodes = stale(run[0].seen[0][0].episodes)
    plain, other = (tiny.gradients(m, m.ppo_losses(episodes)) for m in (module(), module(**changed)))
    assert any(not torch.allclose(plain[name], other[name], rtol=1e-3) for name in plain)


def test_ptx_adds_gamma_times_the_pretraining_gradient_in_the_same_step(tmp_path: Path) -> None:
    ppo = module(ptx_coef=3.0, lr=0.0)
    grads: list[dict[str, Tensor]] = []
    step = ppo.step

    def spy() -> dict[str, Tensor]:
        grads.append({n: p.grad.clone() for n, p in ppo.policy.named_parameters() if p.grad is not None})
        return step()

    ppo.step = spy  # type: ignore[method-assign]
    texts = {"pretraining": TEXTS, "pretraining_batch": 5, "max_pretraining_tokens": 20}
    trainer = tiny.fit(ppo, data(**texts), tmp_path)
    assert trainer.global_step == 4 == len(grads)
    batch, metrics = ppo.seen[0]  # type: ignore[attr-defined]
    text = batch.pretraining
    assert isinstance(text, Sequences) and len(text.ids) == 5
    logits = ppo.policy(text.ids).logits[:, :-1].transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(logits, torch.where(text.mask, text.ids, -100)[:, 1:])
    assert float(metrics["ptx/loss"]) == pytest.approx(float(loss), rel=1e-5)
    lone = tiny.gradients(ppo.policy, [(3.0 * loss, None)])
    rl = {
        n[len("policy.") :]: g for n, g in tiny.gradients(ppo, ppo.ppo_losses(batch.episodes)).items() if "policy" in n
    }
    tiny.assert_same_gradients(grads[0], {name: lone[name] + rl[name] for name in lone})
    norm = torch.stack([g.norm() for g in lone.values()]).norm()
    assert float(metrics["grad_norm/ptx"]) == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(
    ("rule", "expected"), [("keep", [0.5, 0.5]), ("replace", [0.5, 2.0]), ("subtract", [0.5, -1.5])]
)
def test_the_eos_rule_touches_unfinished_responses_only(rule: Any, expected: list[float]) -> None:
    ppo = module(missing_eos=rule, missing_eos_value=2.0)
    assert ppo._with_eos_rule(torch.tensor([0.5, 0.5]), torch.tensor([True, False])).tolist() == expected


def test_reward_whitening_scales_token_rewards(tmp_path: Path) -> None:
    ppo = module(whiten_rewards=True, lr=0.0)
    tiny.fit(ppo, data(episodes=16), tmp_path)
    rollout = ppo.seen[0][0].fresh  # type: ignore[attr-defined]
    counted = rollout.rewards[rollout.mask]
    assert float(counted.var(correction=0)) == pytest.approx(1.0, rel=1e-3)
    raw = torch.zeros_like(counted)
    raw[rollout.completions.response_lengths.cumsum(0) - 1] = rollout.scores
    assert float(counted.mean()) == pytest.approx(float(raw.mean()), abs=1e-5)


def test_value_learning_rate_is_its_own_and_frozen_models_stay(tmp_path: Path) -> None:
    ppo = module()
    ppo.value_lr = 5e-3
    frozen = [p.clone() for model in (ppo.reference, ppo.reward) for p in model.parameters()]
    tiny.fit(ppo, data(), tmp_path)
    assert tiny.logged(tmp_path, "lr/policy")[0] == pytest.approx(1e-3)
    assert tiny.logged(tmp_path, "lr/value")[0] == pytest.approx(5e-3)
    after = [p for model in (ppo.reference, ppo.reward) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))
    assert tiny.logged(tmp_path, "rollout/kl")[0] == 0.0 != tiny.logged(tmp_path, "rollout/kl")[1]


def test_checkpoints_leave_the_frozen_models_out() -> None:
    ppo = module()
    checkpoint = {"state_dict": ppo.state_dict()}
    ppo.kl_coef = 0.3
    ppo.on_save_checkpoint(checkpoint)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"policy", "value"}
    other = module()
    other.on_load_checkpoint(checkpoint)
    assert other.kl_coef == 0.3


def test_greedy_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="PPO must sample"):
        PPOModule(
            policy=tiny.llama(), value=tiny.scalar_model(), reward=tiny.scalar_model(), tokenizer=tiny.tokenizer(),
            sampler=DecodeSampler(max_new_tokens=3, temperature=0.0), optim=Optim(lr=1.0), ppo=PPO(),
        )  # fmt: skip


def test_callbacks_control_kl_average_weights_and_write_tables(tmp_path: Path) -> None:
    ppo = module()
    start = {name: p.detach().clone() for name, p in ppo.policy.named_parameters()}
    history: list[dict[str, Tensor]] = []

    class Watch(EMA):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            history.append({name: p.detach().clone() for name, p in pl_module.policy.named_parameters()})

    ema = Watch(decay=0.9)
    sampler = DecodeSampler(max_new_tokens=4, temperature=1.0)
    callbacks = [
        AdaptiveKL(target=0.5, horizon=100.0), ema, RolloutTable(count=2, every=1),
        SampleTable(prompts=ROWS, sampler=sampler, count=3, every=2),
    ]  # fmt: skip
    tiny.fit(ppo, data(), tmp_path, callbacks)
    beta = 0.02
    for kl in tiny.logged(tmp_path, "rollout/kl"):
        beta = adaptive_kl(beta, kl, target=0.5, horizon=100.0, batch=16)
    assert ppo.kl_coef == pytest.approx(beta) and beta != 0.02
    average = start
    for weights in history:
        average = {name: 0.9 * average[name] + 0.1 * weights[name] for name in average}
    assert ema.average
    for name, value in ema.average.items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "hf-ema" / "model.safetensors").exists()
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 3 * 3  # before, after steps 2 and 4
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 2 * 2


class CountsTen(PPOModule):
    """A reward that no model computes: the share of the response that is token 10."""

    def score(self, completions: Completions) -> Float[Tensor, " batch"]:
        hits = ((completions.ids == 10) & completions.token_mask).sum(1)
        return hits / self.sampler.max_new_tokens  # type: ignore[attr-defined]


def test_it_learns_a_toy_reward(tmp_path: Path) -> None:
    ppo = CountsTen(
        policy=tiny.llama(initializer_range=0.1), value=tiny.scalar_model(1, initializer_range=0.1),
        reward=ScalarModel(tiny.scalar_model().hf), sampler=DecodeSampler(max_new_tokens=6), tokenizer=tiny.tokenizer(),
        ppo=PPO(kl_coef=0.0), optim=Optim(lr=3e-3, epsilon=1e-5), micro_batch_tokens=4096,
    )  # fmt: skip
    tiny.fit(ppo, data(episodes=64 * 25, rollout_batch=64, minibatch=32, epochs=2), tmp_path)
    scores = tiny.logged(tmp_path, "rollout/score")
    assert scores[0] < 0.1 and scores[-1] > 0.9
