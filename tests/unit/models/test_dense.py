"""Attention by products of whole matrices, against torch's own."""

import itertools
import random
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from align.models import attention, dense, forward, trials
from align.models.attention import use_attend
from align.models.dense import CALL, COPIED, LONGEST, Block, Run, attend_densely, lay_out

EPISODES = tiny.completions([3, 19, 1, 5, 40, 2, 3], [4, 1, 7, 5, 9, 30, 4])

ROWS = {
    "one sequence": (Run(1, 7, 0),),
    "one token": (Run(1, 1, 0),),
    "two blocks": (Run(2, 150, 0), Run(5, 3, 300)),
    "filled up": (Run(1, 11, 0), Run(2, 9, 11), Run(17, 2, 29)),
    "one prompt": (Run(1, 6, 0), Run(3, 5, 6, 6, 0), Run(2, 1, 21, 6, 0)),
    "prompts of their own lengths": (Run(1, 6, 0), Run(2, 5, 6, 6, 0), Run(1, 9, 16), Run(3, 4, 25, 9, 16)),
}
"""How sequences lie in a row of tokens."""


def states(runs: tuple[Run, ...], shared: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries of 4 heads, keys and values of `shared`, values narrower than keys, and weights of the result."""
    torch.manual_seed(0)
    tokens = max(run.start + run.count * run.own for run in runs)
    sizes = [(4, 8), (shared, 8), (shared, 5), (4, 5)]
    made = [torch.randn(tokens, heads, size, dtype=dtype) for heads, size in sizes]
    return [*(value.transpose(0, 1).requires_grad_() for value in made[:3]), made[3]]


def plain(query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], scaling: float | None) -> Tensor:
    """`attend_densely` as torch has it, sequence by sequence."""
    found = torch.zeros(query.shape[1], len(query), value.shape[2], dtype=query.dtype)
    for run in runs:
        before = torch.arange(run.before_start, run.before_start + run.before)
        for start in range(run.start, run.start + run.count * run.own, run.own):
            own = torch.arange(start, start + run.own)
            keys, values = (part[None, :, torch.cat([before, own])] for part in (key, value))
            mask = torch.ones(run.own, run.before + run.own, dtype=torch.bool).tril(run.before)
            found[own] = torch.nn.functional.scaled_dot_product_attention(
                query[None, :, own], keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
            )[0].transpose(0, 1)
    return found


def densely(query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], scaling: float | None) -> Tensor:
    return attend_densely(query, key, value, lay_out(runs, query.shape[1]), scaling)


def with_gradients(function: Any, given: list[Tensor], runs: tuple[Run, ...], scaling: float | None) -> Any:
    *states, weights = given
    found = function(*states, runs, scaling)
    return found, torch.autograd.grad((found * weights).sum(), states)


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("name", ROWS)
def test_outputs_and_gradients_are_those_of_torch(name: str, shared: int, scaling: float | None) -> None:
    given = states(ROWS[name], shared, torch.float64)
    found, gradients = with_gradients(densely, given, ROWS[name], scaling)
    expected, wanted = with_gradients(plain, given, ROWS[name], scaling)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


def test_tokens_of_no_sequence_get_zeros() -> None:
    *given, weights = states((Run(1, 9, 0),), 4)
    runs = (Run(1, 4, 1),)
    expected, wanted = with_gradients(plain, [*given, weights], runs, None)
    found, gradients = with_gradients(densely, [*given, weights], runs, None)
    for got, right in zip((found, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)
    assert not found[[0, 5, 8]].any() and not gradients[1][:, [0, 5, 8]].any()


@pytest.mark.parametrize("name", ["filled up", "prompts of their own lengths"])
@pytest.mark.parametrize("scaling", [None, 3.0])
def test_under_autocast_it_is_as_close_as_16_bits_are(scaling: float | None, name: str) -> None:
    """Large scores, too, which 16 bits would round by as much as the probabilities are told by."""
    given = states(ROWS[name], 2)
    expected, wanted = with_gradients(plain, given, ROWS[name], scaling)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = with_gradients(densely, given, ROWS[name], scaling)
    assert found.dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in gradients)
    for got, right in zip((found, *gradients), (expected, *wanted), strict=True):
        assert 0.0 < float((got - right).detach().norm()) < 0.01 * float(right.detach().norm())


def test_gradients_of_many_answers_are_added_up_in_32_bits() -> None:
    """A prompt of 300 answers: sums in 16 bits would stand still where an answer adds less than they can tell."""
    runs = (Run(1, 2, 0), Run(300, 1, 2, 2, 0))
    given = states(runs, 4)
    given[3].abs_()
    _, wanted = with_gradients(plain, given, runs, None)
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = with_gradients(densely, given, runs, None)
    error = (gradients[2] - wanted[2])[:, :2].norm() / wanted[2][:, :2].norm()
    assert float(error) < 1e-3


def test_weights_in_16_bits_keep_their_format_without_autocast() -> None:
    runs = ROWS["filled up"]
    given = states(runs, 4, torch.bfloat16)
    exact = [value.detach().float().requires_grad_() for value in given]
    found, gradients = with_gradients(densely, given, runs, None)
    expected, wanted = with_gradients(plain, exact, runs, None)
    for got, right in zip((found, *gradients), (expected, *wanted), strict=True):
        assert got.dtype == torch.bfloat16
        assert 0.0 < float((got - right).detach().norm()) < 0.01 * float(right.detach().norm())


def test_nothing_is_kept_where_nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities of one block at a time then."""
    kept: list[int] = []

    def noted(self: Any, *tensors: Tensor) -> None:
        kept.append(len(tensors))

    monkeypatch.setattr(torch.autograd.function.FunctionCtx, "save_for_backward", noted)
    runs = ROWS["two blocks"]
    *given, _ = states(runs, 2)
    densely(*given, runs, None)
    with torch.no_grad():
        densely(*given, runs, None)
    densely(*(value.detach() for value in given), runs, None)
    assert kept == [8, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_blocks_cost_least(seed: int) -> None:
    draw = random.Random(seed)
    runs = tuple(Run(draw.randint(1, 9), draw.randint(1, 60), 0, draw.choice([0, 0, 20, 45])) for _ in range(8))
    ordered = sorted(runs, key=lambda run: (run.own, run.before), reverse=True)
    costs = []
    for cuts in itertools.product([False, True], repeat=len(runs) - 1):
        ends = [index + 1 for index, cut in enumerate(cuts) if cut] + [len(runs)]
        costs.append(sum(cost(ordered[start:end]) for start, end in zip([0, *ends], ends, strict=False)))
    assert sum(cost_of_block(block) for block in lay_out(runs, 600).blocks) == min(costs)


def cost(runs: list[Run]) -> int:
    seen = max(run.own + run.before for run in runs)
    count, own, seen = dense._filled_up((sum(run.count for run in runs), max(run.own for run in runs), seen))
    return CALL + count * own * (seen + COPIED)


def cost_of_block(block: Block) -> int:
    return CALL + block.sequences * block.own * (block.seen + COPIED)


def test_blocks_come_in_few_sizes() -> None:
    """Which a library prepares for, one by one."""
    assert dense._filled_up((1, 1, 1)) == (1, 8, 8)
    assert dense._filled_up((16, 15, 16)) == (16, 16, 16) and dense._filled_up((17, 17, 17)) == (18, 24, 24)
    assert dense._filled_up((33, 128, 129)) == (36, 128, 144)
    single = {size for count in range(1, 257) for size in dense._filled_up((count, count, count))[:1]}
    widths = {dense._filled_up((1, width, width))[1] for width in range(1, 257)}
    assert len(single) == 48 and len(widths) == 24


@pytest.mark.parametrize(("suits", "longest"), [(True, 256), (True, 31), (True, 5), (True, 0), (False, 256)])
def test_models_use_it_up_to_a_length(suits: bool, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny.families()["llama-tied"], []
    use_attend(model)
    assert trials.packs(torch.device("cpu"), model)

    def noted(query: Tensor, *others: Any) -> Tensor:
        tokens.append(query.shape[1])
        return attend_densely(query, *others)

    monkeypatch.setattr(attention, "attend_densely", noted)
    monkeypatch.setattr(attention, "suits_cpu", lambda: suits)
    monkeypatch.setitem(LONGEST, torch.float32, longest)
    found = forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask)
    bands = forward._layout_for(model, EPISODES.ids, EPISODES.token_mask).bands
    first = next((number for number, (_, width) in enumerate(bands) if suits and width <= longest), len(bands))
    short = sum(sequences * width for sequences, width in bands[first:])
    assert longest != 31 or bands[1][1] == longest
    assert set(tokens) == ({short} if short else set())
    monkeypatch.setitem(LONGEST, torch.float32, 0)
    torch.testing.assert_close(
        found, forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "asked", [{"dropout": 0.1}, {"is_causal": False}, {"position_bias": torch.zeros(1)}, {"softcap": 3.0}]
)
def test_attention_that_is_asked_for_more_is_torchs(asked: dict[str, Any]) -> None:
    module = torch.nn.Module()
    assert attention._is_plain(module, {"dropout": 0.0, "is_causal": None, "softcap": None, "scaling": 0.3})
    assert not attention._is_plain(module, {"dropout": 0.0} | asked)
    module.is_causal = False  # type: ignore[assignment]
    assert not attention._is_plain(module, {})
