"""Which arithmetic `trainer.precision: auto` means on the machine at hand."""

from typing import Literal

import torch

Precision = Literal["bf16-mixed", "32-true"]


def fastest(accelerator: str) -> Precision:
    """bfloat16 with float32 weights on GPUs that multiply it, float32 elsewhere.

    On CPUs bfloat16 pays only where every batch has the same shape. Micro-batches of ragged lengths have new shapes all
    the time, and the library that multiplies bfloat16 (oneDNN) prepares each of them anew: on two AVX-512 BF16 cores
    SFT made 8.8 steps a second instead of 10.2.

    Args:
        accelerator: As the Trainer takes it: "cpu", "gpu", "cuda", "auto" ...
    """
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "32-true"


def multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix units for bfloat16, which multiply it several times as fast as float32.

    False where this version of torch does not tell.
    """
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()
