"""Paged state: the same bits as state that stays, with plain memory in the place of what CUDA manages."""

from pathlib import Path

import pytest
import tiny
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from align import distributed, optim
from align.blockwise import Blockwise
from align.optim import Optim, parsed

LARGE, SMALL = (400, 300), (10, 300)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """CPU memory that says it is paged; the addresses of what is allocated and prefetched."""
    seen: dict[str, list[int]] = {"made": [], "prefetched": []}

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made = torch.full(shape, 7, dtype=dtype)  # what was there before
        made.is_paged, made.page_deviceid = True, device.index  # type: ignore[attr-defined]
        seen["made"].append(made.data_ptr())
        return made

    monkeypatch.setattr(functional, "get_paged", get_paged)
    monkeypatch.setattr(functional, "prefetch_tensor", lambda tensor: seen["prefetched"].append(tensor.data_ptr()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return seen


def made(parameters: list[nn.Parameter], rule: str, bits: int, is_paged: bool) -> Blockwise:
    group = {"params": parameters, "bits": bits, "weight_decay": 0.1}
    return Blockwise([group], rule=rule, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, paged=is_paged)  # type: ignore[arg-type]


def steps(optimizer: Blockwise, first: int, last: int) -> None:
    parameters = optimizer.param_groups[0]["params"]
    for number in range(first, last):
        for parameter in parameters:
            grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.grad = distributed.sharded_like(grad, parameter)
        optimizer.step()


def start() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in (LARGE, SMALL)]


def assert_same(one: Blockwise, other: Blockwise) -> None:
    pair = [optimizer.param_groups[0]["params"] for optimizer in (one, other)]
    for own, theirs in zip(*pair, strict=True):
        assert torch.equal(distributed.whole_tensor(own.detach()), distributed.whole_tensor(theirs.detach()))
        states = one.state[own], other.state[theirs]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            found, expected = value, states[1][name]
            if isinstance(value, Tensor):
                assert torch.equal(distributed.whole_tensor(found), distributed.whole_tensor(expected)), name
            else:
                assert found == expected


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_paged_state_has_the_bits_of_other_state(pages, rule: str, bits: int) -> None:
    one, other = made(start(), rule, bits, True), made(start(), rule, bits, False)
    steps(one, 0, 3)
    steps(other, 0, 3)
    assert_same(one, other)
    moments = 2 if rule == "adamw" else 1
    large = one.state[one.param_groups[0]["params"][0]]
    addresses = [large[f"state{number}"].data_ptr() for number in range(1, moments + 1)]
    assert pages["made"] == addresses and pages["prefetched"] == 3 * addresses  # of the large one alone


def test_a_loaded_state_is_paged_again(pages) -> None:
    one, other = made(start(), "adamw", 8, True), made(start(), "adamw", 8, False)
    steps(one, 0, 2)
    saved = [parameter.detach().clone() for parameter in one.param_groups[0]["params"]]
    continued = made([nn.Parameter(tensor) for tensor in saved], "adamw", 8, True)
    continued.load_state_dict(one.state_dict())
    assert not continued.state  # so that nothing can be moved to the GPU
    assert continued.state_dict()["state"].keys() == {0, 1}
    assert len(pages["made"]) == 4
    steps(continued, 2, 4)
    steps(other, 0, 4)
    assert_same(continued, other)
    assert pages["prefetched"][-2:] == pages["made"][2:]


def test_sharded_state_is_paged_memory_too(pages, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        places = [distributed.sharded_zeros(shape, torch.float32, mesh=mesh, device="cpu") for shape in (LARGE, SMALL)]
        sharded = [nn.Parameter(distributed.sharded_like(p.detach(), q)) for p, q in zip(start(), places, strict=True)]
        one, other = made(sharded, "adamw", 8, True), made(start(), "adamw", 8, False)
        steps(one, 0, 3)
        steps(other, 0, 3)
        assert_same(one, other)
        moment = one.state[sharded[0]]["state1"]
        assert isinstance(moment, DTensor) and moment.shape[0] == LARGE[0]
        assert [one.state[sharded[0]][f"state{n}"].to_local().data_ptr() for n in (1, 2)] == pages["made"]
        assert pages["prefetched"] == 3 * pages["made"]
    finally:
        dist.destroy_process_group()


def test_names_say_rule_bits_and_whether_state_is_paged() -> None:
    assert {name: parsed(name) for name in optim.Name.__args__} == {
        "adamw": ("adamw", 32, False), "adamw8bit": ("adamw", 8, False),
        "lion": ("lion", 32, False), "lion8bit": ("lion", 8, False),
        "paged_adamw": ("adamw", 32, True), "paged_adamw8bit": ("adamw", 8, True),
        "paged_lion": ("lion", 32, True), "paged_lion8bit": ("lion", 8, True),
    }  # fmt: skip


def test_without_a_cuda_device_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (error,) = Optim.config_errors({"lr": 1.0, "name": "paged_lion8bit"})
    assert error.startswith("name: got paged_lion8bit, whose state is in CUDA managed memory")
    assert error.endswith("expected one, or lion8bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Optim.config_errors({"lr": 1.0, "name": "paged_lion8bit"}) == []


def test_weights_elsewhere_are_refused() -> None:
    with pytest.raises(
        ValueError, match="got paged_adamw, but the weights of policy are on cpu, expected a CUDA device"
    ):
        Optim(lr=1.0, name="paged_adamw").build({"policy": tiny.llama()}, steps=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit", "lion"])
def test_on_a_gpu_too(name: str) -> None:
    """Three steps, a checkpoint, three more; with and without pages."""
    rule, bits, _ = parsed(name)
    found = []
    for is_paged in (True, False):
        optimizer = made([nn.Parameter(p.detach().cuda()) for p in start()], rule, bits, is_paged)
        steps_on_gpu(optimizer, 0, 3)
        state = {key: value.clone() if isinstance(value, Tensor) else value
                 for key, value in optimizer.state_dict()["state"][0].items()}  # fmt: skip
        assert getattr(optimizer.state_dict()["state"][0]["state1"], "is_paged", False) is is_paged
        saved = optimizer.state_dict()
        saved["state"][0] = state
        again = made(optimizer.param_groups[0]["params"], rule, bits, is_paged)
        again.load_state_dict(saved)
        steps_on_gpu(again, 3, 6)
        found.append([p.detach().cpu() for p in again.param_groups[0]["params"]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def steps_on_gpu(optimizer: Blockwise, first: int, last: int) -> None:
    for number in range(first, last):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).cuda()
        optimizer.step()
