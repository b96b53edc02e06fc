"""8-bit state against bitsandbytes' own, against 32-bit state, and in blocks that keep to their row."""

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim.adamw import AdamW8bit
from bitsandbytes.optim.lion import Lion8bit
from torch import Tensor, nn

from align.blockwise import BLOCK, Blockwise, pays

STEPS = 12


def gradients(shape: tuple[int, ...], steps: int = STEPS) -> list[Tensor]:
    """Of very different sizes from row to row, as those of a language model are."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-3, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return [torch.randn(shape, generator=generator) * scale for _ in range(steps)]


def start(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def trained(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> nn.Parameter:
    for grad in gradients(tuple(parameter.shape)):
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter


def ours(shape: tuple[int, ...], rule: str = "adamw", bits: int = 8) -> tuple[nn.Parameter, Blockwise]:
    parameter = start(shape)
    group = {"params": [parameter], "weight_decay": 0.1, "bits": bits}
    optimizer = Blockwise([group], rule=rule, lr=1e-2, betas=(0.9, 0.95), eps=1e-6)  # type: ignore[arg-type]
    return trained(parameter, optimizer), optimizer


@pytest.mark.parametrize(("rule", "theirs"), [("adamw", AdamW8bit), ("lion", Lion8bit)])
def test_rows_of_whole_blocks_give_the_numbers_of_bitsandbytes(rule: str, theirs: type) -> None:
    shape = (20, 2 * BLOCK)
    parameter, optimizer = ours(shape, rule)
    other = start(shape)
    extra = {"eps": 1e-6} if rule == "adamw" else {}
    reference = theirs([other], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **extra)
    trained(other, reference)
    assert torch.equal(parameter, other) and not torch.equal(parameter, start(shape))
    mine, own = optimizer.state[parameter], reference.state[other]
    assert torch.equal(mine["state1"], own["state1"]) and torch.equal(mine["absmax1"].flatten(), own["absmax1"])


@pytest.mark.parametrize("shape", [(20, 512), (30, 300), (12, 20, 20), (33, 140)])
def test_dequantised_by_bitsandbytes_the_state_is_the_moments(shape: tuple[int, ...]) -> None:
    """A third party's reading: bitsandbytes' own dequantisation, beside moments computed in 32 bits."""
    parameter, optimizer = ours(shape)
    state = optimizer.state[parameter]
    first = second = torch.zeros(shape)
    for grad in gradients(shape):
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad.square()
    for number, signed, moment in ((1, True, first), (2, False, second)):
        code = functional.create_dynamic_map(signed=signed)
        quantised, scale = state[f"state{number}"], state[f"absmax{number}"]
        assert quantised.dtype == torch.uint8 and quantised.numel() <= 2 * parameter.numel()
        read = functional.dequantize_blockwise(quantised, absmax=scale.flatten(), code=code, blocksize=BLOCK)
        columns = moment[0].numel()
        filling = read[:, columns:].abs().amax(1) if columns % BLOCK else torch.zeros(1)
        assert bool((filling <= 1e-4 * scale[:, -1]).all())  # what fills up a row never decides its block's scale
        error = (read[:, :columns] - moment.flatten(1)).abs().amax(1) / moment.flatten(1).abs().amax(1)
        assert float(error.max()) < 0.06  # the coarsest step of the map is 1/64 of the block's largest, twelve times


def test_a_row_does_not_depend_on_the_others() -> None:
    whole, _ = ours((30, 300))
    part = nn.Parameter(start((30, 300))[10:20].detach().clone())
    group = {"params": [part], "weight_decay": 0.1}
    optimizer = Blockwise([group], rule="adamw", lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
    for grad in gradients((30, 300)):
        part.grad = grad[10:20].clone()
        optimizer.step()
    assert optimizer.state[part]["state1"].dtype == torch.float32  # 3,000 numbers: by itself it would be too small
    state = optimizer.new_state(nn.Parameter(torch.zeros(30, 300)), bits=8)
    optimizer.state[part] = {
        name: value[10:20].contiguous() if isinstance(value, Tensor) else value for name, value in state.items()
    }
    part.data.copy_(start((30, 300))[10:20])
    for grad in gradients((30, 300)):
        part.grad = grad[10:20].clone()
        optimizer.step()
    assert torch.equal(part, whole[10:20])


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_the_update_is_that_of_32_bits_but_for_rounding(rule: str) -> None:
    (small, _), (plain, optimizer) = ours((40, 256), rule), ours((40, 256), rule, bits=32)
    moved = (plain - start((40, 256))).abs().mean()
    assert float((small - plain).abs().mean() / moved) < (0.05 if rule == "adamw" else 0.2)
    assert optimizer.state[plain]["state1"].dtype == torch.float32
    if rule == "adamw":
        exact = start((40, 256))
        trained(exact, torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1))
        torch.testing.assert_close(plain, exact, rtol=1e-5, atol=1e-6)


def test_the_shape_of_the_whole_decides_over_bits() -> None:
    assert pays(torch.Size((16, 256))) and not pays(torch.Size((15, 256)))
    assert pays(torch.Size((100, 128))) and not pays(torch.Size((100, 127)))
    assert not pays(torch.Size((10_000,)))
