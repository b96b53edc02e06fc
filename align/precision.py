"""Which arithmetic `trainer.precision: auto` means on the machine at hand."""

from typing import Literal

import torch

from align.models.products import has_bfloat16_vectors, has_matrix_units

Precision = Literal["bf16-mixed", "32-true"]


def fastest(accelerator: str) -> Precision:
    """bfloat16 with float32 weights where matrices are multiplied faster in it: on GPUs and CPUs with units for it.

    On two cores with such units models of 128 to 512 hidden units learned 1.2 to 1.8 times as fast
    (docs/performance.md).

    Args:
        accelerator: As the Trainer takes it: "cpu", "gpu", "cuda", "auto" ...
    """
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if accelerator in ("cpu", "auto") and multiplies_bfloat16() else "32-true"


def multiplies_bfloat16() -> bool:
    """Whether this CPU has units for products of bfloat16, of matrices (AMX) or of vectors (AVX512_BF16).

    With the first it multiplied them four to seven times as fast as float32, with the second twice. False where this
    version of torch does not tell.
    """
    return has_matrix_units() or has_bfloat16_vectors()
