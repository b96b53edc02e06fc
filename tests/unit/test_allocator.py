import subprocess
import sys

import pytest

FREES = """
from pathlib import Path
import torch
def work():
    pieces = [torch.ones(2**21) for _ in range(64)]  # 8 MiB each, 512 MiB
    del pieces
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmRSS:")[1].split()[0]) // 1024)
"""

ASKS = """
from align.allocator import keep_freed_memory
print(keep_freed_memory())
work()
"""

COMMAND = """
from align.cli import guarded
guarded(work, "a command")
"""


def printed(code: str, **environment: str) -> list[str]:
    """What a process of its own prints."""
    plain = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment}
    found = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    return found.stdout.split()


def after_freeing(**environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and the MiB of a process that has freed 512."""
    kept, resident = printed(FREES + ASKS, **environment)
    return kept == "True", int(resident)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    kept, resident = after_freeing()
    own, given_back = after_freeing(MALLOC_TRIM_THRESHOLD_="131072")
    assert (kept, own) == (True, False)
    assert resident > 512 and given_back < resident - 400


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_commands_keep_freed_memory() -> None:
    (kept,) = printed(FREES + COMMAND)
    (given_back,) = printed(FREES + "work()")
    assert int(kept) > 512 and int(given_back) < int(kept) - 400
