"""Which arithmetic `trainer.precision: auto` means on the machine at hand."""

from typing import Literal

import torch

Precision = Literal["bf16-mixed", "32-true"]


def fastest(accelerator: str) -> Precision:
    """bfloat16 with float32 weights where matrices are multiplied faster in it: on GPUs and CPUs with units for it.

    On two cores with such units (AMX) models of 128 to 512 hidden units learned 1.3 to 1.8 times as fast
    (docs/performance.md).

    Args:
        accelerator: As the Trainer takes it: "cpu", "gpu", "cuda", "auto" ...
    """
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if accelerator in ("cpu", "auto") and multiplies_bfloat16() else "32-true"


def multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix units for bfloat16, which multiply it several times as fast as float32.

    False where this version of torch does not tell.
    """
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()
