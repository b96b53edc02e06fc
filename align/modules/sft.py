"""Supervised fine-tuning on demonstrations (InstructGPT, section 3.5 and appendix C.1), and pretraining: same loss."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.models import forward, sharding
from align.modules.base import AlignModule, Stats
from align.optim import Optim
from align.types import Sequences, sent


class SFTModule(AlignModule):
    """Minimises the mean cross-entropy of the tokens a batch marks for learning.

    The mean is over the batch's tokens, not over its sequences: a long answer weighs more than a short one.

    Args:
        model: The language model to fine-tune.
        tokenizer, optim, micro_batch_tokens, seed, compile, pack: See `AlignModule`.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optim: Optim,
        micro_batch_tokens: int = 8192,
        seed: int = 0,
        compile: bool = False,
        pack: bool = True,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            optim=optim,
            micro_batch_tokens=micro_batch_tokens,
            seed=seed,
            compile=compile,
            pack=pack,
        )
        self.model = model
        self.valid_loss = MeanMetric()
        self.valid_accuracy = MeanMetric()

    def networks(self) -> Mapping[str, nn.Module]:
        """See `AlignModule`."""
        return {"model": self.model}

    def exported(self) -> nn.Module:
        """See `AlignModule`."""
        return self.model

    def training_step(self, batch: Sequences, batch_idx: int) -> dict[str, Any]:
        """One optimizer step on one batch of demonstrations."""
        stats = self.accumulate(self.losses(batch)) | self.step()
        self.report(stats, tokens=int(batch.lengths.sum()), bar=("train/loss",))
        return {"metrics": stats, "rollout": None}

    def losses(self, batch: Sequences) -> Iterator[tuple[Tensor, Stats]]:
        """The batch's loss in micro-batches, each divided by the tokens of the whole batch."""
        for loss in self.text_losses(self.model, batch):
            yield loss, {"train/loss": loss.detach()}

    def validation_step(self, batch: Sequences, batch_idx: int) -> None:
        """Counts loss and hits of every token marked for learning."""
        groups = self.micro_batches(batch.lengths, self.model)
        with sharding.gathered(self.model):
            for part in (batch.rows_at(group) for group in groups):
                ids, mask = forward.fitted(part.ids, part.lengths), forward.fitted(part.mask, part.lengths)
                logprobs, hits = forward.token_logprobs_and_hits(self.model, sent(ids, self.device), mask)
                self.valid_loss.update(-logprobs)
                self.valid_accuracy.update(hits)

    def on_validation_epoch_end(self) -> None:
        """Logs loss (nats a token), perplexity (its exponential) and the share of tokens that were the likeliest."""
        loss = self.valid_loss.compute()
        values = {"valid/loss": loss, "valid/perplexity": loss.exp(), "valid/accuracy": self.valid_accuracy.compute()}
        self.log_dict(values, prog_bar=True)
        self.valid_loss.reset()
        self.valid_accuracy.reset()
