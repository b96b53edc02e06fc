"""Optimizer state in CUDA managed memory: the driver moves it between GPU and CPU memory, page by page, as needed.

The allocator and the order of calls are bitsandbytes' (its `Optimizer8bit.get_state_buffer` and `step`). To torch such
a tensor is in CPU memory, whose address kernels on the GPU can read and write too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align import distributed

SMALLEST = 100_000
"""Numbers; state of fewer stays on the GPU, as in bitsandbytes: pages are large, and it would free little."""


def pays(parameter: nn.Parameter) -> bool:
    """Whether this rank's part of a parameter is large enough."""
    return distributed.own_part(parameter).numel() >= SMALLEST


@torch.no_grad()
def zeros(parameter: nn.Parameter, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in managed memory, sharded by rows as a parameter is.

    Args:
        parameter: On the GPU that will use them.
        shape: Of the whole tensor; as many rows as the parameter has.
        dtype: Of its numbers.
    """
    from bitsandbytes import functional

    rows = distributed.own_part(parameter).shape[0]
    pages = functional.get_paged(rows, *shape[1:], dtype=dtype, device=parameter.device)
    settle()  # not every GPU lets the CPU touch such memory while it computes
    pages.zero_()
    if not isinstance(parameter, DTensor):
        return pages
    sharded = distributed.sharded_zeros(shape, dtype, mesh=parameter.device_mesh, device="cpu")
    own = sharded.to_local()
    own.set_(pages.untyped_storage(), 0, pages.shape, pages.stride())  # that memory, in a part of a sharded tensor
    own.is_paged, own.page_deviceid = True, pages.page_deviceid  # type: ignore[attr-defined]
    return sharded


def prefetch(tensors: Sequence[Tensor]) -> None:
    """Begins to move what is paged to the GPU, in the order of the kernels that will use it."""
    from bitsandbytes import functional

    for tensor in tensors:
        if getattr(tensor, "is_paged", False):
            functional.prefetch_tensor(tensor)


def settle() -> None:
    """Waits until the GPU has written: the CPU may read then, for a checkpoint."""
    torch.cuda.synchronize()
