"""How well rewards agree with labelers: the metrics of a reward model, over any number of batches."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryCalibrationError

from align.formulas.losses import preference_pairs
from align.types import Comparisons

CALIBRATION_BINS = 15


class RankingMetrics(nn.Module):
    """Accumulates agreement over pairs of completions of the same prompt.

    `compute` returns: `accuracy`, over pairs the labeler told apart; `accuracy_with_ties`, over all pairs, where a
    labeler's tie counts half; `margin`, the mean reward difference of preferred and other; `calibration_error`, the
    expected error of σ(difference) as a probability of being preferred; `accuracy_longer`, what preferring the longer
    response would get (equal lengths count half); `loss`, the mean −log σ(difference); and `accuracy/NAME` of each
    named labeler.
    """

    def __init__(self) -> None:
        super().__init__()
        names = ("accuracy", "accuracy_with_ties", "margin", "accuracy_longer", "loss")
        # Every rank counts the pairs of all ranks, so there is nothing to add up.
        self.means = nn.ModuleDict({name: MeanMetric(sync_on_compute=False) for name in names})
        self.calibration = BinaryCalibrationError(n_bins=CALIBRATION_BINS, sync_on_compute=False)
        self.labelers: dict[str, MeanMetric] = {}

    def update(self, rewards: Float[Tensor, " completions"], batch: Comparisons) -> None:
        """Counts the pairs of one batch.

        Args:
            rewards: Of the batch's completions.
            batch: What labelers thought of them.
        """
        pairs = preference_pairs(batch.scores, batch.prompt_index)
        if len(pairs.winner):
            self._update_pairs(rewards, batch, pairs.winner, pairs.loser)
        same_prompt = batch.prompt_index[:, None] == batch.prompt_index[None, :]
        ties = same_prompt & (batch.scores[:, None] == batch.scores[None, :])
        tied_pairs = int(ties.triu(1).sum())
        if tied_pairs:
            self._count("accuracy_with_ties", torch.full((tied_pairs,), 0.5))

    def _update_pairs(self, rewards: Tensor, batch: Comparisons, winner: Tensor, loser: Tensor) -> None:
        margin = rewards[winner] - rewards[loser]
        hits = better(margin)
        self._count("accuracy", hits)
        self._count("accuracy_with_ties", hits)
        self._count("margin", margin)
        self._count("loss", -nn.functional.logsigmoid(margin))
        lengths = batch.response_lengths
        self._count("accuracy_longer", better((lengths[winner] - lengths[loser]).float()))
        # A pair is put to the calibration once, the way round in which its rows stand, so that both answers occur.
        forwards = winner < loser
        chance = torch.where(forwards, margin, -margin).sigmoid()
        self.calibration.update(chance, forwards.long())
        named = [batch.labelers[i] for i in winner.tolist()]
        for name in sorted(set(named) - {""}):
            if name not in self.labelers:
                self.labelers[name] = MeanMetric(sync_on_compute=False).to(rewards.device)
            own = torch.tensor([labeler == name for labeler in named], device=rewards.device)
            self.labelers[name].update(hits[own])

    def _count(self, name: str, values: Tensor) -> None:
        metric = self.means[name]
        assert isinstance(metric, MeanMetric)
        metric.update(values)

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name; only those of which there was something to count."""
        counted = {name: metric for name, metric in self.means.items() if metric.update_called}
        values = {name: metric.compute() for name, metric in counted.items()}  # type: ignore[operator]
        if self.calibration.update_called:
            values["calibration_error"] = self.calibration.compute()
        return values | {f"accuracy/{name}": metric.compute() for name, metric in sorted(self.labelers.items())}

    def reset(self) -> None:
        """Forgets all batches."""
        for metric in self.means.values():
            metric.reset()  # type: ignore[operator]
        self.calibration.reset()
        self.labelers = {}


def better(difference: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """1 where positive, 0 where negative, a half where neither."""
    return (difference.sign() + 1.0) / 2.0
