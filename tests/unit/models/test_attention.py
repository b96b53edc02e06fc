"""Attention in float32 under CPU autocast, and nothing changed anywhere else."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from align.models.attention import NAME, attend, use_attend
from align.models.load import load_causal_lm, save_model


@pytest.fixture
def states() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3)]


class Causal(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 1


def test_under_autocast_attention_is_that_of_float32_and_so_are_its_gradients(states: list[torch.Tensor]) -> None:
    expected, _ = sdpa_attention_forward(Causal(), *states, None)
    wanted = torch.autograd.grad(expected.square().sum(), states)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = attend(Causal(), *states, None)
        rounded, _ = sdpa_attention_forward(Causal(), *states, None)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert rounded.dtype == torch.bfloat16  # what it is for
    for gradient, other in zip(torch.autograd.grad(got.square().sum(), states), wanted, strict=True):
        assert torch.equal(gradient, other)


def test_without_autocast_it_is_transformers_own(states: list[torch.Tensor]) -> None:
    half = [state.bfloat16() for state in states]
    got, expected = attend(Causal(), *half, None)[0], sdpa_attention_forward(Causal(), *half, None)[0]
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_loaded_models_use_it_and_exports_do_not_name_it(tmp_path: Path) -> None:
    save_model(tiny.llama(), tiny.tokenizer(), tmp_path / "hf")
    model = load_causal_lm(str(tmp_path / "hf"))
    assert model.config._attn_implementation == NAME
    save_model(model, tiny.tokenizer(), tmp_path / "again")
    assert NAME not in (tmp_path / "again" / "config.json").read_text()


def test_a_model_that_wants_other_attention_keeps_it() -> None:
    model = tiny.llama(attn_implementation="eager")
    use_attend(model)
    assert model.config._attn_implementation == "eager"


def test_padding_on_the_left_is_masked_as_in_sdpa() -> None:
    ids, seen = torch.randint(3, 40, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    seen[0, :4] = 0
    plain, ours = tiny.llama(), tiny.llama()
    use_attend(ours)
    place = (seen.cumsum(1) - 1).clamp_min(0)
    outputs = [model(input_ids=ids, attention_mask=seen, position_ids=place).logits[:, -1] for model in (plain, ours)]
    assert torch.equal(*outputs)
