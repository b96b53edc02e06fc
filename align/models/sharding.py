"""Weights spread over ranks by FSDP2: which parts of a model travel together, and having a whole model for a while.

A sharded model gathers each block just before it is computed and frees it after. That is a message among all ranks, so
all must compute the same blocks equally often. Where they cannot (decoding, scoring rollouts of different lengths), the
model is gathered before and freed after: `gathered`.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from align import distributed
from align.models import deferred

RUN = "align_run"
"""The method of a sharded model that calls a function with its outer weights gathered."""


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Spreads a model's weights over the ranks of a mesh, block by block.

    Args:
        model: On every rank alike. Its weights become DTensors, sharded along their first axis.
        mesh: With one axis.
        device: Where this rank computes.
        compute_dtype: In which weights are gathered and computed with; None: their own. Gradients are summed in
            float32.
        reshard_after_forward: Frees each block after its forward pass; it is gathered again for the backward pass.
        cpu_offload: Weights and gradients rest in CPU memory while they are not gathered.
    """
    # Inputs stay as they are: under autocast each operation chooses, as it does without sharding.
    dtypes = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    resting: OffloadPolicy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    for part in (*blocks(model), model):
        reshard = reshard_after_forward and part is not model  # what is outside the blocks is used first and last
        fully_shard(part, mesh=mesh, mp_policy=dtypes, reshard_after_forward=reshard, offload_policy=resting)
        assert isinstance(part, FSDPModule)
        part.align_reshards, part.align_gathered = reshard, False  # type: ignore[attr-defined]
        part.set_gradient_divide_factor(1.0)  # losses are divided by counts of all ranks, so gradients are summed
        part.set_force_sum_reduction_for_comms(True)
    deferred.fill(model, torch.device("cpu") if cpu_offload else device)
    setattr(model, RUN, MethodType(_call, model))
    register_fsdp_forward_method(model, RUN)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks: the modules that transformers will not split over devices.

    Raises:
        ValueError: It has none.
    """
    names = set(model._no_split_modules or ())
    # By any class they are of: sharded ones are of a class of their own beside.
    found = [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]
    if not found:
        raise ValueError(f"{type(model).__name__} does not say what its blocks are, so it cannot be sharded by FSDP")
    return found


def numbered_blocks(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The blocks by their numbers in the list that holds most of them.

    What else transformers keeps on one device, such as embeddings, is not among them.

    Raises:
        ValueError: See `blocks`.
    """
    found = {id(block) for block in blocks(model)}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    own = [{number: part for number, part in enumerate(one) if id(part) in found} for one in lists]
    return max(own, key=len, default={})


def models_of(module: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in a module, or it itself; outermost ones only."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [found for child in module.children() for found in models_of(child)]


def run(model: PreTrainedModel, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(model, *arguments)`, with the weights outside the blocks there if the model is sharded."""
    method = getattr(model, RUN, None)
    return function(model, *arguments) if method is None else method(function, *arguments)


def is_sharded(model: nn.Module) -> bool:
    """Whether any of the module's weights are spread over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextlib.contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """The whole models on every rank inside the block, for passes without gradients. All ranks must enter it.

    A model that is gathered already stays so when the block ends.
    """
    units = [unit for model in models for unit in _units(model, gathered=False)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
        unit.align_gathered = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _free(units)


def free(model: nn.Module) -> None:
    """Ends a model's `gathered` before its block does."""
    _free(_units(model, gathered=True))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor whole, in CPU memory: of the first rank, others get an empty one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors_once(model).items():
        one = distributed.whole_tensor(tensor)
        if distributed.is_first():
            found[name] = one.cpu()
    return found


def tensors_once(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the further names of tensors that are tied: they are written under their first."""
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def _units(model: nn.Module, *, gathered: bool) -> list[FSDPModule]:
    """What is gathered together: the parts of a sharded model that are now gathered, or that are not."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [unit for unit in units if unit.align_gathered is gathered]  # type: ignore[attr-defined]


def _free(units: list[FSDPModule]) -> None:
    for unit in units:
        unit.set_reshard_after_forward(unit.align_reshards, recurse=False)  # type: ignore[attr-defined]
        unit.reshard()
        unit.align_gathered = False  # type: ignore[attr-defined]


def _call(model: PreTrainedModel, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(model, *arguments)
