"""TRL's SFT and reward trainers at the common work. Runs in an environment with TRL.

Whatever TRL does not have to share with the others is its default. Shared are: the precision (weights in float32), no
gradient checkpointing (its default), the examples of an optimizer step, learning rate, no logging and no saving.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from tools.benchmark.kinds import BFLOAT16
from tools.benchmark.protocol import Turn
from tools.benchmark.work import LEARNING_RATE, Work

PACKED = 1024
"""Tokens of a row into which examples are packed: TRL's default for `max_length`."""

MICRO_BATCH = 8
"""TRL's default for `per_device_train_batch_size`."""

SFT_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "all at once": {"per_device_train_batch_size": None},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "per_device_train_batch_size": 1},
}
"""What may be set to make SFT faster; None stands for the examples of an optimizer step."""

REWARD_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "all at once": {"per_device_train_batch_size": None},
}


class Clock(TrainerCallback):
    """When training began and ended."""

    began = ended = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the first batch is asked for."""
        self.began = time.perf_counter()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After the last step."""
        self.ended = time.perf_counter()


def prepare(kind: str, setting: str, work: Work, precision: str) -> Callable[[], Turn]:
    """Loads what a kind of work needs; the result does it once.

    Args:
        kind: See `tools.benchmark.kinds`.
        setting: A key of `SFT_SETTINGS` or `REWARD_SETTINGS`.
        work: The common work.
        precision: As TRL's argument `bf16` chooses it.
    """
    if kind == "sft":
        return _sft(work, SFT_SETTINGS[setting], precision)
    return _reward(work, int(kind.removeprefix("reward")), REWARD_SETTINGS[setting], precision)


def _sft(work: Work, settings: Mapping[str, Any], precision: str) -> Callable[[], Turn]:
    rows = [
        {
            "input_ids": row["prompt"] + row["response"],
            "completion_mask": [0] * len(row["prompt"]) + [1] * len(row["response"]),
        }
        for row in work.demonstrations
    ]
    tokens = sum(len(row["input_ids"]) for row in rows)
    batch = work.size.batch
    if settings.get("packing"):  # as many optimizer steps as without
        batch = -(-tokens // (PACKED * work.size.steps))
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32),
        args=SFTConfig(completion_only_loss=True, **_arguments(batch, settings, precision)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work.policy),
        callbacks=[clock],
    )
    return _turn_of(trainer, clock, tokens)


def _reward(work: Work, count: int, settings: Mapping[str, Any], precision: str) -> Callable[[], Turn]:
    """Pairs of a prompt stand together and are not shuffled, so that a step has the prompts that others have in it."""
    rows = []
    for row in work.comparisons[count]:
        for pair in combinations(range(count), 2):
            worse, better = sorted(pair, key=lambda one: row["scores"][one])
            answers = {"chosen_ids": row["responses"][better], "rejected_ids": row["responses"][worse]}
            rows.append({name: row["prompt"] + answer for name, answer in answers.items()})
    batch = work.size.compared[count] * count * (count - 1) // 2
    clock = Clock()
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(work.reward, dtype=torch.float32),
        args=RewardConfig(train_sampling_strategy="sequential", **_arguments(batch, settings, precision)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work.reward),
        callbacks=[clock],
    )
    return _turn_of(trainer, clock, len(rows))


def _arguments(batch: int, settings: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Those of both trainers, for optimizer steps of `batch` rows."""
    chosen = {"per_device_train_batch_size": MICRO_BATCH, **settings}
    at_once = min(chosen["per_device_train_batch_size"] or batch, batch)
    return {
        **chosen,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": -(-batch // at_once),
        **quiet(precision),
    }


def quiet(precision: str) -> dict[str, Any]:
    """Arguments that all of TRL's trainers share here, in a precision."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="align-benchmark-"),
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": precision == BFLOAT16,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _turn_of(trainer: Trainer, clock: Clock, units: int) -> Callable[[], Turn]:
    def turn() -> Turn:
        trainer.train()
        return Turn(clock.ended - clock.began, units)

    return turn
