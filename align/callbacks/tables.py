"""Texts to read while training: what the model answers to fixed prompts, and what PPO's rollouts look like.

Both append JSON lines to a file in the run's folder and log a table to W&B.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from transformers import PreTrainedTokenizerBase

from align import seeds
from align.data.prompts import encode_prompts
from align.data.sources import Source, read
from align.formulas.returns import kl_k1
from align.models import compiled, sharding
from align.modules.base import AlignModule
from align.rollout.sampler import Sampler
from align.types import Completions


class SampleTable(L.Callback):
    """Answers the same prompts before training, every so many optimizer steps, and at the end: samples.jsonl.

    Args:
        prompts: Examples with a prompt.
        sampler: How to answer them.
        count: How many prompts to take, from the first on.
        every: Optimizer steps between tables.
        max_prompt_tokens: Longer prompts are left out.
    """

    def __init__(
        self, *, prompts: Source, sampler: Sampler, count: int = 8, every: int = 100, max_prompt_tokens: int = 1024
    ) -> None:
        if count < 1 or every < 1:
            raise ValueError(f"count and every must be at least 1, got count={count}, every={every}")
        self.rows = list(read(prompts))[:count]
        self.sampler, self.every, self.max_prompt_tokens = sampler, every, max_prompt_tokens

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The answers before the first step; a run that is continued has them."""
        if trainer.ckpt_path is None:
            self._write(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The answers after every `every`-th step and after the last."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.estimated_stepping_batches:
            self._write(trainer, pl_module)

    @torch.no_grad()
    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, AlignModule)
        prompts = encode_prompts(module.tokenizer, self.rows, self.max_prompt_tokens).to(module.device)
        prompts = replace(prompts, seeds=seeds.derive_all(module.seed, "samples", range(len(prompts.rows))))
        model = module.exported()
        with module.precision(), seeds.forked(module.seed, "samples"), sharding.gathered(model), compiled.off():
            completions = self.sampler(model, prompts)  # type: ignore[arg-type]
        texts = response_texts(module.tokenizer, completions)
        done = completions.finished.tolist()
        entries = [
            {**row, "step": trainer.global_step, "response": text, "finished": finished}
            for row, text, finished in zip(completions.rows, texts, done, strict=True)
        ]
        write_table(trainer, "samples", entries, columns=("step", "prompt", "response", "finished"))


class RolloutTable(L.Callback):
    """The first episodes of every so many rollouts, with score and KL: rollouts.jsonl.

    Args:
        count: Episodes a table.
        every: Rollouts between tables.
    """

    def __init__(self, *, count: int = 4, every: int = 10) -> None:
        if count < 1 or every < 1:
            raise ValueError(f"count and every must be at least 1, got count={count}, every={every}")
        self.count, self.every = count, every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the rollout that came with the step, where it is a new one."""
        assert isinstance(pl_module, AlignModule)
        if outputs["rollout"] is None or batch.iteration % self.every:
            return
        rollout = outputs["rollout"].rows_at(torch.arange(min(self.count, len(outputs["rollout"].mask))))
        texts = response_texts(pl_module.tokenizer, rollout.completions)
        kl = kl_k1(rollout.logprobs, rollout.ref_logprobs).sum(1)
        numbers = zip(rollout.completions.rows, texts, rollout.scores.tolist(), kl.tolist(), strict=True)
        entries = [
            {"iteration": batch.iteration, "prompt": row.get("prompt"), "response": text, "score": score, "kl": nats}
            for row, text, score, nats in numbers
        ]
        write_table(trainer, "rollouts", entries, columns=("iteration", "prompt", "response", "score", "kl"))


def response_texts(tokenizer: PreTrainedTokenizerBase, completions: Completions) -> list[str]:
    """The responses as text, without EOS and other special tokens."""
    spans = zip(completions.ids, completions.prompt_lengths.tolist(), completions.lengths.tolist(), strict=True)
    return [str(tokenizer.decode(ids[start:end], skip_special_tokens=True)) for ids, start, end in spans]


def write_table(trainer: L.Trainer, name: str, entries: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """Appends the entries to `name`.jsonl in the run's folder, and logs the columns to W&B as a table."""
    if not trainer.is_global_zero:
        return
    with open(Path(trainer.default_root_dir) / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            data = [[entry.get(column) for column in columns] for entry in entries]
            logger.log_table(key=name, columns=list(columns), data=data, step=trainer.global_step)
