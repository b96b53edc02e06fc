"""What the processes (ranks) of one run have to agree on: totals, what each of them made, and who is the first.

With a single process everything here is the identity. Knows torch's process group and nothing of models or data.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from align.types import AnyRecord, joined

Value = TypeVar("Value")

FOLLOWS = 76
"""The exit code of a rank that ends because the first one has failed, which says why."""

ON_GPUS = "cpu:gloo,cuda:nccl"
"""The backends of processes on GPUs: weights that rest in CPU memory, and plain objects, travel from there."""

BUCKET_BYTES = 2**26
"""Gradients sent in one message: few messages, and little memory beside the gradients."""


def environment() -> ClusterEnvironment | None:
    """Who started this process together with others (torchrun, `align.launch`, Slurm); None: it is alone."""
    if TorchElasticEnvironment.detect():
        found: ClusterEnvironment = TorchElasticEnvironment()
    elif SLURMEnvironment.detect() and "SLURM_STEP_ID" in os.environ:  # without, it is the script that calls srun
        found = SLURMEnvironment()
    else:
        return None
    return found if found.world_size() > 1 else None


@contextlib.contextmanager
def group(accelerator: str) -> Iterator[None]:
    """Inside the block this process can talk to those it was started with. Alone, it does nothing.

    Args:
        accelerator: As the Trainer takes it: on GPUs tensors travel by NCCL, otherwise by gloo.
    """
    started_by = environment()
    if started_by is None:
        yield
        return
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    os.environ["MASTER_ADDR"] = started_by.main_address
    os.environ["MASTER_PORT"] = str(started_by.main_port)
    dist.init_process_group(
        ON_GPUS if on_gpu else "gloo", rank=started_by.global_rank(), world_size=started_by.world_size()
    )
    try:
        yield
        # Only where all went well: to end the group where something failed could wait for ranks that never come.
        total(torch.zeros(1))
        dist.destroy_process_group()
    finally:
        threads_at_rest()


def threads_at_rest(seconds: float = 5.0) -> None:
    """Waits, at most so long, until no other thread of this process computes.

    gloo's threads outlive the group where anything still refers to it (a sharded model does), and one may yet have to
    let go of a tensor of the last message. If Python ends before, it ends that thread too, in the midst of C++
    (`TensorImpl::decref_pyobject` waits for the GIL), which aborts the process.
    """
    deadline = time.monotonic() + seconds
    while True:
        time.sleep(0.005)  # lets in whoever waits for the GIL
        tasks = (task for task in Path("/proc/self/task").glob("*/stat") if int(task.parent.name) != os.getpid())
        if not any(_runs(task) for task in tasks) or time.monotonic() >= deadline:  # where there is no /proc: at once
            return


def _runs(task: Path) -> bool:
    try:
        return task.read_text().rpartition(")")[2].split()[0] in ("R", "D")  # running or ready to; see proc(5)
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return False


def local_world_size() -> int:
    """How many of the processes run on this machine, as their launcher says."""
    if world_size() == 1:
        return 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return world_size() // int(os.environ.get("SLURM_NNODES", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes the run's files and speaks to the user."""
    return rank() == 0


def total(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all ranks."""
    return _reduced(value, dist.ReduceOp.SUM)


def largest(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The maximum over all ranks."""
    return _reduced(value, dist.ReduceOp.MAX)


def totals(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named numbers summed over all ranks, or their maxima where a name ends in "max"; the same names everywhere."""
    if world_size() == 1 or not stats:
        return dict(stats)
    found: dict[str, Tensor] = {}
    for reduce, of_max in ((total, False), (largest, True)):
        names = [name for name in sorted(stats) if name.endswith("max") is of_max]
        if names:
            values = reduce(torch.stack([stats[name].detach().float() for name in names]))
            found |= dict(zip(names, values, strict=True))
    return {name: found[name] for name in stats}


def from_all(value: Value) -> list[Value]:
    """Every rank's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(function: Callable[[], Value]) -> Value:
    """What a function returns on the first rank, which alone calls it.

    Raises:
        SystemExit: On the others, with `FOLLOWS`, where it raised on the first.
    """
    if world_size() == 1:
        return function()
    answer: list[Any] = [None]
    try:
        if is_first():
            answer = [(function(),)]
    finally:
        dist.broadcast_object_list(answer)
    if answer[0] is None:
        raise SystemExit(FOLLOWS)
    return answer[0][0]


def whole(part: AnyRecord) -> AnyRecord:
    """The record of which every rank has the rows `rank, rank + world_size, rank + 2 world_size, ...`."""
    if world_size() == 1:
        return part
    device = part.device
    parts = from_all(part.to("cpu"))
    sizes = [other.size for other in parts]
    places = [torch.arange(first, sum(sizes), len(parts))[:size] for first, size in enumerate(sizes)]
    return joined(parts).rows_at(torch.argsort(torch.cat(places))).to(device)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered on every rank; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that all ranks have, or that is sharded, in the form of another: this rank's part of it, or whole."""
    if not isinstance(other, DTensor):
        return whole_tensor(tensor)
    if isinstance(tensor, DTensor):
        return tensor
    part = sharded_zeros(tensor.shape, tensor.dtype, mesh=other.device_mesh, device=other.device)
    start, stop = own_rows(len(tensor), other.device_mesh)
    own_part(part).copy_(tensor[start:stop])
    return part


@torch.no_grad()
def sharded_zeros(shape: Sequence[int], dtype: torch.dtype, *, mesh: DeviceMesh, device: torch.device | str) -> DTensor:
    """Zeros, sharded along the first axis over a mesh with one axis.

    Args:
        shape: Of the whole tensor.
        dtype: Of its numbers.
        mesh: Whose ranks have equally many rows, the last ones fewer.
        device: Where this rank's rows are: of weights that rest in CPU memory, not where the mesh computes.
    """
    start, stop = own_rows(shape[0], mesh)
    # By way of the meta device, from which tensors may go to any: DTensor moves others to the device of its mesh.
    own = torch.empty((stop - start, *shape[1:]), dtype=dtype, device="meta")
    stride = torch.empty(tuple(shape), device="meta").stride()
    sharded = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
    made = torch.empty_like(sharded, device=device)
    assert isinstance(made, DTensor)
    made.to_local().zero_()
    return made


def own_rows(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Where this rank's rows of a sharded tensor start and end."""
    each = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * each, rows)
    return start, min(start + each, rows)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up every rank's gradients. Those of sharded parameters are summed already, when they are made."""
    if world_size() == 1:
        return
    waiting: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None or isinstance(parameter.grad, DTensor):
            continue
        same = waiting.setdefault(parameter.grad.dtype, [])
        same.append(parameter.grad)
        if sum(grad.nbytes for grad in same) >= BUCKET_BYTES:
            _sum_in_place(waiting.pop(parameter.grad.dtype))
    for grads in waiting.values():
        _sum_in_place(grads)


def _sum_in_place(grads: list[Tensor]) -> None:
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def _reduced(value: Tensor, by: Any) -> Tensor:
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value, op=by)
    return value
