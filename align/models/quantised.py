"""Frozen weights in 8 or 4 bits, which can be sharded: bitsandbytes' quantisation in blocks that never cross a row.

bitsandbytes' own layers quantise the flattened weight and keep the scales beside the parameter, where FSDP2 does not
see them; its 8-bit layer also rounds activations, by columns that depend on everything else in the batch. Here codes
and scales are parameters whose rows are the weight's, so they are sharded as other weights are, and only the weight is
rounded: a sequence's numbers do not depend on what it is computed with. 4 bits are the very codes of bitsandbytes'
`Linear4bit` wherever rows are whole blocks.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align import distributed, interrupt
from align.models.products import arithmetic

BLOCK = 64
"""Weights with one scale, in float32: half a bit a weight."""

Bits = Literal["8bit", "4bit"]


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is kept as codes and scales and is made whole for each product.

    Args:
        layer: Whose weight shall be quantised; on the meta device, it is read later (`take`).
        bits: Of a weight, beside its share of a scale.
    """

    def __init__(self, layer: nn.Linear | Conv1D, bits: Bits) -> None:
        transposed = isinstance(layer, Conv1D)
        rows, columns = layer.weight.shape[::-1] if transposed else layer.weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.bits: Bits = bits
        self.transposed, self.dtype = transposed, layer.weight.dtype
        filled = -(-columns // BLOCK) * BLOCK
        device = layer.weight.device
        width = filled if bits == "8bit" else filled // 2
        # Parameters, not buffers: FSDP2 shards those, and leaves buffers whole on every rank.
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=torch.uint8, device=device), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(rows, filled // BLOCK, device=device), requires_grad=False)
        self.bias = layer.bias
        if not layer.weight.is_meta:
            self.take(layer.weight.detach().T if transposed else layer.weight.detach())

    @torch.no_grad()
    def take(self, rows: Float[Tensor, "rows columns"]) -> None:
        """Quantises the weight, or this rank's rows of it, and keeps the result."""
        own = [distributed.own_part(parameter) for parameter in (self.weight, self.scales)]
        if len(rows):
            for mine, values in zip(own, quantised(rows.to(own[0].device), self.bits), strict=True):
                mine.copy_(values)

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        """x Wᵀ + b, in the arithmetic of autocast if that is on."""
        dtype = arithmetic(input.device, input.dtype)
        product: Tensor = _Product.apply(input.to(dtype), self.weight, self.scales, self.bits, self.in_features)  # type: ignore[assignment]
        return product if self.bias is None else product + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, which makes W again for the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bits: Bits, columns: int) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.bits, ctx.columns, ctx.dtype = bits, columns, x.dtype
        return nn.functional.linear(x, restored(codes, scales, bits, columns, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes, scales = ctx.saved_tensors
        return grad @ restored(codes, scales, ctx.bits, ctx.columns, ctx.dtype), None, None, None, None


def quantise(model: nn.Module, blocks: Iterable[nn.Module], bits: Bits) -> None:
    """Quantises the linear layers of a model's blocks and freezes the model. Embeddings and heads stay as they are."""
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear | Conv1D):
                    setattr(parent, name, QuantisedLinear(child, bits))
    model.requires_grad_(False)


def is_quantised(model: nn.Module) -> bool:
    """Whether any of its layers is."""
    return any(isinstance(module, QuantisedLinear) for module in model.modules())


def quantised(
    weight: Float[Tensor, "rows columns"], bits: Bits
) -> tuple[UInt8[Tensor, "rows width"], Float[Tensor, "rows blocks"]]:
    """Codes and scales; rows are filled up with zeros to whole blocks.

    8 bits divide each block's range evenly, 4 bits are NF4, whose steps suit normally distributed weights
    (QLoRA, arXiv:2305.14314, section 3).
    """
    from bitsandbytes import functional  # takes a second, and says what it does not find

    rows, columns = weight.shape
    filled = nn.functional.pad(weight.float(), (0, -columns % BLOCK)).contiguous()
    if bits == "8bit":
        codes, state = functional.quantize_blockwise(filled, code=_even(weight.device), blocksize=BLOCK)
    else:
        codes, state = functional.quantize_4bit(filled, blocksize=BLOCK, quant_type="nf4")
    return codes.view(rows, -1), state.absmax.view(rows, -1)


def restored(
    codes: UInt8[Tensor, "rows width"],
    scales: Float[Tensor, "rows blocks"],
    bits: Bits,
    columns: int,
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """The weight that codes and scales stand for."""
    from bitsandbytes import functional

    rows, filled = len(codes), scales.shape[1] * BLOCK
    if bits == "8bit":
        whole = functional.dequantize_blockwise(
            codes, absmax=scales.flatten(), code=_even(codes.device), blocksize=BLOCK
        )
    else:
        state = functional.QuantState(
            scales.flatten(), torch.Size((rows, filled)), blocksize=BLOCK, quant_type="nf4", dtype=torch.float32
        )
        whole = functional.dequantize_4bit(codes.view(-1, 1), state)
    return whole[:, :columns].to(dtype)


def _even(device: torch.device) -> Float[Tensor, " codes"]:
    """The shares of a scale that 8 bits mean: -1, -126/127, ..., 1; the last of the 256 is never the nearest."""
    return torch.arange(-127, 129, device=device) / 127


@contextlib.contextmanager
def rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Linear layers have their float32 weights in 16 bits inside the block, as autocast rounds them at every use.

    Embeddings, and all that is no matrix, stay as they are, also where an output layer shares the embedding's weight.
    """
    linear = (layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D))
    exact = [(layer, layer.weight) for layer in linear if layer.weight.dtype == torch.float32]
    try:
        for layer, weight in exact:
            layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        yield
    finally:
        with interrupt.held():
            for layer, weight in exact:
                layer.weight = weight  # type: ignore[assignment]
