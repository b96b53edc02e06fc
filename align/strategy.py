"""How several processes share a model, as Lightning strategies for `trainer.strategy`."""

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist

from align.modules.base import AlignModule


class DDP(DDPStrategy):
    """Every rank holds all weights and learns from its part of each batch. What `strategy: auto` means for several.

    PyTorch's wrapper, which adds up gradients after every backward pass, is left out: an `AlignModule` adds them up
    once a step itself, as ranks have different numbers of micro-batches. Other modules are wrapped as usual.
    """

    def configure_ddp(self) -> None:
        """Gives every rank the first one's weights."""
        module = self.lightning_module
        if not isinstance(module, AlignModule):
            super().configure_ddp()
            return
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)
