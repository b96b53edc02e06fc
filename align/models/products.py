"""Products of activations and weights in float32, by the library that is fastest on the CPU at hand.

torch multiplies float32 matrices by MKL, which on AMD's CPUs leaves their 512-bit units (AVX-512) unused. oneDNN, which
torch brings along for smaller formats, uses them: on two Zen 5 cores it multiplies 2.2 times as fast. So there the
linear layers of a model, and their backward passes, go to oneDNN: the same sums, added in another order. On two Zen 4
cores a step gained some 5 % at most (docs/performance.md).
"""

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

SWITCH = "ALIGN_PRODUCTS"
"""Environment variable: `onednn` or `torch`, whichever the CPU."""

LEAST = 2**20
"""Multiplications from which on a product goes to oneDNN; for fewer its call alone takes longer than MKL's."""


def by_onednn() -> bool:
    """Whether float32 products of linear layers go to oneDNN on this machine.

    It depends on the kind of CPU and is not timed, so that a run that goes on computes the same bits.

    Raises:
        ValueError: The environment asks for something unknown.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "onednn", "torch"):
        raise ValueError(f"{SWITCH}: got {wanted!r}, expected onednn or torch; unset it to have the faster one")
    return _faster_by_onednn() if not wanted else wanted == "onednn" and torch.backends.mkldnn.is_available()


@functools.cache
def _faster_by_onednn() -> bool:
    try:
        maker = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        maker = platform.processor()
    wide = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and "AuthenticAMD" in maker


def has_matrix_units() -> bool:
    """Whether this CPU has units for products of 16-bit matrices (AMX); False where this torch does not tell."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()


def has_bfloat16_vectors() -> bool:
    """Whether this CPU multiplies bfloat16 by vectors (AVX512_BF16); False where this torch does not tell."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and supported()


def arithmetic(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In what a device multiplies numbers of this format: that of autocast where it is on."""
    known = device.type in ("cpu", "cuda")  # `torch.amp.is_autocast_available` would end compiled code (PyTorch 2.11)
    return torch.get_autocast_dtype(device.type) if known and torch.is_autocast_enabled(device.type) else dtype


def use_products(model: nn.Module) -> None:
    """Lets a model's linear layers compute by `by_onednn`; layers of other kinds, such as quantised ones, stay."""
    if by_onednn():
        for layer in model.modules():
            if (kind := _KINDS.get(type(layer))) is not None:
                layer.__class__ = kind


def multiply(
    inputs: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"]:
    """`torch.nn.functional.linear`; in float32 on a CPU and from `LEAST` multiplications on, by oneDNN."""
    mixed = weight.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    count = inputs.numel() * len(weight)
    if mixed or not inputs.dtype == weight.dtype == torch.float32 or count < LEAST or torch.compiler.is_compiling():
        return nn.functional.linear(inputs, weight, bias)
    rows = inputs.reshape(-1, inputs.shape[-1])
    if torch.is_grad_enabled():
        found: Tensor = _Multiply.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    else:
        found = _onednn(rows, weight, bias)
    return found.view(*inputs.shape[:-1], len(weight))


def _onednn(
    rows: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "rows out"]:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found


def _outer(grad: Float[Tensor, "rows out"], rows: Float[Tensor, "rows in"]) -> Float[Tensor, "out in"]:
    """gradᵀ · rows. The wider factor comes second, which is up to 1.3 times as fast, even if the result is turned."""
    if grad.shape[1] > rows.shape[1]:
        return _onednn(rows.t(), grad.t()).t().contiguous()
    return _onednn(grad.t(), rows.t())


class _Multiply(torch.autograd.Function):
    """Rows · weightᵀ + bias, with both products of its backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _onednn(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            _onednn(grad, weight.t()) if for_rows else None,
            _outer(grad, rows) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )


class _Linear(nn.Linear):
    """`nn.Linear` by `multiply`."""

    def forward(self, input: Tensor) -> Tensor:
        return multiply(input, self.weight, self.bias)


class _Conv1D(Conv1D):
    """transformers' `Conv1D`, a linear layer whose weight lies the other way round (GPT-2), by `multiply`."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight.t(), self.bias)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, Conv1D: _Conv1D}
