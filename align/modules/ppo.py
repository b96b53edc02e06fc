"""PPO against a reward model, with the pretraining term that makes it PPO-ptx (InstructGPT, section 3.5, Eq. 2).

An iteration is: collect a rollout (`PPOModule.collect`), then take one optimizer step for each minibatch of it
(`PPOModule.training_step`). The two share one frozen record, the `Rollout`; the data module's loader asks for a new
one when the last is used up. What departs from the paper, or fills what it leaves open, is listed in docs/details.md.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align import distributed, interrupt, seeds
from align.formulas import losses, masked, returns
from align.models import compiled, forward, sharding, trials
from align.models.heads import ScalarModel
from align.models.hydra import Hydra, depth, grow
from align.models.load import frozen
from align.models.quantised import Bits
from align.models.trunk import Adapter, Head, one_pass, reference_of
from align.modules.base import AlignModule, Stats, gradient_norm
from align.optim import Optim
from align.rollout import collect
from align.rollout.collect import FrozenStates, Scored, States, response_tokens, reward_scores, token_passes
from align.rollout.sampler import Sampler
from align.types import Completions, Minibatch, Prompts, Rollout, Sequences, sent


@dataclass(frozen=True, kw_only=True)
class PPO:
    """The numbers of the algorithm. Defaults: InstructGPT, appendix C.4; where it is silent, as docs/details.md says.

    Attributes:
        kl_coef: β, the price of a nat of KL to the reference, charged at every token.
        gamma: Discount; 1 is none.
        lam: λ of GAE: 1 is the Monte-Carlo return, 0 the one-step error.
        clip: ε: π/π_old has no further effect outside 1 ± ε.
        value_coef: Weight of the value loss. Networks with weights of their own are stepped by Adam and clipped each on
            its own, so it says little there; a value head on the policy needs less than 1 (lm-human-preferences: 0.1).
        value_clip: A value has no further effect beyond this distance from the rollout's; null does not clip.
        ptx_coef: γ of Eq. 2: weight of the pretraining loss, in mean nats a token. 0 is plain PPO.
        whiten_advantages: Mean 0 and variance 1 over each minibatch's tokens.
        whiten_rewards: Variance 1 over the rollout's token rewards; their mean stays.
        missing_eos: A response cut at the length limit keeps its score, has it replaced by `missing_eos_value`, or has
            that number subtracted.
        missing_eos_value: See `missing_eos`. Replacing by -1 assumes rewards of unit scale around 0.
    """

    kl_coef: float = 0.02
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_coef: float = 1.0
    value_clip: float | None = 0.2
    ptx_coef: float = 0.0
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    missing_eos: Literal["keep", "replace", "subtract"] = "keep"
    missing_eos_value: float = -1.0

    def __post_init__(self) -> None:
        """Refuses numbers with which the formulas mean nothing."""
        errors = self.config_errors({item.name: getattr(self, item.name) for item in fields(self)})
        if errors:
            raise ValueError("; ".join(errors))

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """What is wrong with these constructor arguments, in words."""
        errors = [
            f"{name}: got {arguments[name]}, expected 0 or more"
            for name in ("kl_coef", "ptx_coef", "value_coef", "value_clip")
            if (arguments[name] or 0.0) < 0.0
        ]
        errors += [
            f"{name}: got {arguments[name]}, expected a number from 0 to 1"
            for name in ("gamma", "lam", "clip")
            if not 0.0 <= arguments[name] <= 1.0
        ]
        if arguments["missing_eos"] == "subtract" and arguments["missing_eos_value"] <= 0.0:
            errors.append(
                f"missing_eos_value: got {arguments['missing_eos_value']}, which subtract would turn into a bonus for "
                "never ending; expected a positive number"
            )
        return errors


class PPOModule(AlignModule):
    """Optimises a policy against a reward model without straying from the reference.

    To change the reward, override `score`; to change the advantage, `estimate_advantages`. To change generation, give
    another `sampler`.

    Args:
        policy: What learns. The KL reference is what it was at first (appendix C.3: the PPO init): the policy without
            its adapter where it has one (`lora`), else a frozen copy, made here.
        value: The value network, initialised from the reward model; learns as well. Or what shall be put on the
            policy in its place: see `align.models.trunk`.
        reward: The reward model; frozen. Or an adapter for the policy's weights.
        sampler: Writes the responses.
        ppo: The algorithm's numbers.
        quantise_reference: Keeps the copy in 8 or 4 bits. It is then no longer quite what the policy was, so KL does
            not begin at 0.
        share_frozen: Keeps and computes once what the policy has frozen (`trained_blocks`) and others have alike: the
            reference, and a value network trained likewise from the same weights; a reward model's is only kept once.
            Changes rounding at most; not under FSDP.
        value_lr: Peak learning rate of the value network; null means `optim.lr`.
        tokenizer, optim, micro_batch_tokens, seed, compile, pack: See `AlignModule`.
    """

    def __init__(
        self,
        *,
        policy: PreTrainedModel,
        value: ScalarModel | Head | Adapter,
        reward: ScalarModel | Adapter,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        optim: Optim,
        ppo: PPO,
        quantise_reference: Bits | None = None,
        share_frozen: bool = True,
        value_lr: float | None = None,
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
        if sampler.temperature <= 0.0:
            raise ValueError(
                f"sampler.temperature: got {sampler.temperature}, expected a positive number: PPO must sample; "
                "InstructGPT uses 1.0"
            )
        self.policy = policy
        self.reference = reference_of(policy, quantise_reference)
        self.value = value.on(policy, "value", trained=True) if isinstance(value, Head | Adapter) else value
        self.reward = frozen(reward.on(policy, "reward", trained=False) if isinstance(reward, Adapter) else reward)
        self.share_frozen = share_frozen
        self.frozen = FrozenStates(Hydra(policy), self.split)
        self.sampler = sampler
        self.ppo = ppo
        self.value_lr = value_lr
        self.kl_coef = ppo.kl_coef
        self._collecting: Stats = {}
        self._begun: float | None = None

    def networks(self) -> Mapping[str, nn.Module]:
        """See `AlignModule`."""
        return {"policy": self.policy, "value": self.value}

    def exported(self) -> nn.Module:
        """See `AlignModule`."""
        return self.policy

    def learning_rates(self) -> Mapping[str, float]:
        """See `AlignModule`."""
        return {} if self.value_lr is None else {"value": self.value_lr}

    def configure_model(self) -> None:
        """See `AlignModule`; then what networks have frozen alike is shared."""
        super().configure_model()
        own = self.reward.hf is self.policy  # and so has an adapter, which may reach further down
        others = {"reference": self.reference, "value": self.value.hf, **({} if own else {"reward": self.reward.hf})}
        self.frozen = FrozenStates(grow(self.policy, others if self.share_frozen else {}), self.split)
        if depth(self.policy):
            rank_zero_info(self.frozen.hydra.described())

    def on_fit_start(self) -> None:
        """Raises ValueError unless text is there if and only if the objective has a pretraining term."""
        texts = getattr(self.trainer.datamodule, "pretraining_batch", 0)  # type: ignore[attr-defined]
        if (self.ppo.ptx_coef > 0.0) != (texts > 0):
            raise ValueError(
                f"module.ppo.ptx_coef is {self.ppo.ptx_coef} and data.pretraining_batch is {texts}; for PPO-ptx both "
                "must be positive, for plain PPO both 0"
            )

    # The hooks.

    def score(self, completions: Completions) -> Float[Tensor, " batch"]:
        """The reward of each whole response. Override it to reward anything else.

        Called by `collect` once a rollout, without gradients, in the trainer's precision. Completions are in host
        memory; `completions.rows` holds the examples the prompts came from, and `self.tokenizer` decodes.
        """
        return reward_scores(self.reward, completions, self.micro_batch_tokens, self.device)

    def estimate_advantages(
        self,
        rewards: Float[Tensor, "batch response"],
        values: Float[Tensor, "batch response"],
        mask: Bool[Tensor, "batch response"],
    ) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
        """Advantages and the returns the value network shall predict. Override it to use another estimator.

        Called by `collect` once a rollout, without gradients. Advantages are whitened later, minibatch by minibatch.
        """
        return returns.generalized_advantages(rewards, values, mask, gamma=self.ppo.gamma, lam=self.ppo.lam)

    def split(self, lengths: Int[Tensor, " batch"]) -> list[Int[Tensor, " _"]]:
        """Micro-batches of episodes so long: alike for policy, reference and value network, to learn and score."""
        return self.micro_batches(lengths, self.policy, self.reference or self.policy, self.value.hf)

    # Collecting.

    @torch.no_grad()
    def collect(self, prompts: Prompts, iteration: int, minibatch: int) -> Rollout:
        """Answers the prompts with the present policy, and computes all that the update needs.

        Args:
            prompts: One episode each; this rank's part of the rollout.
            iteration: Number of the rollout, from 0; its random draws depend on it and the seed alone.
            minibatch: Episodes in this rank's part of a minibatch.

        Returns:
            The rollout of all ranks together.
        """
        start = time.perf_counter()
        with interrupt.interruptible(self.may_be_dropped()), self.precision(), trials.evaluating(self):
            self.frozen.forget()
            draws = seeds.forked(self.seed, "sample", iteration, self.global_rank)
            with sharding.gathered(self.policy):  # until its own pass is done, which frees it
                with draws, compiled.off():
                    completions = self.sampler(self.policy, prompts.to(self.device)).to("cpu")
                sampled = time.perf_counter()
                passes = token_passes(
                    completions,
                    policy=self.policy,
                    reference=self.reference,
                    value=self.value,
                    temperature=self.sampler.temperature,
                    minibatch=minibatch,
                    split=self.split,
                    hydra=self.frozen.hydra,
                    states=self.frozen.of_rollout(completions, minibatch),
                    device=self.device,
                )
            scores = self._with_eos_rule(self.score(completions).cpu(), completions.finished)
        everyone = distributed.whole(Scored(completions=completions, passes=passes, scores=scores))
        self._clock_rollout(everyone.completions, start, sampled)
        return self._rollout_of(everyone)

    def _rollout_of(self, scored: Scored) -> Rollout:
        """Token rewards, advantages and returns of the whole rollout, the same on every rank."""
        passes, mask = scored.passes, scored.completions.mask
        rewards = returns.token_rewards(passes.logprobs, passes.ref_logprobs, scored.scores, mask, self.kl_coef)
        if self.ppo.whiten_rewards:
            rewards = masked.whiten_keep_mean(rewards, mask)
        advantages, targets = self.estimate_advantages(rewards, passes.values, mask)
        return Rollout(
            completions=scored.completions,
            mask=mask,
            logprobs=passes.logprobs,
            ref_logprobs=passes.ref_logprobs,
            values=passes.values,
            entropies=passes.entropies,
            scores=scored.scores,
            rewards=rewards,
            advantages=advantages,
            returns=targets,
        )

    def _clock_rollout(self, completions: Completions, start: float, sampled: float) -> None:
        written, count = float(completions.response_lengths.sum()), len(completions.ids)
        before, self._begun = self._begun, start
        since = {} if before is None else {"speed/episodes_per_second": torch.tensor(count / (start - before))}
        self._collecting = since | {
            "speed/rollout_seconds": torch.tensor(sampled - start),
            "speed/scoring_seconds": torch.tensor(time.perf_counter() - sampled),
            "speed/rollout_tokens_per_second": torch.tensor(written / (sampled - start)),
        }

    def _with_eos_rule(
        self, scores: Float[Tensor, " batch"], finished: Bool[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        return returns.MISSING_EOS[self.ppo.missing_eos](scores, finished, self.ppo.missing_eos_value)

    # Learning.

    def training_step(self, batch: Minibatch, batch_idx: int) -> dict[str, Any]:
        """One optimizer step: pretraining and PPO gradients add up, then policy and value network step together."""
        stats = self.rollout_stats(batch.fresh) if batch.fresh is not None else {}
        tokens = int(batch.episodes.completions.lengths.sum())
        if batch.pretraining is not None:
            stats |= self.accumulate(self.pretraining_losses(batch.pretraining))
            stats["grad_norm/ptx"] = gradient_norm(self.policy.parameters(), summed=False)
            tokens += int(batch.pretraining.lengths.sum())
        stats |= self.accumulate(self.ppo_losses(batch.episodes, self.frozen.of(batch, self.trainer.world_size)))
        stats |= self.step()
        shown = ("rollout/score", "rollout/kl", "rollout/response_length")
        self.report(stats, tokens=tokens, bar=shown, always=batch.fresh is not None)
        return {"metrics": stats, "rollout": batch.fresh}

    def ppo_losses(self, episodes: Rollout, states: States | None = None) -> Iterator[tuple[Tensor, Stats]]:
        """Clipped policy and value losses of a minibatch in micro-batches, divided by the whole minibatch's tokens.

        Args:
            episodes: This rank's part of it.
            states: What the frozen blocks give for them, if that is known already.
        """
        hydra, count = self.frozen.hydra, distributed.total(episodes.mask.sum())
        if self.ppo.whiten_advantages:
            episodes = replace(episodes, advantages=self._whitened(episodes, count))
        groups = self.split(episodes.completions.lengths)
        for number, part in enumerate(self.parts(episodes, groups)):
            (ids, scored), written = response_tokens(part.completions), part.mask
            lengths, (ids, part) = part.completions.lengths, sent((ids, part), self.device)
            below = self.frozen.at(groups[number], ids, lengths, states)
            if one_pass(self.value):
                logprobs, values = forward.token_logprobs_and_values(
                    self.policy, self.value, ids, scored, self.sampler.temperature, below
                )
                policy_loss, policy_stats = self.policy_piece(forward.by_response(logprobs, written), part, count)
                value_loss, value_stats = self.value_piece(forward.by_response(values, written), part, count)
                yield policy_loss + value_loss, policy_stats | value_stats
            else:  # one graph after the other: less memory
                logprobs = forward.token_logprobs(self.policy, ids, scored, self.sampler.temperature, below)
                yield self.policy_piece(forward.by_response(logprobs, written), part, count)
                with self.value.in_use():
                    values = forward.token_values(self.value, ids, scored, hydra.given(self.value.hf, below))
                    yield self.value_piece(forward.by_response(values, written), part, count)

    def policy_piece(self, new: Float[Tensor, "batch response"], part: Rollout, count: Tensor) -> tuple[Tensor, Stats]:
        """Clipped policy loss of a micro-batch that now has these log-probs, and what it says of the update."""
        old, mask = part.logprobs, part.mask
        loss, stats = losses.policy_loss(new, old, part.advantages, mask, clip=self.ppo.clip, count=count)
        stats |= {"ratio_max": losses.ratio_max(new, old, mask), "loss": loss.detach()}
        return loss, {f"policy/{name}": value for name, value in stats.items()}

    def value_piece(self, new: Float[Tensor, "batch response"], part: Rollout, count: Tensor) -> tuple[Tensor, Stats]:
        """Value loss of a micro-batch, with its weight; logged without."""
        loss, stats = self.value_loss(new, part, count)
        stats |= {"loss": loss.detach()}
        return self.ppo.value_coef * loss, {f"value/{name}": value for name, value in stats.items()}

    def _whitened(self, episodes: Rollout, count: Tensor) -> Float[Tensor, "batch response"]:
        """Advantages with mean 0 and variance 1 over the minibatch, of which this rank has a part."""
        values, mask = episodes.advantages, episodes.mask
        mean = distributed.total(masked.masked_sum(values, mask)) / count
        variance = distributed.total(masked.masked_sum((values - mean).square(), mask)) / count
        return masked.standardise(values, mask, mean=mean, variance=variance)

    def value_loss(self, values: Float[Tensor, "batch response"], part: Rollout, count: Tensor) -> tuple[Tensor, Stats]:
        """Half the squared error to the returns, clipped around the rollout's values if `value_clip` is set."""
        clip = self.ppo.value_clip
        if clip is None:
            return losses.value_loss(values, part.returns, part.mask, count=count)
        return losses.clipped_value_loss(values, part.values, part.returns, part.mask, clip=clip, count=count)

    def pretraining_losses(self, text: Sequences) -> Iterator[tuple[Tensor, Stats]]:
        """γ times the mean cross-entropy of pretraining text, in micro-batches: the second line of Eq. 2."""
        for loss in self.text_losses(self.policy, text):
            yield self.ppo.ptx_coef * loss, {"ptx/loss": loss.detach()}

    def rollout_stats(self, rollout: Rollout) -> Stats:
        """What a rollout says of the policy; docs/metrics.md explains each."""
        mask, lengths = rollout.mask, rollout.completions.response_lengths.float()
        kl = returns.kl_k1(rollout.logprobs, rollout.ref_logprobs)
        k3 = returns.kl_k3(rollout.logprobs, rollout.ref_logprobs)
        return {
            "rollout/score": rollout.scores.mean(),
            "rollout/score_std": rollout.scores.std(correction=0),
            "rollout/reward": masked.masked_sum(rollout.rewards, mask) / len(mask),
            "rollout/kl": masked.masked_sum(kl, mask) / len(mask),
            "rollout/kl_k3": masked.masked_sum(k3, mask) / len(mask),
            "rollout/kl_coef": torch.tensor(self.kl_coef),
            "rollout/entropy": masked.masked_mean(rollout.entropies, mask),
            "rollout/response_length": lengths.mean(),
            "rollout/eos_share": rollout.completions.finished.float().mean(),
            **collect.mismatch(rollout),
            "value/explained_variance": losses.explained_variance(rollout.values, rollout.returns, mask),
            **self._collecting,
        }

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps β too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_coef"] = self.kl_coef

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores β too."""
        super().on_load_checkpoint(checkpoint)
        self.kl_coef = checkpoint["kl_coef"]
