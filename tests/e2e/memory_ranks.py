"""Run by tests/e2e/test_memory.py on one or several ranks: what two steps of SFT need, planned and measured."""

import json
import sys
from pathlib import Path

import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from align import distributed, plan
from align.models import sharding
from align.modules.sft import SFTModule
from align.optim import Optim
from align.types import Sequences

TOKENS = 1024


def resident() -> int:
    """The memory that this process has now, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024


def main(out: str, hidden: int, layers: int) -> None:
    """Writes `[planned, measured]` in bytes to `out`-RANK."""
    torch.set_num_threads(1)
    with distributed.group("cpu"):
        distributed.total(torch.zeros(1))
        (torch.zeros(64, 64) @ torch.zeros(64, 64)).sum()
        before = resident()
        config = LlamaConfig(
            vocab_size=4000, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128,
        )  # fmt: skip
        model = LlamaForCausalLM(config).train()
        optim = Optim(lr=1e-4)
        module = SFTModule(model=model, tokenizer=tiny.tokenizer(), optim=optim, micro_batch_tokens=TOKENS)
        ranks = distributed.world_size()
        planned = plan.plan(module, plan.Setting(ranks=ranks, sharded=ranks > 1, tokens=TOKENS)).peak
        if ranks > 1:
            sharding.shard(model, init_device_mesh("cpu", (ranks,)), device=torch.device("cpu"))
        optimizer, _ = optim.build(module.networks(), steps=2)
        ids = torch.zeros((8, TOKENS // 4), dtype=torch.long)  # two micro-batches
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        batch = Sequences(ids=ids, lengths=torch.full((8,), TOKENS // 4), mask=mask)
        for _ in range(2):
            for loss, _ in module.losses(batch):
                loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
        Path(f"{out}-{distributed.rank()}").write_text(json.dumps([planned, plan.used() - before]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
