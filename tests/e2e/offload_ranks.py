"""Run by tests/e2e/test_offload.py: steps of SFT on a device, with what is sharded there or at rest in CPU memory."""

import sys
from pathlib import Path

import tiny
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from align import distributed
from align.models import sharding
from align.modules.base import gradient_norm, scale_gradients
from align.modules.sft import SFTModule
from align.optim import Optim
from align.types import Sequences


def main(out: str, kind: str, offload: str) -> None:
    """Writes the trained weights, and the most memory that the GPU had allocated, to `out`."""
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    backend = distributed.ON_GPUS if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{out}-group", rank=0, world_size=1)
    model = tiny.llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=8).train()
    optim = Optim(lr=1e-3)
    module = SFTModule(model=model, tokenizer=tiny.tokenizer(), optim=optim, micro_batch_tokens=64)
    mesh = init_device_mesh(kind, (1,))
    sharding.shard(model, mesh, device=device, cpu_offload=offload == "true")
    optimizer, _ = optim.build(module.networks(), steps=3)
    ids = torch.arange(8 * 16, device=device).view(8, 16) % (tiny.VOCAB - 3) + 3  # two micro-batches
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    batch = Sequences(ids=ids, lengths=torch.full((8,), 16, device=device), mask=mask)
    for _ in range(3):
        for loss, _ in module.losses(batch):
            loss.backward()
        scale_gradients(model.parameters(), gradient_norm(model.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() if kind == "cuda" else 0
    torch.save({"peak": peak, "weights": sharding.whole_weights(model)}, Path(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
