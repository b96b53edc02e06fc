"""Run by tests/e2e/test_compiled_steps.py on two processes: steps of SFT on shared weights, compiled and not."""

import sys
from pathlib import Path

import torch
from compiling import afresh, graphs, model, text
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from align import distributed
from align.models import compiled, forward, packed, sharding


def main(out: str) -> None:
    """Writes the weights trained both ways, and how many graphs there were after each step."""
    torch.set_num_threads(1)
    with distributed.group("cpu"):
        found: dict[str, object] = {}
        for name in ("plain", "compiled"):
            found[name], counts = steps(name == "compiled")
        if distributed.is_first():
            torch.save({**found, "graphs": counts}, Path(out))
        dist.barrier()


def steps(compiles: bool) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Three steps on batches of other shapes."""
    made, counts = model("llama"), []
    packed.padded.add(made)
    with afresh():
        if compiles:
            compiled.compile_blocks([made])
        sharding.shard(made, init_device_mesh("cpu", (2,)), device=torch.device("cpu"))
        if compiles:
            compiled.rehearse(made, torch.device("cpu"))
        for lengths in (([3, 9, 1, 5], [4, 1, 7, 5]), ([2, 2, 3], [2, 3, 3]), ([11, 17], [9, 30])):
            batch = text(*lengths)
            forward.token_logprobs(made, batch.ids, batch.mask).mean().backward()
            with torch.no_grad():
                for parameter in made.parameters():
                    distributed.own_part(parameter).sub_(0.1 * distributed.own_part(parameter.grad))
                    parameter.grad = None
            counts.append(graphs())
        return sharding.whole_weights(made), counts


if __name__ == "__main__":
    main(*sys.argv[1:])
