"""How several processes share a model, as Lightning strategies for `trainer.strategy`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from align import checkpoints, distributed
from align.models import deferred, load, sharding
from align.models.quantised import is_quantised
from align.modules.base import AlignModule


class DDP(DDPStrategy):
    """Every rank holds all weights and learns from its part of each batch. What `strategy: auto` means for several.

    PyTorch's wrapper, which adds up gradients after every backward pass, is left out: an `AlignModule` adds them up
    once a step itself, as ranks have different numbers of micro-batches. Other modules are wrapped as usual.
    """

    def setup_environment(self) -> None:
        """Lets tensors in host memory travel too, such as counts."""
        if self.root_device.type == "cuda":
            self._process_group_backend = distributed.ON_GPUS
        super().setup_environment()

    def configure_ddp(self) -> None:
        """Gives every rank the first one's weights."""
        module = self.lightning_module
        if not isinstance(module, AlignModule):
            super().configure_ddp()
            return
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)


class FSDP(ModelParallelStrategy):
    """Every rank holds a part of all weights, gradients and optimizer state, and of the frozen models (FSDP2).

    Each model of the module is sharded block by block. Checkpoints have a file for each rank; any number of ranks, and
    any strategy, continues from them.

    Args:
        reshard_after_forward: Frees each block's weights between its forward and its backward pass. False keeps them:
            one gathering less a step, and memory for whole models (their optimizer state stays sharded).
        cpu_offload: Sharded weights, gradients and optimizer state rest in CPU memory, where the optimizer steps too;
            the GPU has what is computed with. A single GPU can use it as well.
        keep_frozen: Models without anything to train (PPO's reference and reward model) stay whole on every rank, in
            the precision of the arithmetic: one gathering less of each in every rollout.
    """

    def __init__(
        self, *, reshard_after_forward: bool = True, cpu_offload: bool = False, keep_frozen: bool = False
    ) -> None:
        super().__init__(tensor_parallel_size=1)
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.keep_frozen = keep_frozen

    def setup_environment(self) -> None:
        """Makes the mesh: one axis over all ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.root_device.type == "cuda":  # a process that is alone has no group yet; see `distributed.group`
            self._process_group_backend = distributed.ON_GPUS
        super().setup_environment()

    def shard(self, module: AlignModule) -> None:
        """Shards every transformers model of a module; `AlignModule.configure_model` calls it.

        Raises:
            ValueError: The loss would be scaled on the GPU and unscaled where the gradients are, which is elsewhere.
        """
        precision = self.precision_plugin.precision
        if self.cpu_offload and precision == "16-mixed":
            raise ValueError(
                "trainer.precision: got 16-mixed with cpu_offload: true, whose gradients are in CPU memory, where "
                "float16's scaling does not work; expected bf16-mixed or 32-true"
            )
        compute_dtype = torch.bfloat16 if precision == "bf16-mixed" else None
        for child in module.children():
            whole = self.keep_frozen and not any(parameter.requires_grad for parameter in child.parameters())
            for model in sharding.models_of(child):
                dtype = None if is_quantised(model) else compute_dtype  # codes are no numbers to be rounded
                if not whole:
                    sharding.shard(
                        model,
                        self.device_mesh["data_parallel"],
                        device=self.root_device,
                        compute_dtype=dtype,
                        reshard_after_forward=self.reshard_after_forward,
                        cpu_offload=self.cpu_offload,
                    )
                    continue
                deferred.fill(model, self.root_device)
                if dtype is not None:
                    load.convert(child, dtype)  # as sharded weights are when they are gathered

    def model_to_device(self) -> None:
        """Moves all but sharded weights, which are where they shall be."""
        module = self.lightning_module
        assert module is not None
        module._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(self.root_device))
        _update_properties(module, device=self.root_device)  # what `module.device` says

    # Checkpoints: Lightning's own go around its CheckpointIO. Ours are the same tree as without sharding, in which the
    # tensors are sharded; `VerifiedCheckpointIO` knows how to write and read those.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizer states come with the checkpoint, as without sharding."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of this rank's parts."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Of this rank's parts."""
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes each rank's parts. All ranks must call it."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads this rank's parts, whoever saved them."""
        return checkpoints.read(Path(checkpoint_path), self.device_mesh["data_parallel"])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes the weights over."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        weights = {
            name: distributed.sharded_like(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the optimizer states over."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for number, own in state["state"].items():
                parameter = parameters[number]
                for name, value in own.items():
                    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == parameter.shape[0]:
                        own[name] = distributed.sharded_like(value, parameter)
            optimizer.load_state_dict(state)
