"""What is said of a checkpoint that could not be written."""

import errno
import os

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from align import checkpoints


def failed(*errors: Exception) -> CheckpointException:
    """What torch raises on every rank where some have failed."""
    return CheckpointException("write", {rank: (error, None) for rank, error in enumerate(errors)})  # type: ignore[misc]


TORN = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (failed(TORN, OSError(errno.EROFS, os.strerror(errno.EROFS))), "Read-only file system"),
        (failed(TORN, TORN), "only a part of a file was, so the disk is probably full"),
        (TORN, "only a part of a file was, so the disk is probably full"),
        (failed(ValueError("something else\nand more")), "something else"),
    ],
)
def test_the_cause_is_the_systems_or_what_torch_makes_of_it(error: Exception, cause: str) -> None:
    assert checkpoints._cause(error) == cause
