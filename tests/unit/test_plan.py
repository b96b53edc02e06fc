"""What a plan counts, beside the tensors that are really made."""

import pytest
import tiny
import torch

from align import plan
from align.modules.ppo import PPO, PPOModule
from align.modules.sft import SFTModule
from align.optim import Optim
from align.rollout.sampler import DecodeSampler


def module(name: str = "adamw", **changes: object) -> SFTModule:
    model = tiny.llama(hidden_size=128, intermediate_size=256, **changes).train()
    optim = Optim(lr=1e-3, name=name)  # type: ignore[arg-type]
    return SFTModule(model=model, tokenizer=tiny.tokenizer(), optim=optim, micro_batch_tokens=512)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion", "lion8bit"])
def test_weights_gradients_and_optimizer_state_are_exact(name: str) -> None:
    one = module(name)
    (share,) = plan.plan(one, plan.Setting(tokens=512, optimizer=name)).shares
    optimizer, _ = one.optim.build(one.networks(), steps=1)
    for parameter in one.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert share.weights == sum(t.nbytes for t in (*one.model.parameters(), *one.model.buffers()))
    assert share.gradients == sum(p.grad.nbytes for p in one.model.parameters() if p.grad is not None)
    states = [value for state in optimizer.state.values() for value in state.values()]
    made = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.ndim)
    assert share.optimizer == pytest.approx(made, rel=0.01)


def test_what_is_shared_falls_with_the_number_of_ranks() -> None:
    one = module()
    alone, shared = (plan.plan(one, plan.Setting(ranks=n, sharded=n > 1, tokens=512)) for n in (1, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(shared.shares[0], name) == pytest.approx(getattr(alone.shares[0], name) / 4, rel=0.02)
    assert shared.shares[0].activations == alone.shares[0].activations
    blocks = [sum(p.nbytes for p in block.parameters()) for block in one.model.model.layers]
    whole = sum(p.nbytes for p in one.model.parameters())
    assert shared.gathered == whole - sum(blocks) + 2 * max(blocks) and alone.gathered == 0


def test_what_rests_in_cpu_memory_is_not_on_the_gpu() -> None:
    one = module()
    usual, apart = (plan.plan(one, plan.Setting(ranks=2, sharded=True, offloaded=o, tokens=512)) for o in (False, True))
    (share,) = usual.shares
    assert apart.kept == 0 and apart.update == usual.update - share.weights - share.gradients - share.optimizer
    held = plan.shown(share.weights + share.gradients + share.optimizer)
    assert f"in CPU memory {held}" in apart.lines()[-1] and "CPU" not in usual.lines()[-1]


def test_frozen_models_that_stay_whole_count_whole() -> None:
    one = PPOModule(
        policy=tiny.llama(), value=tiny.scalar_model(), reward=tiny.scalar_model(), tokenizer=tiny.tokenizer(),
        sampler=DecodeSampler(max_new_tokens=4), optim=Optim(lr=1e-3), ppo=PPO(),
    )  # fmt: skip
    found = {
        keeps: {share.name: share.weights for share in plan.plan(one, plan.Setting(
            ranks=2, sharded=True, keeps_frozen=keeps, dtype=torch.bfloat16, tokens=64)).shares}
        for keeps in (False, True)
    }  # fmt: skip
    assert found[True]["reference"] == 2 * sum(p.numel() for p in one.reference.parameters())
    assert found[False]["reference"] == found[False]["policy"] == found[True]["policy"]


def test_activations_grow_with_tokens_and_shrink_by_checkpointing() -> None:
    one = module(num_hidden_layers=8)
    few, many = (plan.activations(one.model, plan.Setting(tokens=tokens)) for tokens in (512, 2048))
    assert many == pytest.approx(4 * few, rel=0.02)
    one.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert plan.activations(one.model, plan.Setting(tokens=512)) < 0.3 * few
    assert one.model.is_gradient_checkpointing


def test_a_plan_is_a_table() -> None:
    lines = plan.plan(module(), plan.Setting(tokens=512)).lines()
    assert lines[0].split() == ["memory", "per", "process", "weights", "gradients", "optimizer", "activations"]
    assert lines[1].split()[0] == "model" and "at a time" in lines[-1]
