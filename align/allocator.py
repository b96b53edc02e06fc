"""How this process keeps freed memory: knows the C library's allocator, and nothing of who asks for memory."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
"""What glibc's malloc.h calls its settings."""

KEPT = 2**31 - 1
"""Bytes of free memory that are kept: the largest int."""

LARGEST = 2**25
"""Bytes of the largest piece that is: to this glibc lets its own threshold grow, see mallopt(3)."""


def keep_freed_memory() -> bool:
    """Lets glibc keep what is freed, for the next tensors.

    By default it gives the system back what many a step frees, and gets it anew, zeroed page by page as it is
    touched: that took up to a quarter of a step of PPO (docs/performance.md).

    Returns:
        Whether it does: not where there is no glibc, or the environment (`MALLOC_...`, `GLIBC_TUNABLES`) has its own
        settings.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, KEPT)) and bool(mallopt(M_MMAP_THRESHOLD, LARGEST))
