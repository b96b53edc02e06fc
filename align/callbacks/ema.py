"""An exponential moving average of the trained weights (InstructGPT, appendix C.4: decay 0.992), exported beside them.

torch's `AveragedModel` keeps it. Lightning's own averaging callback copies the whole module, which in PPO would double
four models to average one.
"""

from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from align.models.load import save_model
from align.modules.base import AlignModule
from align.modules.ppo import PPOModule


class EMA(L.Callback):
    """Averages the exported model's weights and writes them to `hf-ema` in the run's folder at the end.

    Args:
        decay: Weight of the average so far, at each update.
        every: "step", each optimizer step; or "iteration", each rollout. The paper does not say which.
    """

    def __init__(self, *, decay: float = 0.992, every: Literal["step", "iteration"] = "step") -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: got {decay}, expected at least 0 and less than 1, such as 0.992")
        self.decay, self.every = decay, every
        self.average: AveragedModel | None = None
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the weights as they are, or from those of the checkpoint.

        Raises:
            ValueError: Iterations shall be counted where there are none.
        """
        assert isinstance(pl_module, AlignModule)
        if self.every == "iteration" and not isinstance(pl_module, PPOModule):
            raise ValueError(f"every: got iteration, but {type(pl_module).__name__} has no rollouts; expected step")
        self.average = AveragedModel(pl_module.exported(), multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self.average.requires_grad_(False)
        self.average.update_parameters(pl_module.exported())  # the first update copies
        if self._saved is not None:
            self.average.load_state_dict(self._saved)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the new weights into the average."""
        assert isinstance(pl_module, AlignModule) and self.average is not None
        if self.every == "step" or outputs["rollout"] is not None:
            self.average.update_parameters(pl_module.exported())

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the average as a Hugging Face folder, also where a run is continued after its last step."""
        assert isinstance(pl_module, AlignModule) and self.average is not None
        if trainer.is_global_zero:
            save_model(self.average.module, pl_module.tokenizer, Path(trainer.default_root_dir) / "hf-ema")  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The average, for checkpoints."""
        return {} if self.average is None else self.average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the models exist."""
        self._saved = state_dict or None
