"""Products by oneDNN against torch's own: the same sums, and only where they are faster."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.models import adapters, forward, packed, products
from align.models.adapters import LoRA
from align.models.attention import use_attend
from align.models.load import load_causal_lm
from align.models.products import SWITCH, multiply, use_products

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def everything_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small, but for none at all; on any CPU that can."""
    monkeypatch.setenv(SWITCH, "onednn")
    monkeypatch.setattr(products, "LEAST", 1)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the first factors that have gone to oneDNN since."""
    found: list[tuple[int, ...]] = []
    real = products._onednn

    def onednn(rows: Tensor, *others: Tensor) -> Tensor:
        found.append(tuple(rows.shape))
        return real(rows, *others)

    monkeypatch.setattr(products, "_onednn", onednn)
    return found


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """A result, and the gradients of its inputs under weights that tell all its numbers apart."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    found = function(*leaves)
    weights = torch.linspace(-1.0, 1.0, found.numel()).view(found.shape)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), leaves)]


@ONEDNN
@pytest.mark.parametrize("shape", [(), (37,), (3, 21), (2, 3, 5)])
@pytest.mark.parametrize(("width", "out"), [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_linear(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], width: int, out: int, bias: bool
) -> None:
    found = counted(monkeypatch)
    torch.manual_seed(0)
    factors = [torch.randn(*shape, width), torch.randn(out, width), *([torch.randn(out)] if bias else [])]
    ours = with_gradients(lambda rows, weight, *rest: multiply(rows, weight, *(rest or [None])), *factors)
    assert len(found) == 3
    exact = with_gradients(nn.functional.linear, *(factor.double() for factor in factors))
    for value, expected in zip(ours, exact, strict=True):
        assert value.is_contiguous()  # what accumulates gradients would turn them otherwise
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)


@ONEDNN
def test_only_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch)
    rows, weight = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    multiply(rows, weight, None).sum().backward()
    assert found == [(5, 3), (3, 5)]
    found.clear()
    multiply(rows.requires_grad_(), weight.detach(), None).sum().backward()
    assert found == [(5, 3), (5, 4)]
    found.clear()
    with torch.no_grad():
        assert not multiply(rows, weight, None).requires_grad
    assert found == [(5, 3)]


@ONEDNN
def test_other_arithmetic_and_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch)
    rows, weight, bias = torch.randn(8, 16), torch.randn(4, 16), torch.randn(4)
    sixteen = multiply(rows.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert torch.equal(sixteen, nn.functional.linear(rows.bfloat16(), weight.bfloat16(), bias.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(multiply(rows, weight, bias), nn.functional.linear(rows, weight, bias))
    monkeypatch.setattr(products, "LEAST", 8 * 16 * 4 + 1)
    assert torch.equal(multiply(rows, weight, bias), nn.functional.linear(rows, weight, bias))
    assert not found
    monkeypatch.setattr(products, "LEAST", 8 * 16 * 4)
    multiply(rows, weight, bias)
    assert len(found) == 1


def learned(family: str, asked: str, monkeypatch: pytest.MonkeyPatch, lora: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of a model's log-probabilities, and how many of its products went to oneDNN."""
    monkeypatch.setenv(SWITCH, asked)
    model = tiny.families()[family]
    use_attend(model)
    if lora:
        adapters.add(model, LoRA(rank=4), seed=0)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    use_products(model)
    found = counted(monkeypatch)
    episodes = tiny.completions([3, 9, 1], [4, 2, 7])
    logprobs = forward.token_logprobs(model, episodes.ids, _mask(episodes.ids))
    pieces = [(logprobs.mean(), None)]
    return tiny.gradients(model, pieces) | {"logprobs": logprobs.detach()}, len(found)


def _mask(ids: Tensor) -> Tensor:
    return (ids != tiny.PAD) & (torch.arange(ids.shape[1]) > 0)


@ONEDNN
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama-untied", "llama-tied", "gpt2", "qwen2", "gemma2"])
def test_a_model_learns_the_same(monkeypatch: pytest.MonkeyPatch, family: str, lora: bool) -> None:
    ours, products_by_onednn = learned(family, "onednn", monkeypatch, lora)
    theirs, none = learned(family, "torch", monkeypatch, lora)
    assert none == 0 and products_by_onednn >= 2 * 4 * (2 if lora else 3)
    tiny.assert_same_gradients(ours, theirs)


@ONEDNN
def test_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    once, again = (learned("llama-tied", "onednn", monkeypatch, lora=False)[0] for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@ONEDNN
def test_a_model_read_from_a_folder_uses_them_and_is_written_as_it_was(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "model")
    model = load_causal_lm(str(tmp_path / "model"), gradient_checkpointing=True)
    kinds = {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)}
    assert kinds == {products._Linear}
    ids = torch.arange(3, 15).view(2, 6)
    forward.token_logprobs(model, ids, _mask(ids)).sum().backward()  # recomputes, and must find the same numbers
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")
    names = [path.name for path in sorted((tmp_path / "model").iterdir())]
    assert [path.name for path in sorted((tmp_path / "again").iterdir())] == names
    assert all((tmp_path / "model" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_layers_of_other_kinds_stay() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(2, 2), Special(2, 2), Conv1D(2, 2), nn.LayerNorm(2)])
    use_products(model)
    assert [type(layer) for layer in model] == [products._Linear, Special, products._Conv1D, nn.LayerNorm]


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed.grain(torch.device("cpu")) == packed.GRAIN
    monkeypatch.setenv(SWITCH, "torch")
    model = nn.Sequential(nn.Linear(2, 2))
    use_products(model)
    assert type(model[0]) is nn.Linear and packed.grain(torch.device("cpu")) == 1
    monkeypatch.setenv(SWITCH, "mkl")
    with pytest.raises(ValueError, match="ALIGN_PRODUCTS: got 'mkl', expected onednn or torch"):
        use_products(model)


@pytest.mark.parametrize(
    ("maker", "units", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_it_is_the_default_where_torch_leaves_units_unused(
    monkeypatch: pytest.MonkeyPatch, maker: str, units: str, expected: bool
) -> None:
    monkeypatch.delenv(SWITCH)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: units)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(Path, "read_text", lambda *_: f"processor\t: 0\nvendor_id\t: {maker}\n")
    products._faster_by_onednn.cache_clear()
    try:
        assert products.by_onednn() is expected
    finally:
        products._faster_by_onednn.cache_clear()


def test_a_loaded_model_is_unchanged_where_torch_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "torch")
    tiny.llama().save_pretrained(tmp_path)
    model: PreTrainedModel = load_causal_lm(str(tmp_path))
    assert not any(isinstance(layer, products._Linear) for layer in model.modules())
