"""Adaptive KL control (Ziegler et al. 2019, section 2.2). InstructGPT keeps β constant: leave this callback out."""

from typing import Any

import lightning as L

from align.formulas.returns import adaptive_kl
from align.modules.ppo import PPOModule


class AdaptiveKL(L.Callback):
    """After each rollout, moves β so that the KL to the reference approaches a target.

    Args:
        target: KL to steer to, in nats a response.
        horizon: In episodes; larger reacts more slowly.
    """

    def __init__(self, *, target: float = 6.0, horizon: float = 10_000.0) -> None:
        if target <= 0.0 or horizon <= 0.0:
            raise ValueError(f"target and horizon must be positive, got target={target}, horizon={horizon}")
        self.target, self.horizon = target, horizon

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Changes `PPOModule.kl_coef` for the rollouts to come; called once an optimizer step."""
        assert isinstance(pl_module, PPOModule)
        rollout = outputs["rollout"]
        if rollout is not None:
            pl_module.kl_coef = adaptive_kl(
                pl_module.kl_coef,
                float(outputs["metrics"]["rollout/kl"]),
                target=self.target,
                horizon=self.horizon,
                batch=len(rollout.mask),
            )
