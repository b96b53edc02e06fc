import subprocess
import sys

import pytest

FREES = """
from pathlib import Path
from align.allocator import keep_freed_memory
import torch
print(keep_freed_memory())
pieces = [torch.ones(2**21) for _ in range(64)]  # 8 MiB each, 512 MiB
del pieces
status = Path("/proc/self/status").read_text()
print(int(status.split("VmRSS:")[1].split()[0]) // 1024)
"""


def after_freeing(**environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and the MiB of a process that has freed 512."""
    plain = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment}
    out = subprocess.run([sys.executable, "-c", FREES], env=plain, capture_output=True, text=True, check=True).stdout
    kept, resident = out.split()
    return kept == "True", int(resident)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    kept, resident = after_freeing()
    own, given_back = after_freeing(MALLOC_TRIM_THRESHOLD_="131072")
    assert (kept, own) == (True, False)
    assert resident > 512 and given_back < resident - 400
