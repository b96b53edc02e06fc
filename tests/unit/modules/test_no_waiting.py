"""A step asks its device for nothing: it runs on torch's meta device, which has no answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from align.models import forward, hydra, trials
from align.models.attention import use_attend
from align.models.trunk import Head
from align.modules.base import AlignModule
from align.modules.ppo import PPO, PPOModule
from align.modules.reward import RewardModule
from align.modules.sft import SFTModule
from align.optim import Optim
from align.rollout.sampler import DecodeSampler
from align.types import Comparisons, Rollout, Sequences, sent

META = torch.device("meta")
ASKING = {torch.ops.aten.masked_scatter_backward, torch.ops.aten.masked_select, torch.ops.aten.nonzero}
"""What a GPU must be waited for, though torch knows it on the meta device."""

IDS = torch.randint(3, tiny.VOCAB, (6, 12), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([12, 9, 5, 12, 7, 4])
MASK = (torch.arange(12) >= 2) & (torch.arange(12) < LENGTHS[:, None])
TEXT = Sequences(ids=IDS, lengths=LENGTHS, mask=MASK)
RANKED = Comparisons(
    ids=IDS, lengths=LENGTHS, response_lengths=LENGTHS - 2, prompt_index=torch.tensor([0, 0, 0, 1, 1, 1]),
    scores=torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 2.0]), labelers=("",) * 6,
)  # fmt: skip


class NothingOfBoth(TorchDispatchMode):
    """Counts operations on the device, and refuses those that also take numbers from host memory and so wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor.is_meta for tensor in given if tensor.is_meta or tensor.ndim]
        self.count += any(there)
        assert all(there) or not any(there), f"{func} takes tensors of both: {[given.shape for given in given]}"
        assert not any(there) or func.overloadpacket not in ASKING, f"{func} makes as much as the device's numbers say"
        return func(*args, **(kwargs or {}))


def learned(module: AlignModule, losses: Callable[[], Any]) -> None:
    """Forward and backward passes of a batch on the meta device, after the trial passes that a model has once."""
    for loss, _ in losses():
        loss.backward()
    module.to(META)
    module.zero_grad()
    with NothingOfBoth() as seen:
        for loss, stats in losses():
            loss.backward()
            assert loss.is_meta and all(value.is_meta for value in stats.values())
    assert seen.count > 500
    for network in module.networks().values():
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def ours(model: PreTrainedModel) -> PreTrainedModel:
    """As models are loaded."""
    use_attend(model)
    return model


def common() -> dict[str, Any]:
    return {"tokenizer": tiny.tokenizer(), "optim": Optim(lr=1e-3), "micro_batch_tokens": 30}


def test_sft() -> None:
    module = SFTModule(model=ours(tiny.llama()), **common())
    learned(module, lambda: module.losses(TEXT))


def test_logits_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "LOGITS_PER_CHUNK", 3 * tiny.VOCAB)
    module = SFTModule(model=ours(tiny.llama()), **common())
    learned(module, lambda: module.losses(TEXT))


@pytest.mark.parametrize("share", [True, False])
def test_reward_model(share: bool) -> None:
    model = tiny.scalar_model(1)
    use_attend(model.hf)
    module = RewardModule(model=model, share_prompts=share, **common())
    assert trials.shares_prompts(model.hf, torch.device("cpu"))
    learned(module, lambda: module.losses(RANKED))


@pytest.mark.parametrize("kind", ["four networks", "one trunk", "frozen blocks"])
def test_ppo(kind: str) -> None:
    policy, value = ours(tiny.llama(tied=True)), tiny.scalar_model(1)
    use_attend(value.hf)
    if kind == "frozen blocks":
        hydra.freeze(policy, 1)
    module = PPOModule(
        policy=policy, value=Head() if kind == "one trunk" else value, reward=tiny.scalar_model(2),
        sampler=DecodeSampler(max_new_tokens=9, temperature=0.7), ppo=PPO(ptx_coef=0.5), **common(),
    )  # fmt: skip
    if kind == "frozen blocks":
        module.frozen.hydra = hydra.grow(policy, {"reference": module.reference})
        assert module.frozen.hydra.depth == 1
    episodes = rollout()

    def losses() -> Any:
        yield from module.pretraining_losses(TEXT)
        yield from module.ppo_losses(episodes)

    learned(module, losses)


def rollout() -> Rollout:
    """Of the same ids, the first two tokens being prompts."""
    noise = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    completions = replace(tiny.completions([2] * 6, (LENGTHS - 2).tolist()), ids=IDS)
    mask = completions.mask
    return Rollout(
        completions=completions, mask=mask, logprobs=-noise.abs() * mask, ref_logprobs=-noise.abs() * mask,
        values=noise * mask, entropies=noise.abs() * mask, scores=noise[:, 0], rewards=noise * mask,
        advantages=noise * mask, returns=noise * mask,
    )  # fmt: skip


def test_what_is_sent_is_all_of_it() -> None:
    there = sent(rollout(), META)
    assert all(part.is_meta for part in (there.mask, there.returns, there.completions.ids, there.completions.finished))
    assert there.completions.rows == rollout().completions.rows
    back = sent(replace(rollout(), scores=torch.arange(6.0)), torch.device("cpu"))
    assert back.scores.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sent_to_a_gpu_and_back() -> None:
    there = rollout().to("cuda")
    assert there.mask.is_cuda and there.completions.ids.is_cuda
    assert torch.equal(there.to("cpu").returns, rollout().returns)
