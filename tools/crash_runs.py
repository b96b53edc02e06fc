"""What `tools.crash_test` runs, and how two runs are compared: tiny models, real text, the files of configs/."""

import csv
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from align import checkpoints
from tools.e2e.files import write_rows
from tools.e2e.instructions import describe_row
from tools.e2e.prepare import human_texts, train_tokenizer

ROOT = Path(__file__).parents[1]

CALLBACKS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sft": {"ema": {"_target_": "align.callbacks.ema.EMA", "decay": 0.9}},
    "reward": {},
    "ppo": {"kl": {"_target_": "align.callbacks.kl.AdaptiveKL", "target": 0.5, "horizon": 100}},
}
"""What a run has beside the callbacks of its file: everything with a state of its own."""

CHECKPOINTS = {"_target_": "align.callbacks.checkpoint.Checkpoints", "every_steps": 2, "every_minutes": None}


def prepare(folder: Path) -> None:
    """A tiny model with its tokenizer, and some real text in every format."""
    texts = human_texts("valid")[:160]
    draw = random.Random(0)
    rows = [describe_row(sheet, text, draw) for sheet, text in texts]
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = tokenizer.get_vocab()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
            pad_token_id=special["<pad>"], bos_token_id=special["<bos>"], eos_token_id=special["<eos>"], **shape,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "texts.jsonl", [{"text": text} for _, text in texts])
    ranked = [
        {"prompt": row["prompt"], "responses": [row["response"], other, row["response"][:20]], "scores": [2, 1, 0]}
        for row, (_, other) in zip(rows, reversed(texts), strict=True)
    ]
    write_rows(folder / "ranked.jsonl", ranked)
    for kind, callbacks in CALLBACKS.items():
        config = OmegaConf.load(ROOT / f"configs/{kind}.yaml")
        config.callbacks = {**config.callbacks, "checkpoints": CHECKPOINTS, **callbacks}
        OmegaConf.save(config, folder / f"{kind}.yaml")


def arguments(kind: str, world: Path, workers: int) -> list[str]:
    """The command line of a kind of run, without its folder."""
    model, rows, texts = world / "model", world / "rows.jsonl", world / "texts.jsonl"
    shared = [f"tokenizer.path={model}", "loggers.wandb=false", "trainer.log_every_n_steps=1"]
    if kind == "sft":
        return [
            str(world / "sft.yaml"), *shared, f"module.model.path={model}", f"data.train={rows}",
            f"data.valid={rows}", f"data.mix={texts}", "data.batch_size=32", "trainer.max_epochs=2",
            "module.model.dropout=0.1", f"data.num_workers={workers}", f"callbacks.samples.prompts={rows}",
            "callbacks.samples.every=3", "callbacks.samples.sampler.max_new_tokens=8",
        ]  # fmt: skip
    if kind == "reward":
        return [
            str(world / "reward.yaml"), *shared, f"module.model.path={model}",
            f"data.train={world / 'ranked.jsonl'}", f"data.valid={world / 'ranked.jsonl'}",
            f"data.demonstrations={rows}", "data.batch_size=16", "trainer.max_epochs=1",
            f"data.num_workers={workers}", "module.model.trained_blocks=1",
        ]  # fmt: skip
    found = [
        str(world / "ppo.yaml"), *shared, f"module.policy.path={model}", f"module.value.path={model}",
        f"module.reward.path={model}", f"data.train={rows}", f"data.pretraining={texts}", "data.episodes=48",
        "data.rollout_batch=16", "data.minibatch=8", "data.epochs=2", "data.pretraining_batch=8",
        "module.sampler.max_new_tokens=8", f"callbacks.samples.prompts={rows}", "callbacks.samples.count=8",
        "callbacks.samples.every=3", "callbacks.samples.sampler.max_new_tokens=8", "callbacks.rollouts.every=1",
        "module.policy.trained_blocks=1", "module.value.trained_blocks=1",
    ]  # fmt: skip
    return found if kind == "ppo-ptx" else [*found, "module.ppo.ptx_coef=0", "data.pretraining_batch=0"]


def differences(run: Path, reference: Path) -> list[str]:
    """In what the results of two runs differ; nothing, if nobody can tell which was killed."""
    found = []
    for name in ("hf", "hf-ema"):
        pair = [folder / name / "model.safetensors" for folder in (run, reference)]
        if pair[1].exists() and pair[0].read_bytes() != pair[1].read_bytes():
            found.append(f"{name}: weights")
    states = [checkpoints.newest_good(folder / "checkpoints")[0] for folder in (run, reference)]
    if None in states:
        found.append("no last checkpoint")
    else:
        loaded = [checkpoints.read(state) for state in states if state is not None]
        found += [f"checkpoint: {place}" for place in _unequal(*loaded)]
    if metrics(run) != metrics(reference):
        found.append("metrics.csv")
    for table in reference.glob("*.jsonl"):
        if (run / table.name).read_bytes() != table.read_bytes():
            found.append(table.name)
    return found


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock measured."""
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        return [
            {key: value for key, value in row.items() if not key.startswith("speed/")} for row in csv.DictReader(file)
        ]


def _unequal(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two states differ: dotted keys."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [place]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return [place or "keys"]
        return [found for key in one for found in _unequal(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [place]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for number, pair in pairs for found in _unequal(*pair, f"{place}.{number}")]
    return [] if one == other else [place]
