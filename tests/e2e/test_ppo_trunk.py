"""PPO with value and reward model on the policy's weights computes what it computes with models of their own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from unit.modules.test_ppo import TEXTS, Collecting, data, stale

from align.models import adapters, forward, packed
from align.models.adapters import OWN, LoRA
from align.models.heads import ScalarModel
from align.models.load import load_causal_lm, load_scalar_model, save_model
from align.models.quantised import is_quantised
from align.models.trunk import Adapter, Head, TrunkModel
from align.modules.ppo import PPO
from align.optim import Optim
from align.rollout.sampler import DecodeSampler

TARGETS = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and a reward model that is an adapter of it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(initializer_range=0.1).save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    reward = scalar(folder)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in adapters.named_parameters(reward.hf, OWN):
        parameter.detach().normal_(std=0.2, generator=generator)
    reward.bias = 0.25
    save_model(reward, tiny.tokenizer(), folder / "reward")
    return folder


def scalar(folder: Path, **options: Any) -> ScalarModel:
    return load_scalar_model(str(folder / "base"), lora=LoRA(rank=3, alpha=6.0, targets=TARGETS), seed=1, **options)


def policy(folder: Path, rank: int = 4, **options: Any) -> Any:
    return load_causal_lm(str(folder / "base"), lora=LoRA(rank=rank, alpha=8.0), seed=2, **options)


def module(value: Any, reward: Any, policy: Any, name: str = "adamw", lr: float = 1e-2, **ppo: Any) -> Collecting:
    return Collecting(
        policy=policy, value=value, reward=reward, sampler=DecodeSampler(max_new_tokens=9, temperature=0.7),
        tokenizer=tiny.tokenizer(), ppo=PPO(**ppo), optim=Optim(lr=lr, name=name), micro_batch_tokens=40,  # type: ignore[arg-type]
    )  # fmt: skip


def own_models(folder: Path, **options: Any) -> tuple[ScalarModel, ScalarModel]:
    """The reward model of the folder twice, with weights of its own and the adapter as it was trained."""
    found = []
    for _ in range(2):
        model = scalar(folder, **options)
        saved = adapters.read(copy.deepcopy(model.hf), folder / "reward" / "adapter", name="x", trained=True)
        other = copy.deepcopy(model.hf)
        adapters.read(other, folder / "reward" / "adapter", name="x", trained=True)
        values = dict(adapters.named_parameters(other, "x"))
        for name, parameter in adapters.named_parameters(model.hf, OWN):
            parameter.detach().copy_(values[name.replace(f".{OWN}.", ".x.")])
        model.head.weight.detach().copy_(saved["score.weight"])
        model.bias = 0.25
        found.append(model)
    return found[0], found[1]


def learned(ppo: Collecting) -> dict[str, Tensor]:
    """What the policy and the value network learn, by names that do not say where it lies."""
    found = {f"policy.{name}": p.detach() for name, p in adapters.named_parameters(ppo.policy, OWN)}
    adapter = ppo.value.adapter if isinstance(ppo.value, TrunkModel) else OWN
    found |= {
        f"value.{name.replace(f'.{adapter}.', '.')}": p.detach()
        for name, p in adapters.named_parameters(ppo.value.hf, adapter)
    }
    return found | {"value.head": ppo.value.head.weight.detach()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_adapters_on_the_policy_learn_what_models_of_their_own_learn(
    folder: Path, tmp_path: Path, checkpointing: bool, name: str
) -> None:
    adapter = Adapter(path=str(folder / "reward"))
    shared = module(adapter, adapter, policy(folder, gradient_checkpointing=checkpointing), name, ptx_coef=0.5)
    apart = module(*own_models(folder), policy(folder), name, ptx_coef=0.5)
    before = {place: value.clone() for place, value in learned(shared).items()}
    texts = {"pretraining": TEXTS, "pretraining_batch": 5, "max_pretraining_tokens": 20}
    for ppo, run in ((shared, "shared"), (apart, "apart")):
        tiny.fit(ppo, data(**texts), tmp_path / run)
    assert len(shared.seen) == 4
    for (batch, metrics), (other_batch, other) in zip(shared.seen, apart.seen, strict=True):
        assert torch.equal(batch.episodes.completions.ids, other_batch.episodes.completions.ids)
        assert metrics.keys() == other.keys()
        for key in metrics.keys() - {key for key in metrics if key.startswith("speed/")}:
            torch.testing.assert_close(metrics[key].float(), other[key].float(), rtol=1e-4, atol=1e-6, msg=key)
    ours, theirs = learned(shared), learned(apart)
    assert ours.keys() == theirs.keys() == before.keys()
    for place, value in ours.items():
        torch.testing.assert_close(value, theirs[place], rtol=1e-4, atol=1e-5, msg=place)
    moved = [place for place, value in ours.items() if not torch.equal(value, before[place])]
    assert {place.partition(".")[0] for place in moved} == {"policy", "value"}
    assert sum(p.numel() for p in shared.parameters()) < 0.5 * sum(p.numel() for p in apart.parameters())


def test_the_reference_is_the_policy_without_its_adapter(folder: Path, tmp_path: Path) -> None:
    adapter = Adapter(path=str(folder / "reward"))
    ppo = module(adapter, adapter, policy(folder, quantise="4bit"))
    assert ppo.reference is None and is_quantised(ppo.policy)
    frozen = {name: p.clone() for name, p in ppo.named_parameters() if not p.requires_grad}
    tiny.fit(ppo, data(), tmp_path)
    batch, metrics = ppo.seen[0]
    assert float(metrics["policy/ratio_max"]) == 1.0 and float(metrics["policy/approx_kl"]) == 0.0
    assert batch.fresh is not None and torch.equal(batch.fresh.logprobs, batch.fresh.ref_logprobs)
    assert tiny.logged(tmp_path, "rollout/kl")[0] == 0.0 != tiny.logged(tmp_path, "rollout/kl")[1]
    now = dict(ppo.named_parameters())
    assert any(".reward." in name for name in frozen)
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())


def test_the_reward_is_that_of_the_reward_stage_bias_and_all(folder: Path) -> None:
    adapter = Adapter(path=str(folder / "reward"))
    ppo, merged = module(adapter, adapter, policy(folder)), load_scalar_model(str(folder / "reward"))
    episodes = tiny.completions([3, 4], [5, 2])
    with torch.no_grad():
        scores = ppo.score(episodes)
        theirs = forward.final_scores(merged, episodes.ids, episodes.lengths)
    torch.testing.assert_close(scores, theirs, rtol=1e-4, atol=1e-5)
    assert ppo.reward.bias == merged.bias == 0.25


def headed(coefficient: float, **llama: Any) -> Collecting:
    ppo = module(
        Head(), tiny.scalar_model(2), tiny.llama(initializer_range=0.1, **llama), lr=1e-3, value_coef=coefficient
    )
    torch.nn.init.normal_(ppo.value.head.weight, std=0.3)
    return ppo


@pytest.mark.parametrize("coefficient", [0.0, 0.1, 2.0])
def test_a_head_on_the_policy_adds_its_loss_with_a_weight_in_one_pass(folder: Path, coefficient: float) -> None:
    ppo, passes = headed(coefficient), []
    ppo.policy.base_model.register_forward_hook(lambda *_: passes.append(1))
    episodes = tiny.completions([3, 4, 2], [5, 2, 6])
    groups = len(packed.micro_batches(episodes.lengths, 40))
    rollout = rollout_of(ppo, episodes)
    assert len(passes) == groups + 2  # a trial of the policy's head takes two
    passes.clear()
    ours = tiny.gradients(ppo, ppo.ppo_losses(rollout))
    assert len(passes) == groups < 3

    def pieces() -> Any:
        count = rollout.mask.sum()
        for group in packed.micro_batches(episodes.lengths, 40):
            part = whitened(ppo, rollout).rows_at(group)
            ids = forward.fitted(part.completions.ids, part.completions.lengths)
            scored = forward.fitted(part.completions.token_mask, part.completions.lengths)
            logprobs = forward.by_response(forward.token_logprobs(ppo.policy, ids, scored, 0.7), part.mask)
            yield ppo.policy_piece(logprobs, part, count)
            loss, stats = ppo.value_loss(
                forward.by_response(forward.token_values(ppo.value, ids, scored), part.mask), part, count
            )
            yield coefficient * loss, stats

    tiny.assert_same_gradients(ours, tiny.gradients(ppo, pieces()))
    assert (ours["value.projection.weight"].abs().max() > 0.0) == (coefficient > 0.0)


def rollout_of(ppo: Collecting, episodes: Any) -> Any:
    """A rollout of these episodes from which the policy has moved since."""
    from align.rollout.collect import Scored, token_passes

    with torch.no_grad():
        passes = token_passes(
            episodes, policy=ppo.policy, reference=ppo.reference, value=ppo.value, temperature=0.7, minibatch=3,
            split=ppo.split, hydra=ppo.frozen.hydra, device=torch.device("cpu"),
        )  # fmt: skip
        scored = Scored(completions=episodes, passes=passes, scores=torch.tensor([1.0, -1.0, 0.5]))
        ppo._collecting = {}
        return stale(ppo._rollout_of(scored))


def whitened(ppo: Collecting, rollout: Any) -> Any:
    from dataclasses import replace

    return replace(rollout, advantages=ppo._whitened(rollout, rollout.mask.sum()))


def test_a_head_begins_at_zero_and_learns_with_the_policy(tmp_path: Path) -> None:
    ppo = module(Head(), tiny.scalar_model(2), tiny.llama(initializer_range=0.1), lr=1e-3, value_coef=0.1)
    assert not ppo.value.head.weight.any()
    tiny.fit(ppo, data(), tmp_path)
    first = ppo.seen[0][0].fresh
    assert first is not None and not first.values.any()
    assert float(ppo.seen[0][1]["policy/ratio_max"]) == 1.0
    assert ppo.value.head.weight.any()
    assert {group["name"] for group in ppo.optimizers().param_groups} == {"policy", "value"}


def test_a_model_that_caps_its_logits_takes_two_passes_for_the_same(tmp_path: Path) -> None:
    model = tiny.families()["gemma2"]
    value = Head().on(model, "value", trained=True)
    torch.nn.init.normal_(value.head.weight)
    episodes = tiny.completions([3, 4], [5, 2])
    both = forward.token_logprobs_and_values(model, value, episodes.ids, episodes.token_mask)
    assert torch.equal(both[0], forward.token_logprobs(model, episodes.ids, episodes.token_mask))
    assert torch.equal(both[1], forward.token_values(value, episodes.ids, episodes.token_mask))


def test_a_quantised_reference_is_a_frozen_copy_in_few_bits() -> None:
    ppo = Collecting(
        policy=tiny.llama(), value=tiny.scalar_model(1), reward=tiny.scalar_model(2), quantise_reference="8bit",
        sampler=DecodeSampler(max_new_tokens=9), tokenizer=tiny.tokenizer(), ppo=PPO(), optim=Optim(lr=1e-3),
    )  # fmt: skip
    assert is_quantised(ppo.reference) and not is_quantised(ppo.policy)
    assert not any(parameter.requires_grad for parameter in ppo.reference.parameters())
    assert all(parameter.requires_grad for parameter in ppo.policy.parameters())
    episodes = tiny.completions([3, 4], [5, 2])
    own, other = (forward.token_logprobs(m, episodes.ids, episodes.token_mask) for m in (ppo.policy, ppo.reference))
    assert 0.0 < float((own - other).abs().mean()) < 0.05


def test_what_cannot_be_shared_is_refused(folder: Path) -> None:
    adapter = Adapter(path=str(folder / "reward"))
    with pytest.raises(ValueError, match=r"value: an Adapter needs a policy with frozen weights; give module.policy"):
        module(adapter, adapter, tiny.llama())
    with pytest.raises(ValueError, match=r"reward: .*base has no adapter/adapter_config.json"):
        module(Head(), Adapter(path=str(folder / "base")), policy(folder))
    with pytest.raises(ValueError, match=r"quantise_reference: got 4bit, but with lora the reference is the policy"):
        Collecting(
            policy=policy(folder), value=Head(), reward=tiny.scalar_model(2), quantise_reference="4bit",
            sampler=DecodeSampler(max_new_tokens=9), tokenizer=tiny.tokenizer(), ppo=PPO(), optim=Optim(lr=1e-3),
        )  # fmt: skip
    frozen = load_causal_lm(str(folder / "base"), quantise="4bit")
    with pytest.raises(ValueError, match="policy: has no weight that learns"):
        Optim(lr=1.0).build({"policy": frozen}, steps=1)
