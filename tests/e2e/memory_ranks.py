"""Run by tests/e2e/test_peak_memory.py on one or several ranks: what training steps need, planned and measured."""

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from align import distributed, memory
from align.models import sharding
from align.models.attention import use_attend
from align.models.heads import ScalarModel
from align.modules.base import AlignModule
from align.modules.ppo import PPO, PPOModule
from align.modules.sft import SFTModule
from align.optim import Optim
from align.rollout.sampler import DecodeSampler
from align.types import Completions, Rollout, Sequences

TOKENS = 512


def shape(family: str) -> PretrainedConfig:
    """A model of 50 to 100 million weights, and one that is smaller."""
    if family == "gpt2":  # a third of it is the vocabulary, tied; two chunks of logits a micro-batch
        return GPT2Config(n_embd=640, n_layer=12, n_head=10)
    common = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    if family == "qwen3":  # tied
        return Qwen3Config(vocab_size=32000, num_hidden_layers=14, head_dim=64, tie_word_embeddings=True, **common)
    layers = 1 if family == "tiny" else 16
    return LlamaConfig(vocab_size=4000, num_hidden_layers=layers, **common)


def model(kind: type, family: str, checkpointing: bool) -> PreTrainedModel:
    """One with random weights."""
    config = shape(family)
    config.num_labels, config.pad_token_id = 1, 0
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        setattr(config, name, 0.0)
    found = kind.from_config(config).train()  # type: ignore[attr-defined]
    use_attend(found)
    if checkpointing:
        found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return found


def module(objective: str, family: str, checkpointing: bool) -> AlignModule:
    """What is to be trained."""
    common = {"tokenizer": tiny.tokenizer(), "optim": Optim(lr=1e-4), "micro_batch_tokens": TOKENS}
    policy = model(AutoModelForCausalLM, family, checkpointing)
    if objective == "sft":
        return SFTModule(model=policy, **common)  # type: ignore[arg-type]
    value, reward = (ScalarModel(model(AutoModelForSequenceClassification, family, checkpointing)) for _ in range(2))
    sampler = DecodeSampler(max_new_tokens=8)
    return PPOModule(policy=policy, value=value, reward=reward, sampler=sampler, ppo=PPO(), **common)  # type: ignore[arg-type]


def pieces(trained: AlignModule, rows: int, length: int) -> Iterator[torch.Tensor]:
    """The losses of a batch's micro-batches."""
    ids, lengths = torch.zeros((rows, length), dtype=torch.long), torch.full((rows,), length)
    if isinstance(trained, SFTModule):
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        losses = trained.losses(Sequences(ids=ids, lengths=lengths, mask=mask))
    else:
        assert isinstance(trained, PPOModule)
        prompts = torch.full((rows,), 4)
        completions = Completions(
            ids=ids, prompt_lengths=prompts, response_lengths=lengths - prompts,
            finished=torch.ones(rows, dtype=torch.bool), rows=tuple({} for _ in range(rows)),
        )  # fmt: skip
        numbers = ("logprobs", "ref_logprobs", "values", "entropies", "rewards", "advantages", "returns")
        tokens = {name: torch.randn((rows, length - 4)) for name in numbers}
        losses = trained.ppo_losses(
            Rollout(completions=completions, mask=completions.mask, scores=torch.randn(rows), **tokens)
        )
    return (loss for loss, _ in losses)


def status(name: str) -> int:
    """What the kernel says of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def measured(objective: str, family: str, checkpointing: bool) -> tuple[int, int]:
    """What a run is planned to need and what it needs, in bytes."""
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    ranks = distributed.world_size()
    trained = module(objective, family, checkpointing)
    planned = memory.plan(trained, memory.Setting(ranks=ranks, sharded=ranks > 1, tokens=TOKENS))
    for one in sharding.models_of(trained) if ranks > 1 else ():
        sharding.shard(one, init_device_mesh("cpu", (ranks,)), device=torch.device("cpu"))
    optimizer, _ = trained.optim.build(trained.networks(), steps=2)
    for rows, length in ((1, 8), (8, TOKENS // 4)):  # the optimizer's state is made; then two micro-batches
        for loss in pieces(trained, rows, length):
            loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()
    return planned.peak, status("VmHWM") - before


def main(out: str, cases: Sequence[str]) -> None:
    """Writes what each case is planned to need and needs to `out`-RANK, one after the other."""
    torch.set_num_threads(1)
    with distributed.group("cpu"):
        measured("ppo", "tiny", True)  # what libraries keep from their first use on
        found = {}
        for case in cases:
            objective, family, *rest = case.split("-")
            found[case] = measured(objective, family, rest == ["checkpointing"])
        Path(f"{out}-{distributed.rank()}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
