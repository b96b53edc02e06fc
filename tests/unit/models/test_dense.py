"""Attention by products of whole matrices, against torch's own."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from align.models import attention, forward, trials
from align.models.attention import use_attend
from align.models.dense import LONGEST, attend_densely

EPISODES = tiny.completions([3, 19, 1, 5, 40, 2, 3], [4, 1, 7, 5, 9, 30, 4])


def states(own: int, seen: int, shared: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries of 4 heads, keys and values of `shared`, and weights of the result: three sequences, as they lie."""
    torch.manual_seed(0)
    sizes = [(own, 4), (seen, shared), (seen, shared), (own, 4)]
    made = [torch.randn(3, tokens, heads, 8, dtype=dtype).transpose(1, 2) for tokens, heads in sizes]
    return [*(value.requires_grad_() for value in made[:3]), made[3]]


def plain(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """`attend_densely` as torch has it."""
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    ).transpose(1, 2)


def with_gradients(function: Any, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scaling: Any) -> Any:
    found = function(query, key, value, scaling)
    return found, torch.autograd.grad((found * weights.transpose(1, 2)).sum(), (query, key, value))


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize(("own", "seen"), [(7, 7), (1, 1), (5, 12), (1, 6)])
def test_outputs_and_gradients_are_those_of_torch(own: int, seen: int, shared: int, scaling: float | None) -> None:
    given = states(own, seen, shared, torch.float64)
    found, gradients = with_gradients(attend_densely, *given, scaling)
    expected, wanted = with_gradients(plain, *given, scaling)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", [None, 3.0])
def test_under_autocast_it_is_as_close_as_16_bits_are(scaling: float | None) -> None:
    """Large scores, too, which 16 bits would round by as much as the probabilities are told by."""
    given = states(20, 33, 2)
    expected, wanted = with_gradients(plain, *given, scaling)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = with_gradients(attend_densely, *given, scaling)
    assert found.dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in gradients)
    for got, right in zip((found, *gradients), (expected, *wanted), strict=True):
        assert 0.0 < float((got - right).detach().norm()) < 0.01 * float(right.detach().norm())


def test_weights_in_16_bits_keep_their_format_without_autocast() -> None:
    given = [value.detach() for value in states(6, 6, 4, torch.bfloat16)[:3]]
    found, expected = attend_densely(*given, None), plain(*(value.float() for value in given), None)
    assert found.dtype == torch.bfloat16
    assert 0.0 < float((found - expected).norm()) < 0.01 * float(expected.norm())


@pytest.mark.parametrize("longest", [256, 5, 0])
def test_models_use_it_up_to_a_length(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = tiny.families()["llama-tied"], []
    use_attend(model)
    assert trials.packs(torch.device("cpu"), model)

    def noted(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        widths.append(key.shape[2])
        return attend_densely(query, key, value, scaling)

    monkeypatch.setattr(attention, "attend_densely", noted)
    monkeypatch.setattr(attention, "suits_cpu", lambda: True)
    monkeypatch.setitem(LONGEST, torch.float32, longest)
    found = forward.token_logprobs(model, EPISODES.ids, EPISODES.token_mask)
    bands = forward._layout_for(model, EPISODES.ids, EPISODES.token_mask).bands
    assert sorted(set(widths)) == sorted({width for _, width in bands if width <= longest})
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


@pytest.mark.parametrize(("suits", "longest"), [(False, 256), (True, 8)])
def test_other_cpus_and_more_tokens_have_torchs(suits: bool, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(attention, "attend_densely", refuse)
    monkeypatch.setattr(attention, "suits_cpu", lambda: suits)
    monkeypatch.setitem(LONGEST, torch.float32, longest)
    query, key, value, _ = states(4, 9, 2)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found = attention._attend_causally(module, query, key, value)
    torch.testing.assert_close(found, plain(query, key, value, None), rtol=1e-5, atol=1e-6)
