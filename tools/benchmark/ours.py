"""align at the common work: its modules and data modules under Lightning's Trainer, as `align.fit` runs them.

Only tokenising is left out, for all contenders alike. Micro-batches and everything else but the precision are the
defaults.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import LlamaForCausalLM

from align.allocator import keep_freed_memory
from align.data.base import Encoded, compact, padded
from align.data.comparisons import ComparisonData
from align.data.demonstrations import DemonstrationData
from align.data.experience import ExperienceData
from align.models.compiled import compile_blocks
from align.models.load import load_causal_lm, load_scalar_model, load_tokenizer
from align.models.trunk import Head
from align.modules.ppo import PPO, PPOModule
from align.modules.reward import RewardModule
from align.modules.sft import SFTModule
from align.optim import Optim
from align.rollout.sampler import DecodeSampler, GenerateSampler
from align.types import Prompts
from tools.benchmark import work as common
from tools.benchmark.kinds import BFLOAT16, COMPILED, CPU, CUDA, TRAINERS
from tools.benchmark.machine import done
from tools.benchmark.protocol import Turn
from tools.benchmark.work import PAD, Size, Work

SEPARATE, TRUNK, FROZEN, BOTH = "separate networks", "one trunk", "half frozen", "trunk half frozen"
"""Settings of PPO: a value network of its own or a head on the policy, and whether only half of the blocks learn."""

GROWTH_STEPS = 3
"""Optimizer steps for each point of the growth curves; the first warms up."""


class Demonstrations(DemonstrationData):
    """Examples that are token ids: `prompt` and `response`."""

    def encode(self, examples: Sequence[dict[str, Any]], counts: "Counter[str]", split: str) -> list[Encoded]:
        """Nothing to tokenise."""
        return [_demonstration(row) for row in examples]


class Comparisons(ComparisonData):
    """Examples that are token ids: `prompt`, `responses` and `scores`."""

    def encode(self, examples: Sequence[dict[str, Any]], counts: "Counter[str]", split: str) -> list[Encoded]:
        """Nothing to tokenise."""
        return [
            {
                "prompt": compact(row["prompt"]),
                "responses": [compact(answer) for answer in row["responses"]],
                "scores": torch.tensor(row["scores"], dtype=torch.float32),
                "labeler": "",
            }
            for row in examples
        ]


class Episodes(ExperienceData):
    """Examples whose `prompt` is token ids."""

    def encode(self, examples: Sequence[dict[str, Any]], counts: "Counter[str]", split: str) -> list[Encoded]:
        """Nothing to tokenise."""
        return [{"ids": compact(row["prompt"]), "row": row} for row in examples]


class Clock(L.Callback):
    """When training began and ended, and when the first optimizer step was done."""

    began = first = ended = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first batch is asked for, the first time only; blocks have been compiled by then."""
        done(pl_module.device.type)
        self.began = self.began or time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """The first time only."""
        self.first = self.first or time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the last step."""
        done(pl_module.device.type)
        self.ended = time.perf_counter()


class Staying(SingleDeviceStrategy):
    """Leaves a module on its GPU behind a turn: the next one would bring it back, gigabytes each way."""

    def teardown(self) -> None:
        """Of all else."""
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


class Numbers(Logger):
    """Keeps what a module logs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = {}

    @property
    def name(self) -> str:
        """See `Logger`."""
        return "numbers"

    @property
    def version(self) -> str:
        """See `Logger`."""
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds each number to those of its name."""
        for name, value in metrics.items():
            self.found.setdefault(name, []).append(value)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to keep."""


def prepare(kind: str, setting: str, work: Work, precision: str) -> Callable[..., Turn]:
    """Loads what a kind of work needs; the result does it once.

    Args:
        kind: See `tools.benchmark.kinds`.
        setting: Of PPO: `SEPARATE`, `TRUNK`, `FROZEN` or `BOTH`. Of "rollout": "decode" or "generate". Behind it, or
            alone, `COMPILED`.
        work: The common work.
        precision: Of the Trainer; where there is none, of the sampler.
    """
    keep_freed_memory()  # as every command of align does
    compiles, setting = setting.endswith(COMPILED), setting.removesuffix(COMPILED).removesuffix(", ")
    if kind == "sft":
        return _sft(work, precision, compiles)
    if kind == "growth":
        return lambda **point: grow(work.size, precision, **point)
    if kind == "ppo":
        return _ppo(work, setting, precision, compiles)
    if kind == "rollout":
        return _rollout(work, setting, precision, compiles)
    return _reward(work, int(kind.removeprefix("reward")), precision)


def _sft(work: Work, precision: str, compiles: bool) -> Callable[[], Turn]:
    tokenizer = load_tokenizer(work.policy)
    module = SFTModule(model=load_causal_lm(work.policy), tokenizer=tokenizer, optim=_optim(), compile=compiles)
    data = Demonstrations(
        tokenizer=tokenizer, train=work.demonstrations, batch_size=work.size.batch, **_limits(work.size)
    )  # fmt: skip
    tokens = sum(len(row["prompt"]) + len(row["response"]) for row in work.demonstrations)

    def turn() -> Turn:
        clock = _fit(module, data, precision, work.device)
        return Turn(clock.ended - clock.began, tokens)

    return turn


def _reward(work: Work, count: int, precision: str) -> Callable[[], Turn]:
    tokenizer = load_tokenizer(work.reward)
    module = RewardModule(model=load_scalar_model(work.reward), tokenizer=tokenizer, optim=_optim())
    rows = work.comparisons[count]
    data = Comparisons(tokenizer=tokenizer, train=rows, batch_size=work.size.compared[count], **_limits(work.size))
    pairs = len(rows) * count * (count - 1) // 2

    def turn() -> Turn:
        clock = _fit(module, data, precision, work.device)
        return Turn(clock.ended - clock.began, pairs)

    return turn


def _ppo(work: Work, setting: str, precision: str, compiles: bool) -> Callable[[], Turn]:
    size, tokenizer = work.size, load_tokenizer(work.policy)
    trained = size.layers // 2 if setting in (FROZEN, BOTH) else None
    policy, value = load_causal_lm(work.policy, trained_blocks=trained), None
    if setting not in (TRUNK, BOTH):
        value = load_scalar_model(work.reward, trained_blocks=trained)
    if setting == FROZEN and value is not None:  # as if the reward model had been trained like that, from the policy
        value.hf.base_model.load_state_dict(policy.base_model.state_dict())
    module = PPOModule(
        policy=policy,
        value=value or Head(),
        reward=load_scalar_model(work.reward),
        sampler=DecodeSampler(max_new_tokens=size.response.high),
        tokenizer=tokenizer,
        optim=_optim(),
        compile=compiles,
        ppo=PPO(
            kl_coef=common.KL, gamma=common.GAMMA, lam=common.LAMBDA, clip=common.CLIP, value_coef=common.VALUE_COEF
        ),
    )
    data = Episodes(
        tokenizer=tokenizer,
        train=[{"prompt": prompt} for prompt in work.episodes],
        episodes=size.episodes,
        rollout_batch=size.episodes,
        minibatch=size.episodes,
        epochs=size.epochs,
        max_prompt_tokens=size.prompt.high,
    )

    def turn() -> Turn:
        numbers = Numbers()
        clock = _fit(module, data, precision, work.device, logger=numbers)
        (rollout,), (scoring,) = (numbers.found[f"speed/{name}_seconds"] for name in ("rollout", "scoring"))
        seconds = clock.ended - clock.began
        phases = {"rollout": rollout, "scoring": scoring, "update": seconds - rollout - scoring}
        return Turn(seconds, size.episodes, phases)

    return turn


def _rollout(work: Work, setting: str, precision: str, compiles: bool) -> Callable[[], Turn]:
    policy, limit = load_causal_lm(work.policy).to(work.device), work.size.response.high
    if compiles:
        compile_blocks([policy], ragged=True)
    sampler = GenerateSampler(max_new_tokens=limit)
    if setting == "decode":
        sampler = DecodeSampler(max_new_tokens=limit, dtype="bfloat16" if precision == BFLOAT16 else "float32")
    ids, lengths = padded([torch.tensor(prompt) for prompt in work.prompts], PAD)
    prompts = Prompts(ids=ids, lengths=lengths, rows=tuple({} for _ in work.prompts))

    def turn() -> Turn:
        start = time.perf_counter()
        with torch.autocast(work.device, torch.bfloat16, enabled=precision == BFLOAT16):
            completions = sampler(policy, prompts.to(work.device)).to(CPU)
        return Turn(time.perf_counter() - start, int(completions.response_lengths.sum()))

    return turn


def grow(size: Size, precision: str, *, examples: int, length: int | None = None, **shape: int) -> Turn:
    """Steps of SFT on a batch and a model of other sizes.

    Args:
        size: Of the common work.
        precision: Of the Trainer.
        examples: In a batch.
        length: Of each example, a third of it the response; None: as different as in the common work.
        shape: What else differs, by name of the `Size`'s field.

    Returns:
        The time of all steps but the first; units are tokens.
    """
    changed = common.resized(size, **shape)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(common.config(changed)).save_pretrained(folder)
        common.tokenizer(changed.vocab).save_pretrained(folder)
        tokenizer, model = load_tokenizer(folder), load_causal_lm(folder)
    rows = common.demonstrations(changed, examples, length)
    module = SFTModule(model=model, tokenizer=tokenizer, optim=_optim())
    data = Demonstrations(
        tokenizer=tokenizer, train=rows, batch_size=examples, max_prompt_tokens=changed.positions,
        max_response_tokens=changed.positions,
    )  # fmt: skip
    clock = _fit(module, data, precision, CPU, max_epochs=GROWTH_STEPS)
    tokens = sum(len(row["prompt"]) + len(row["response"]) for row in rows)
    return Turn(clock.ended - clock.first, tokens * (GROWTH_STEPS - 1))


def _fit(
    module: L.LightningModule,
    data: L.LightningDataModule,
    precision: str,
    device: str,
    *,
    logger: Logger | None = None,
    max_epochs: int = 1,
) -> Clock:
    clock = Clock()
    where: dict[str, Any] = {"strategy": Staying("cuda:0")} if device == CUDA else {"accelerator": device, "devices": 1}
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            **where, precision=TRAINERS[precision], max_epochs=max_epochs, logger=logger or False,
            callbacks=[clock], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=Path(folder),
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    return clock


def _demonstration(row: Mapping[str, list[int]]) -> Encoded:
    learned = [False] * len(row["prompt"]) + [True] * len(row["response"])
    return {"ids": compact([*row["prompt"], *row["response"]]), "mask": torch.tensor(learned)}


def _limits(size: Size) -> dict[str, int]:
    return {"max_prompt_tokens": size.prompt.high, "max_response_tokens": size.response.high}


def _optim() -> Optim:
    return Optim(lr=common.LEARNING_RATE)
