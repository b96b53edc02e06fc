"""An exponential moving average of the trained weights (InstructGPT, appendix C.4: decay 0.992), exported beside them.

Lightning's own averaging callback copies the whole module, which in PPO would double four models to average one;
torch's `AveragedModel` copies a model, which one that is sharded does not allow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from align import distributed
from align.models.load import save_model
from align.modules.base import AlignModule
from align.modules.ppo import PPOModule


class EMA(L.Callback):
    """Averages what the exported model learns and writes them to `hf-ema` in the run's folder at the end.

    Args:
        decay: Weight of the average so far, at each update.
        every: "step", each optimizer step; or "iteration", each rollout. The paper does not say which.
    """

    def __init__(self, *, decay: float = 0.992, every: Literal["step", "iteration"] = "step") -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: got {decay}, expected at least 0 and less than 1, such as 0.992")
        self.decay, self.every = decay, every
        self.average: dict[str, Tensor] = {}
        self._saved: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the weights as they are, or from those of the checkpoint.

        Raises:
            ValueError: Iterations shall be counted where there are none.
        """
        assert isinstance(pl_module, AlignModule)
        if self.every == "iteration" and not isinstance(pl_module, PPOModule):
            raise ValueError(f"every: got iteration, but {type(pl_module).__name__} has no rollouts; expected step")
        weights = _weights(pl_module)
        self.average = {name: weight.clone() for name, weight in weights.items()}
        self._take_saved()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the new weights into the average."""
        if self.every == "step" or outputs["rollout"] is not None:
            for name, weight in _weights(pl_module).items():
                distributed.own_part(self.average[name]).lerp_(distributed.own_part(weight), 1.0 - self.decay)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the average as a Hugging Face folder, also where a run is continued after its last step."""
        assert isinstance(pl_module, AlignModule)
        _swap(_weights(pl_module), self.average)
        save_model(pl_module.exported(), pl_module.tokenizer, Path(trainer.default_root_dir) / "hf-ema")  # type: ignore[arg-type]
        _swap(_weights(pl_module), self.average)

    def state_dict(self) -> dict[str, Any]:
        """The average, for checkpoints."""
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the average over: when the models exist, or at once where they do, as they are sharded."""
        self._saved = state_dict["average"]
        if self.average:
            self._take_saved()

    def _take_saved(self) -> None:
        for name, saved in self._saved.items():
            mine = self.average[name]
            distributed.own_part(mine).copy_(distributed.own_part(distributed.sharded_like(saved, mine)))
        self._saved = {}


def _weights(module: L.LightningModule) -> dict[str, Tensor]:
    assert isinstance(module, AlignModule)
    found = module.exported().named_parameters()
    return {name: parameter.detach() for name, parameter in found if parameter.requires_grad}


def _swap(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Exchanges the contents, one tensor after another."""
    for name, weight in weights.items():
        one, other = distributed.own_part(weight), distributed.own_part(others[name])
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
