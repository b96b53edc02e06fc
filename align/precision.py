"""Which arithmetic `trainer.precision: auto` means on the machine at hand."""

from typing import Literal

import torch

Precision = Literal["bf16-mixed", "32-true"]


def fastest(accelerator: str) -> Precision:
    """bfloat16 with float32 weights where the hardware multiplies it faster than float32, otherwise float32.

    Emulated bfloat16 is several times slower than float32, so an unknown machine gets float32.

    Args:
        accelerator: As the Trainer takes it: "cpu", "gpu", "cuda", "auto" ...
    """
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("cpu", "auto"):
        able = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"
    return "32-true"
