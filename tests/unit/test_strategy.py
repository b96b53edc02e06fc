"""Weights that rest in CPU memory while a GPU computes: nothing takes the mesh's device for theirs.

There need be no GPU: the mesh says it is made of them, and what would move there fails or is found there.
"""

from collections.abc import Iterator

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchmetrics import MeanMetric

from align import checkpoints, distributed
from align.modules.base import gradient_norm, scale_gradients
from align.modules.sft import SFTModule
from align.optim import Optim
from align.strategy import FSDP

SHAPES = {"matrix": (37, 300), "vector": (5,)}


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    """Of two GPUs, of which this process has the second; messages do nothing."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cuda", (2,))
    dist.destroy_process_group()


class Module(L.LightningModule):
    """With sharded weights at rest, one that is whole, and what is not a weight."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            place = distributed.sharded_zeros(shape, torch.float32, mesh=mesh, device="cpu")
            setattr(self, name, nn.Parameter(distributed.sharded_like(torch.randn(shape), place)))
        self.whole = nn.Linear(2, 2)
        self.register_buffer("buffer", torch.ones(3))
        self.metric = MeanMetric()

    def sharded(self) -> list[nn.Parameter]:
        return [getattr(self, name) for name in SHAPES]


def rests(tensor: object) -> bool:
    return isinstance(tensor, DTensor) and tensor.device.type == "cpu" and tensor.to_local().device.type == "cpu"


def test_a_rank_has_its_rows(mesh: DeviceMesh) -> None:
    whole = torch.arange(15.0).view(5, 3)
    part = distributed.sharded_like(whole, distributed.sharded_zeros((5, 1), torch.float32, mesh=mesh, device="cpu"))
    assert rests(part) and part.shape == whole.shape and part.stride() == whole.stride()
    assert torch.equal(distributed.own_part(part), whole[3:])
    assert distributed.own_rows(1, mesh) == (1, 1)  # fewer rows than ranks: the last have none


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion8bit"])
def test_the_optimizer_steps_where_the_weights_rest(mesh: DeviceMesh, name: str) -> None:
    module = Module(mesh)
    networks = {"module": nn.ParameterList(module.sharded())}
    optimizer, _ = Optim(lr=0.1, name=name).build(networks, steps=2)  # type: ignore[arg-type]
    strategy = FSDP(cpu_offload=True)
    strategy._optimizers = [optimizer]
    for _ in range(2):
        before = [distributed.own_part(parameter).clone() for parameter in module.sharded()]
        for parameter in module.sharded():
            parameter.grad = distributed.sharded_like(torch.ones(parameter.shape), parameter)
        norm = gradient_norm(module.sharded())
        assert norm.device.type == "cpu"
        scale_gradients(module.sharded(), norm, 1.0)
        optimizer.step()
        after = [distributed.own_part(parameter) for parameter in module.sharded()]
        assert all((one != other).all() for one, other in zip(before, after, strict=True))
        states = [value for state in optimizer.state.values() for value in state.values()]
        assert all(value.device.type == "cpu" for value in states if isinstance(value, torch.Tensor))
        assert any(rests(value) for value in states)
        strategy.load_optimizer_state_dict({"optimizer_states": [optimizer.state_dict()]})


def test_a_checkpoint_is_read_into_cpu_memory(mesh: DeviceMesh) -> None:
    module, shards = Module(mesh), {}
    tree = checkpoints._taken_out({"state_dict": module.state_dict()}, shards)
    read: dict[str, torch.Tensor] = {}
    state = checkpoints._put_back(tree, read, mesh)["state_dict"]
    assert read.keys() == shards.keys() and all(rests(tensor) for tensor in read.values())
    strategy = FSDP(cpu_offload=True)
    strategy._lightning_module = module
    state["whole.weight"] = distributed.sharded_like(torch.ones(2, 2), module.matrix)  # was sharded, now is whole
    strategy.load_model_state_dict({"state_dict": state})
    assert all(rests(parameter) and not distributed.own_part(parameter).any() for parameter in module.sharded())
    assert not isinstance(module.whole.weight, DTensor)


def test_all_but_sharded_weights_moves_to_the_device(mesh: DeviceMesh) -> None:
    module, strategy = Module(mesh), FSDP(cpu_offload=True)
    strategy._lightning_module, strategy.parallel_devices = module, [torch.device("meta")]
    before = module.sharded()
    strategy.model_to_device()
    assert all(one is other and rests(one) for one, other in zip(module.sharded(), before, strict=True))
    assert module.whole.weight.is_meta and module.buffer.is_meta and module.metric.mean_value.is_meta
    assert module.device == torch.device("meta")


def test_float16_and_weights_in_cpu_memory_are_refused() -> None:
    strategy = FSDP(cpu_offload=True)
    strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    module = SFTModule(model=tiny.llama(), tokenizer=tiny.tokenizer(), optim=Optim(lr=1.0))
    with pytest.raises(ValueError, match=r"got 16-mixed with cpu_offload: true.*expected bf16-mixed or 32-true"):
        strategy.shard(module)
