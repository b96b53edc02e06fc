"""Sequences end to end in one call of attention, against rows filled up to the longest.

A CPU has none of these kernels: here they are written down plainly and registered in their place, so that layout, casts
and compiled code are those of a GPU. Tests marked `gpu` have the kernels themselves.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from align.models import compiled, decode, flash, forward, packed, trials
from align.models.attention import use_attend
from align.models.fixed import FixedSlots

SIZES = [3, 19, 1, 5, 40, 2, 3]
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

calls: list[tuple[list[int], int]] = []
"""Where sequences began in each, and how long they were said to be at most."""


def attended(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One sequence: (tokens, heads, d)."""
    shared = query.shape[1] // key.shape[1]
    query, key, value = (part.float().transpose(0, 1) for part in (query, key, value))
    scores = query @ key.repeat_interleave(shared, 0).mT * scale
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    found = scores.masked_fill(later, float("-inf")).softmax(-1) @ value.repeat_interleave(shared, 0)
    return found.transpose(0, 1)


def forwards(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _: Tensor, most: int, __: int,
    is_causal: bool = False, scale: float | None = None, *___: object, **____: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `torch_attn::_varlen_attn` has it."""
    assert is_causal and query.dtype == key.dtype == value.dtype == torch.float16 and starts.dtype == torch.int32
    calls.append((starts.tolist(), most))
    sizes = starts.diff().tolist()
    parts = zip(*(part.split(sizes) for part in (query, key, value)), strict=True)
    out = torch.cat([attended(*part, scale or query.shape[-1] ** -0.5) for part in parts]).to(query.dtype)
    return out, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def backwards(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts: Tensor, _: Tensor,
    most: int, __: int, is_causal: bool, rng: Tensor, scale: float | None = None, ___: object = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `torch_attn::_varlen_attn_backward` has it."""
    sizes, scale = starts.diff().tolist(), scale or query.shape[-1] ** -0.5
    parts = zip(*(part.split(sizes) for part in (grad, query, key, value)), strict=True)
    found = [torch.func.vjp(lambda *own: attended(*own, scale), *own)[1](one.float()) for one, *own in parts]
    return tuple(torch.cat(part).contiguous() for part in zip(*found, strict=True))


def registered() -> None:
    """Nobody else has any for a CPU."""
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forwards)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backwards)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of a GPU."""
    registered()
    monkeypatch.setattr(flash, "_has_kernels", lambda device: True)
    calls.clear()
    yield


def ours(name: str) -> PreTrainedModel:
    model = tiny.families()[name]
    use_attend(model)
    return model


def batch(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Ids, and a mask that is True at all tokens but the first."""
    lengths, place = torch.tensor(sizes), torch.arange(max(sizes))
    ids = torch.randint(3, tiny.VOCAB, (len(sizes), max(sizes)), generator=torch.Generator().manual_seed(1))
    return ids, (place < lengths[:, None]) & (place > 0)


def learned(model: PreTrainedModel, sizes: list[int], device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities and gradients."""
    ids, mask = batch(sizes)
    model.zero_grad()
    with torch.autocast(device, torch.float16):
        found = forward.token_logprobs(model, ids.to(device), mask)
        found.sum().backward()
    return found.detach(), {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def assert_alike(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    """To what 16 bits round, of one layer's gradient as of all."""
    torch.testing.assert_close(one[0], other[0], rtol=1e-2, atol=1e-2)
    for name, grad in one[1].items():
        assert float((grad - other[1][name]).norm() / other[1][name].norm().clamp_min(1.0)) < 0.02, name


@pytest.mark.parametrize("name", [name for name in tiny.families() if name != "gemma2"])
def test_end_to_end_as_in_rows(name: str, kernels: None) -> None:
    model, rows = ours(name), ours(name)
    packed.padded.add(rows)
    found = learned(model, SIZES)
    assert calls[-1] == ([0, 39, 57, 61, 63, 65, 66, 67], 64)  # what stands before the last scored token
    before = [call for call in calls if call[1] > 8]  # shorter ones are of a trial
    assert_alike(found, learned(rows, SIZES))
    assert [call for call in calls if call[1] > 8] == before


def test_none_is_filled_up() -> None:
    laid_out = packed.pack(torch.tensor([2, 40, 3, 0]), 41, ragged=True)
    assert laid_out.places.tolist() == [*range(41, 81), 82, 83, 84, 0, 1, 123]
    assert laid_out.positions.tolist() == [*range(40), 0, 1, 2, 0, 1, 0]
    assert laid_out.starts is not None and laid_out.starts.tolist() == [0, 40, 43, 45, 46]
    assert laid_out.longest == 64 and laid_out.padding == 0 and laid_out.bands == ()


def test_in_32_bits_there_are_bands(kernels: None) -> None:
    model = ours("qwen2")
    cpu, sizes = torch.device("cpu"), torch.tensor(SIZES)
    assert trials.laid_end_to_end(model, cpu, sizes, 40).starts is None
    with torch.autocast("cpu", torch.float16):
        assert trials.laid_end_to_end(model, cpu, sizes, 40).starts is not None
        model.config.head_dim = 12
        assert trials.laid_end_to_end(model, cpu, sizes, 40).starts is None


@pytest.mark.parametrize(
    ("size", "of_values", "taken"), [(8, 8, True), (12, 12, False), (264, 264, False), (8, 16, False)]
)
def test_heads_that_the_kernels_take(size: int, of_values: int, taken: bool) -> None:
    query, value = torch.zeros(1, 1, 3, size), torch.zeros(1, 1, 3, of_values)
    assert flash.takes(query.half(), value) is taken and not flash.takes(query, value)


def test_what_a_model_can_do_is_tried_out_in_both_arithmetics(kernels: None) -> None:
    """Prompts that are written on from are computed this way too."""
    model, cpu = ours("qwen2"), torch.device("cpu")
    assert trials.packs(cpu, model) and decode.able(model, cpu, FixedSlots) and not calls
    with torch.autocast("cpu", torch.float16):
        assert trials.packs(cpu, model) and decode.able(model, cpu, FixedSlots)
    assert [starts for starts, _ in calls[:: len(model.model.layers)]] == [[0, 5, 9, 12], [0, 3, 5]]


def test_what_the_kernels_do_not_take_is_attended_to_apart(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = ours("qwen2"), ours("qwen2")
    expected = learned(model, SIZES)
    monkeypatch.setattr(flash, "takes", lambda query, value: False)
    before = len(calls)
    assert_alike(learned(other, SIZES), expected)
    assert len(calls) == before


def test_compiled_blocks_stay_whole_and_are_compiled_for_any_lengths() -> None:
    """In a process of its own: what checks shapes in tests is a part of what is compiled, and wants other code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, Path(__file__), "cpu"], check=True, env=environment)


def compile_and_learn(device: str) -> None:
    """Batches of different lengths by the same code."""
    if device == "cpu":
        registered()
        flash._has_kernels = lambda device: True  # type: ignore[assignment]
    model, plain = (ours("llama-untied").to(device) for _ in range(2))
    compiled.compile_blocks([model], ragged=True)
    for sizes in (SIZES, [7, 9, 70, 1], [3] * 9, [100, 30, 2, 2, 5]):
        assert_alike(learned(model, sizes, device), learned(plain, sizes, device))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2, "a graph for each batch would be compiled for each batch"


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("name", [name for name in tiny.families() if name != "gemma2"])
def test_on_a_gpu_too(name: str) -> None:
    model, rows = ours(name).cuda(), ours(name)
    packed.padded.add(rows)
    expected = learned(rows, SIZES)
    logprobs, gradients = learned(model, SIZES, "cuda")
    assert_alike((logprobs.cpu(), {key: value.cpu() for key, value in gradients.items()}), expected)
    assert trials.packs(torch.device("cuda"), model)


@pytest.mark.gpu
@ON_A_GPU
def test_compiled_on_a_gpu_too() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, Path(__file__), "cuda"], check=True, env=environment)


if __name__ == "__main__":
    compile_and_learn(*sys.argv[1:])
