"""Numbers that are none: which tensor was the first, and the batch it came with, saved to be looked at."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align import atomic, distributed
from align.types import named_tensors

FOLDER = "nonfinite"
TOO_LARGE = "the norm of the gradient, which is too large for its number format"


def first_bad(batch: Any, networks: Mapping[str, nn.Module]) -> str | None:
    """The name of the first tensor with a NaN or an infinity: in the batch, among the weights, among the gradients.

    Of several ranks each looks at its own part; None where nothing is wrong with that.
    """
    for name, tensor in _learned_from(batch):
        if not _finite(tensor):
            return f"{name} of the batch"
    for what in ("weights", "gradient"):
        for network, module in networks.items():
            for name, parameter in module.named_parameters():
                tensor = parameter if what == "weights" else parameter.grad
                if tensor is not None and not _finite(tensor):
                    return f"the {what} of {network}.{name}"
    return None


def save_batch(run_dir: Path, step: int, batch: Any, bad: str | None) -> Path:
    """Writes the tensors of a batch to `nonfinite/step-NNNNNNNNN/batch.pt`, with the name of the bad one.

    Of several ranks each writes its part of the batch, all but the first into `step-NNNNNNNNN-rank-R`.
    """
    number = distributed.rank()
    folder = run_dir / FOLDER / (f"step-{step:09d}" + f"-rank-{number}" * (number > 0))
    tensors = {name: tensor.detach().cpu() for name, tensor in _learned_from(batch)}
    with atomic.folder_written_whole(folder) as fresh:
        torch.save({"step": step, "bad": bad, "tensors": tensors}, fresh / "batch.pt")
    return folder / "batch.pt"


def _learned_from(batch: Any) -> Iterator[tuple[str, Tensor]]:
    beside = getattr(batch, "BESIDE", ())
    return ((name, tensor) for name, tensor in named_tensors(batch) if name.partition(".")[0] not in beside)


def _finite(tensor: Tensor) -> bool:
    own = distributed.own_part(tensor)  # of sharded weights each rank looks at its part
    return not own.is_floating_point() or bool(own.isfinite().all())
