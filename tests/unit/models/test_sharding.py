"""A model that is gathered, and how long it stays so."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from align.models import deferred, forward, load, sharding
from align.models.hydra import Hydra
from align.models.packed import micro_batches
from align.rollout.collect import token_passes


@pytest.fixture
def alone(tmp_path: Path):
    """A process group of this process alone, in which FSDP2 shards as ever."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def gatherings(monkeypatch: pytest.MonkeyPatch, *models: torch.nn.Module) -> list[int]:
    """How often each model's outermost part is gathered: counts that grow."""
    counts = [0] * len(models)
    for place, model in enumerate(models):
        original = model.unshard

        def unshard(*, place: int = place, original=original) -> None:
            counts[place] += 1
            original()

        monkeypatch.setattr(model, "unshard", unshard)
    return counts


def test_an_inner_block_does_not_free_what_an_outer_one_holds(alone) -> None:
    model = tiny.llama()
    sharding.shard(model, alone, device=torch.device("cpu"))
    with sharding.gathered(model):
        with sharding.gathered(model):
            assert not sharding.is_sharded(model)
        assert not sharding.is_sharded(model)
        sharding.free(model)
        assert sharding.is_sharded(model)
    assert sharding.is_sharded(model)


def test_the_first_look_at_a_models_head_leaves_it_gathered(alone) -> None:
    model = tiny.llama().eval()
    sharding.shard(model, alone, device=torch.device("cpu"))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), sharding.gathered(model):
        forward.token_logprobs(model, ids, torch.arange(6)[None] > 2)
        assert not sharding.is_sharded(model)


def test_each_model_is_gathered_once_and_freed_before_the_next(alone, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference, value = tiny.llama(), tiny.llama(seed=1), tiny.scalar_model()
    models = (policy, reference, value.hf)
    for model in models:
        sharding.shard(model.eval(), alone, device=torch.device("cpu"))
    counts = gatherings(monkeypatch, *models)
    whole: list[tuple[bool, ...]] = []
    for name in ("token_logprobs_and_entropies", "token_logprobs", "token_values"):
        original = getattr(forward, name)

        def noted(*arguments, original=original, **keywords):
            whole.append(tuple(not sharding.is_sharded(model) for model in models))
            return original(*arguments, **keywords)

        monkeypatch.setattr(forward, name, noted)
    with torch.no_grad(), sharding.gathered(policy):
        token_passes(
            tiny.completions([4, 3], [3, 5]), policy=policy, reference=reference, value=value, temperature=1.0,
            minibatch=1, split=lambda lengths: micro_batches(lengths, 64), hydra=Hydra(policy),
            device=torch.device("cpu"),
        )  # fmt: skip
        assert sharding.is_sharded(policy)
    assert counts == [1, 1, 1]
    assert whole == [(True, False, False)] * 2 + [(False, True, False)] * 2 + [(False, False, True)] * 2


def test_weights_at_rest_compute_the_same(alone) -> None:
    whole, model = tiny.llama(), tiny.llama()
    sharding.shard(model, alone, device=torch.device("cpu"), cpu_offload=True)
    ids, mask = torch.arange(3, 15).view(2, 6), torch.arange(6).expand(2, -1) > 1
    for one in (whole, model):
        forward.token_logprobs(one, ids, mask).sum().backward()
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one.grad.full_tensor(), other.grad)


def test_a_model_that_stays_whole_reads_its_weights(tmp_path: Path) -> None:
    tiny.llama(tied=True).save_pretrained(tmp_path)
    with deferred.weights():
        model = load.frozen(load.load_causal_lm(str(tmp_path)))
    deferred.fill(model, torch.device("cpu"))
    expected = load.load_causal_lm(str(tmp_path))
    assert load.fingerprint(model) == load.fingerprint(expected)
    ids, mask = torch.arange(3, 15).view(2, 6), torch.arange(6).expand(2, -1) > 1
    assert torch.equal(forward.token_logprobs(model, ids, mask), forward.token_logprobs(expected, ids, mask))


def test_a_converted_model_keeps_the_fingerprint_of_what_was_read() -> None:
    model, before = load.frozen(tiny.llama()), load.fingerprint(tiny.llama())
    load.convert(model, torch.bfloat16)
    assert load.fingerprint(model) == before != load.fingerprint(tiny.llama().bfloat16())
    assert all(parameter.dtype == torch.bfloat16 and not parameter.requires_grad for parameter in model.parameters())
