"""Run by tests/e2e/test_ranks.py on several ranks: steps of the 8-bit optimizer on weights sharded by FSDP2."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from align import distributed
from align.blockwise import Blockwise


class Weights(nn.Module):
    """Rows that no number of ranks divides, and rows that are no whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Parameter(torch.randn(37, 300)), nn.Parameter(torch.randn(16, 256))
        self.small = nn.Parameter(torch.randn(3))


def main(out: str) -> None:
    """Writes the weights and the state, gathered, as the first rank sees them."""
    weights = Weights()
    with distributed.group("cpu"):
        if distributed.world_size() > 1:
            fully_shard(weights, mesh=init_device_mesh("cpu", (distributed.world_size(),)))
        parameters = dict(weights.named_parameters())
        groups = [{"params": list(parameters.values())}]
        optimizer = Blockwise(groups, rule="adamw", lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
        for step in range(5):
            for parameter in parameters.values():
                grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                parameter.grad = distributed.sharded_like(grad, parameter)
            optimizer.step()
        found = {name: distributed.whole_tensor(parameter.detach()) for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    assert isinstance(value, DTensor) == (distributed.world_size() > 1)
                    found[f"{name}.{key}"] = distributed.whole_tensor(value)
        if distributed.is_first():
            torch.save(found, Path(out))


if __name__ == "__main__":
    main(sys.argv[1])
