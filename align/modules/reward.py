"""The reward model: Eq. 1 of InstructGPT on K-wise comparisons, centred on the labelers' demonstrations."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align import distributed
from align.formulas import losses
from align.models import forward, packed, sharding, shared, trials
from align.models.heads import ScalarModel
from align.modules.base import AlignModule, Stats
from align.modules.ranking import RankingMetrics, better
from align.optim import Optim
from align.types import Comparisons, Sequences, sent

PAIR_WEIGHTS: Mapping[str, Callable[..., Tensor]] = {
    "kept_pairs": losses.pair_weights_kept,
    "all_pairs": losses.pair_weights_all,
}


class RewardModule(AlignModule):
    """Learns to score what labelers preferred higher, from all C(K,2) pairs of a prompt at once.

    Every completion is computed once a step, however many pairs it is in; a prompt's pairs are never spread over
    steps, which would let each completion be learned K-1 times (section 3.5, footnote 5). Ties are dropped.
    When training ends, the mean reward of the datamodule's demonstrations becomes the model's bias.

    Args:
        model: A language model with a scalar head.
        share_prompts: Computes a prompt once for all its completions, where the model allows it. The same to rounding.
        divisor: What a prompt's summed loss is divided by: "kept_pairs", those that do not tie, so that every prompt
            weighs the same; or "all_pairs", C(K,2). The paper does not say which.
        tokenizer, optim, micro_batch_tokens, seed, compile, pack: See `AlignModule`.
    """

    def __init__(
        self,
        *,
        model: ScalarModel,
        tokenizer: PreTrainedTokenizerBase,
        optim: Optim,
        share_prompts: bool = True,
        divisor: Literal["kept_pairs", "all_pairs"] = "kept_pairs",
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
        self.share_prompts = share_prompts
        self.pair_weights = PAIR_WEIGHTS[divisor]
        self.ranking = RankingMetrics()
        self._validated: list[tuple[Tensor, Comparisons]] = []

    def networks(self) -> Mapping[str, nn.Module]:
        """See `AlignModule`."""
        return {"model": self.model}

    def exported(self) -> nn.Module:
        """See `AlignModule`."""
        return self.model

    def training_step(self, batch: Comparisons, batch_idx: int) -> dict[str, Any]:
        """One optimizer step on the comparisons of one batch of prompts."""
        stats = self.accumulate(self.losses(batch)) | self.step()
        self.report(stats, tokens=int(batch.lengths.sum()), bar=("train/loss", "train/accuracy"))
        return {"metrics": stats, "rollout": None}

    def losses(self, batch: Comparisons) -> Iterator[tuple[Tensor, Stats]]:
        """The batch's loss in micro-batches of whole prompts, each divided by the prompts of the whole batch."""
        pairs = losses.preference_pairs(batch.scores, batch.prompt_index)
        prompts = distributed.total(losses.compared_prompts(pairs))
        count = distributed.total(torch.tensor(len(pairs.winner))).clamp_min(1)
        for part in self.parts(batch, self.groups(batch)):
            rewards = self.rewards(part.ids, part.lengths, part.prompt_index)
            own = losses.preference_pairs(part.scores, part.prompt_index)
            own, weights = sent((own, self.pair_weights(own, prompts)), self.device)
            loss = losses.ranking_loss(rewards, own, weights)
            margin = (rewards[own.winner] - rewards[own.loser]).detach()
            hits = better(margin).sum() / count
            yield loss, {"train/loss": loss.detach(), "train/accuracy": hits, "train/margin": margin.sum() / count}

    def groups(self, batch: Comparisons) -> list[Int[Tensor, " picked"]]:
        """Micro-batches of whole prompts: which completions."""
        if not self._shares():
            return prompt_groups(batch.prompt_index, batch.lengths, self.micro_batch_tokens)
        needed = shared.tokens(batch.ids, batch.lengths, batch.prompt_index)
        return prompt_groups(batch.prompt_index, needed, self.micro_batch_tokens, padded=False)

    def rewards(
        self,
        ids: Int[Tensor, "batch time"],
        lengths: Int[Tensor, " batch"],
        prompt_index: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The reward of each sequence; `prompt_index` tells which may share what they begin with."""
        ids = forward.fitted(ids, lengths)
        if prompt_index is not None and self._shares():
            laid_out = shared.share(
                ids, lengths, prompt_index, apart=self.device.type == "cpu", multiple=packed.grain(self.device)
            )
            return forward.final_scores_sharing(self.model, sent(laid_out, self.device))
        return forward.final_scores(self.model, sent(ids, self.device), lengths)

    def _shares(self) -> bool:
        return self.share_prompts and trials.shares_prompts(self.model.hf, self.device)

    def validation_step(self, batch: Comparisons, batch_idx: int) -> None:
        """Scores every completion."""
        with sharding.gathered(self.model):
            rewards = self.rewards_of_all(batch)
        nothing = batch.ids[:, :0].clone()  # as a slice it would keep all ids
        self._validated.append((rewards, replace(batch, ids=nothing)))

    def on_validation_epoch_end(self) -> None:
        """Logs how the order agrees with the labelers', of all ranks' completions: see `RankingMetrics`."""
        for own in distributed.from_all(self._validated):
            for rewards, batch in own:
                self.ranking.update(rewards.to(self.device), batch.to(self.device))
        self._validated = []
        for name, value in self.ranking.compute().items():
            self.log(f"valid/{name}", value, prog_bar=name in ("accuracy", "accuracy_longer"))
        self.ranking.reset()

    @torch.no_grad()
    def on_fit_end(self) -> None:
        """Centres the reward: labelers' demonstrations shall have mean 0 (section 3.5).

        Not at the end of training, which a run that is continued after its last step does not have.
        """
        batches = self.trainer.datamodule.demonstration_batches()  # type: ignore[attr-defined]
        if not sharding.is_sharded(self.model):
            self.to(self.trainer.strategy.root_device)  # from which Lightning has just taken it
        with self.precision(), trials.evaluating(self.model), sharding.gathered(self.model):
            rewards = [self.rewards_of_all(batch) for batch in batches]
        if rewards:
            self.model.bias += float(losses.reward_bias(torch.cat(rewards)))

    def rewards_of_all(self, batch: Sequences | Comparisons) -> Float[Tensor, " batch"]:
        """The reward of each sequence of a batch, computed in micro-batches."""
        if isinstance(batch, Comparisons):
            groups, prompts = self.groups(batch), batch.prompt_index
        else:
            groups, prompts = self.micro_batches(batch.lengths, self.model.hf), None
        found = [
            self.rewards(batch.ids[group], batch.lengths[group], None if prompts is None else prompts[group])
            for group in groups
        ]
        return forward.in_order(torch.cat(found).cpu(), groups)


def prompt_groups(
    prompt_index: Int[Tensor, " completions"], lengths: Int[Tensor, " completions"], budget: int, *, padded: bool = True
) -> list[Int[Tensor, " picked"]]:
    """Splits completions into micro-batches that keep a prompt's completions together.

    Args:
        prompt_index: Which prompt each completion answers.
        lengths: Tokens of each sequence, or those that have to be computed for it.
        budget: Tokens a micro-batch may hold; a prompt that needs more is one of its own.
        padded: Each sequence costs as many tokens as the longest of its micro-batch.

    Returns:
        Indices of completions; prompts with the longest completions first, or those with most to compute.
    """
    index, sizes = prompt_index.cpu(), lengths.cpu()
    empty, by = torch.zeros(int(index.max()) + 1, dtype=sizes.dtype), "amax" if padded else "sum"
    largest, counts = empty.scatter_reduce(0, index, sizes, by), torch.bincount(index)
    groups: list[list[int]] = []
    filled, width = 0, 1
    for prompt in torch.argsort(largest, descending=True, stable=True).tolist():
        own = int(counts[prompt] if padded else largest[prompt])
        filled += own
        if not groups or filled * width > budget:
            groups.append([])
            filled, width = own, int(largest[prompt]) if padded else 1
        groups[-1].append(prompt)
    return [torch.isin(index, torch.tensor(group)).nonzero()[:, 0] for group in groups]
