"""Weights in 8 and 4 bits: bitsandbytes' own numbers, rows apart, no copy kept for the backward pass, and loading."""

from pathlib import Path

import bitsandbytes
import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.models import quantised
from align.models.load import load_causal_lm, load_scalar_model
from align.models.quantised import BLOCK, Bits, QuantisedLinear, rounded

BITS: tuple[Bits, ...] = ("8bit", "4bit")


def linear(columns: int = 2 * BLOCK, rows: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(columns, rows, bias=bias)


def whole(layer: QuantisedLinear) -> torch.Tensor:
    return quantised.restored(layer.weight, layer.scales, layer.bits, layer.in_features, torch.float32)


def test_four_bits_are_those_of_bitsandbytes() -> None:
    layer = linear()
    theirs = bitsandbytes.nn.Linear4bit(2 * BLOCK, 24, compress_statistics=False, quant_type="nf4")
    theirs.load_state_dict(layer.state_dict())
    theirs.to("cpu")  # which quantises
    ours = QuantisedLinear(layer, "4bit")
    assert torch.equal(ours.weight.flatten(), theirs.weight.data.flatten())
    assert torch.equal(ours.scales.flatten(), theirs.weight.quant_state.absmax)
    assert torch.equal(
        whole(ours), bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    )
    x = torch.randn(5, 2 * BLOCK)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [BLOCK, 3 * BLOCK - 7, 20])
def test_eight_bits_round_to_the_nearest_of_255_even_steps(columns: int) -> None:
    layer = linear(columns)
    ours = QuantisedLinear(layer, "8bit")
    filled = nn.functional.pad(layer.weight.detach(), (0, -columns % BLOCK))
    largest = filled.view(24, -1, BLOCK).abs().amax(-1)
    torch.testing.assert_close(ours.scales.detach(), largest)
    error = nn.functional.pad(whole(ours) - layer.weight.detach(), (0, -columns % BLOCK)).view(24, -1, BLOCK).abs()
    assert bool((error.amax(-1) <= 1.01 * largest / 127 / 2).all()) and float(error.max()) > 0.0


@pytest.mark.parametrize("bits", BITS)
def test_a_row_does_not_depend_on_the_others(bits: Bits) -> None:
    weight = linear(100, 24).weight.detach()
    codes, scales = quantised.quantised(weight, bits)
    part_codes, part_scales = quantised.quantised(weight[7:15], bits)
    assert torch.equal(codes[7:15], part_codes) and torch.equal(scales[7:15], part_scales)
    assert codes.nbytes == 24 * 2 * BLOCK // (1 if bits == "8bit" else 2)


@pytest.mark.parametrize("bits", BITS)
def test_product_and_gradient_are_those_of_the_rounded_weight_which_is_not_kept(bits: Bits) -> None:
    layer = QuantisedLinear(linear(100), bits)
    x, kept = torch.randn(3, 5, 100, requires_grad=True), 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    dense = nn.functional.linear(x, whole(layer), layer.bias)
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(dense.square().sum(), x)[0], rtol=1e-4, atol=1e-4)
    assert kept == layer.weight.nbytes + layer.scales.nbytes < 24 * 100 * 4


def test_autocast_decides_over_the_arithmetic() -> None:
    layer, x = QuantisedLinear(linear(), "8bit"), torch.randn(3, 2 * BLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        dense = nn.functional.linear(x, whole(layer), layer.bias)
    assert y.dtype == torch.bfloat16 and layer(x).dtype == torch.float32
    torch.testing.assert_close(y, dense, rtol=1e-2, atol=1e-2)


def test_a_transposed_layer_is_quantised_along_what_it_sums_over() -> None:
    layer = Conv1D(24, 100)  # from 100 to 24
    ours, x = QuantisedLinear(layer, "8bit"), torch.randn(3, 100)
    assert ours.weight.shape == (24, 2 * BLOCK)
    torch.testing.assert_close(ours(x), x @ whole(ours).T + layer.bias, rtol=1e-5, atol=1e-5)
    assert float((whole(ours).T - layer.weight).abs().max()) < 0.005 * float(layer.weight.detach().abs().max())


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "gemma2"])
@pytest.mark.parametrize("bits", BITS)
def test_a_folder_is_loaded_in_few_bits(family: str, bits: Bits, tmp_path: Path) -> None:
    model = tiny.families()[family]
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path), quantise=bits).eval()
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    assert not isinstance(loaded.get_output_embeddings(), QuantisedLinear)
    quantised.quantise(model, [block for block in model.modules() if type(block).__name__.endswith("Layer")], bits)
    if family == "gpt2":
        quantised.quantise(model, model.transformer.h, bits)
    ids = torch.randint(3, tiny.VOCAB, (2, 9))
    assert quantised.is_quantised(model) and torch.equal(loaded(ids).logits, model(ids).logits)
    rewards = load_scalar_model(str(tmp_path), quantise=bits)
    assert quantised.is_quantised(rewards.hf) and not isinstance(rewards.head, QuantisedLinear)


def test_a_sequence_is_the_same_whatever_is_beside_it(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), quantise="8bit").eval()
    ids = torch.randint(3, tiny.VOCAB, (4, 9))
    torch.testing.assert_close(model(ids).logits[2:3], model(ids[2:3]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [tiny.llama(tied=True), tiny.gpt2()], ids=["tied", "Conv1D"])
def test_rounded_weights_come_back_whatever_happens(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ZeroDivisionError), rounded(model, torch.bfloat16):
        inside = dict(model.named_parameters(remove_duplicate=False))
        of_matrices = {name for name, weight in inside.items() if weight.dtype == torch.bfloat16}
        assert {name for name in before if inside[name] is not before[name]} == of_matrices
        assert "lm_head.weight" in of_matrices and len(of_matrices) >= 4 * model.config.num_hidden_layers
        assert all(torch.equal(inside[name], before[name].bfloat16()) for name in of_matrices)
        assert model.get_input_embeddings().weight.dtype == torch.float32
        _ = 1 // 0
    after, made, count = dict(model.named_parameters(remove_duplicate=False)), nn.Parameter, iter(range(3, -1, -1))
    assert all(after[name] is weight for name, weight in before.items())
    monkeypatch.setattr(nn, "Parameter", lambda *given, **how: (1 // next(count), made(*given, **how))[1])
    with pytest.raises(ZeroDivisionError), rounded(model, torch.bfloat16):  # in the midst of the layers
        pass
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is weight for name, weight in before.items())
