"""The optimizers that a configuration can name."""

import copy

import pytest
import torch
from torch import nn

from align.optim import Optim


def trained(name: str, steps: int = 8) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A layer after some steps on gradients that are the same for every optimizer."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    optimizer, schedule = Optim(lr=1e-2, name=name).build({"layer": layer}, steps=steps)  # type: ignore[arg-type]
    for step in range(steps):
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        schedule.step()
    return layer, optimizer


def test_eight_bit_moments_take_a_byte_and_change_little() -> None:
    (plain, _), (small, optimizer) = trained("adamw"), trained("adamw8bit")
    state = optimizer.state[small.weight]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert optimizer.state[small.bias]["state1"].dtype == torch.float32  # fewer than 4,096 numbers
    assert torch.equal(small.bias, plain.bias) or torch.allclose(small.bias, plain.bias, rtol=1e-5, atol=1e-7)
    moved = (plain.weight - trained("adamw", steps=0)[0].weight).abs().mean()
    assert 0.0 < float((small.weight - plain.weight).abs().mean() / moved) < 0.05


def test_eight_bit_state_comes_back_from_a_checkpoint() -> None:
    layer, optimizer = trained("adamw8bit")
    again, other = trained("adamw8bit", steps=1)
    again.load_state_dict(layer.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file would hold it
    for mine, theirs in ((layer, optimizer), (again, other)):
        for parameter in mine.parameters():
            parameter.grad = torch.ones_like(parameter)
        theirs.step()
    assert all(torch.equal(*pair) for pair in zip(layer.parameters(), again.parameters(), strict=True))


def test_an_unknown_number_of_nonfinite_steps_is_refused() -> None:
    assert Optim.config_errors({"max_nonfinite": 0})[0].startswith("max_nonfinite: got 0")


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_groups_keep_their_networks_name(name: str) -> None:
    assert {group["name"] for group in trained(name)[1].param_groups} == {"layer"}
