"""TRL's PPO trainer at the common work. Runs in an environment with a TRL that has `trl.experimental.ppo`.

Its phases are told apart by three marks: `batch_generation` returns, which ends the rollout; the first shuffle of the
episodes, which ends the scoring; and the callback at the end of the update.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from tools.benchmark.kinds import BFLOAT16
from tools.benchmark.plain_ppo import left_padded
from tools.benchmark.protocol import Turn
from tools.benchmark.trl_trainers import MICRO_BATCH, quiet
from tools.benchmark.work import CLIP, GAMMA, KL, LAMBDA, VALUE_COEF, Work

SETTINGS: Mapping[str, int | None] = {"defaults": MICRO_BATCH, "all at once": None}
"""Episodes computed at once in an update; None: all."""


class Marks(TrainerCallback):
    """When the phases of a turn ended."""

    began = sampled = scored = ended = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the first prompt is asked for."""
        self.began, self.scored = time.perf_counter(), 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Behind the last epoch over a rollout."""
        self.ended = time.perf_counter()

    def turn(self, episodes: int) -> Turn:
        """What they say."""
        phases = {
            "rollout": self.sampled - self.began,
            "scoring": self.scored - self.sampled,
            "update": self.ended - self.scored,
        }
        return Turn(self.ended - self.began, episodes, phases)


def prepare(kind: str, setting: str, work: Work, precision: str) -> Callable[[], Turn]:
    """Loads four networks; the result collects a rollout and learns from it.

    Args:
        kind: Always "ppo".
        setting: A key of `SETTINGS`.
        work: The common work.
        precision: Of the update; TRL samples and scores in float32.
    """
    if precision == BFLOAT16:  # what `accelerate launch --mixed_precision bf16` sets; the trainer does not read `bf16`
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    size, at_once = work.size, min(SETTINGS[setting] or work.size.episodes, work.size.episodes)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(work.reward, dtype=torch.float32) for _ in range(2)
    )  # fmt: skip
    prompts, marks = left_padded(work.episodes), Marks()
    trainer = PPOTrainer(
        args=PPOConfig(
            **quiet(precision), per_device_train_batch_size=at_once,
            gradient_accumulation_steps=size.episodes // at_once, total_episodes=size.episodes,
            num_ppo_epochs=size.epochs, response_length=size.response.high,
            stop_token="eos", temperature=1.0, kl_coef=KL, gamma=GAMMA, lam=LAMBDA, cliprange=CLIP, vf_coef=VALUE_COEF,
            cliprange_value=CLIP, num_sample_generations=0,
        ),
        processing_class=AutoTokenizer.from_pretrained(work.policy, padding_side="left"),
        model=AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32),
        reward_model=reward,
        value_model=value,
        # More rows than are used: on the last batch of an epoch, accelerate takes a step for every micro-batch.
        train_dataset=Dataset.from_list(2 * [{"input_ids": prompt} for prompt in work.episodes]),
        eval_dataset=Dataset.from_list([{"input_ids": prompt} for prompt in work.episodes]),
        data_collator=lambda rows: {"input_ids": prompts},  # the same prompts in every turn
        callbacks=[marks],
    )  # fmt: skip

    def turn() -> Turn:
        with (
            mock.patch.object(ppo_trainer, "batch_generation", _marked(ppo_trainer.batch_generation, marks, "sampled")),
            mock.patch.object(np.random, "permutation", _marked_before(np.random.permutation, marks)),
        ):
            trainer.train()
        return marks.turn(size.episodes)

    return turn


def _marked(function: Callable[..., Any], marks: Marks, name: str) -> Callable[..., Any]:
    """The function, which notes when it returned."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        setattr(marks, name, time.perf_counter())
        return result

    return marked


def _marked_before(function: Callable[..., Any], marks: Marks) -> Callable[..., Any]:
    """The function, which notes when it was first called."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.scored = marks.scored or time.perf_counter()
        return function(*args, **kwargs)

    return marked
