"""Tiny random models of several families, a tokenizer and records, for tests. Nothing is downloaded."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from align.models.heads import ScalarModel
from align.types import Completions, Prompts

PAD, BOS, EOS, VOCAB = 0, 1, 2, 50

_SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.3,
    "max_position_embeddings": 128,
}  # fmt: skip


def llama(tied: bool = False, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A Llama of about 20 thousand parameters; large initial weights, so that it has opinions."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, "tie_word_embeddings": tied, **changes}))


def gpt2(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A GPT-2: learned positions, tied embeddings, dropout on in its own configuration."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": PAD,
        "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.3,
    }  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**{**shape, **changes}))


def families() -> dict[str, PreTrainedModel]:
    """One model of each family, in evaluation mode."""
    torch.manual_seed(0)
    models = {
        "gpt2": gpt2(),
        "llama-tied": llama(tied=True),
        "llama-untied": llama(tied=False),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=8)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**_SHAPE, head_dim=8, final_logit_softcapping=5.0)),
    }
    return {name: model.eval() for name, model in models.items()}


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """Words w3, w4, ... are their own ids; pad, bos and eos are 0, 1 and 2."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side=side
    )


def prompts(lengths: list[int], seed: int = 0) -> Prompts:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return Prompts(
        ids=torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator),
        lengths=torch.tensor(lengths),
        rows=tuple({"number": i} for i in range(len(lengths))),
    )


def completions(prompt_lengths: list[int], response_lengths: list[int], seed: int = 0) -> Completions:
    """Random prompts with random responses of these lengths, every other one finished."""
    total = [p + r for p, r in zip(prompt_lengths, response_lengths, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(total), max(total)), generator=generator)
    finished = torch.arange(len(total)) % 2 == 0
    for row, length in enumerate(total):
        ids[row, length - 1] = EOS if finished[row] else ids[row, length - 1]
    return Completions(
        ids=ids,
        prompt_lengths=torch.tensor(prompt_lengths),
        response_lengths=torch.tensor(response_lengths),
        finished=finished,
        rows=tuple({"number": i} for i in range(len(total))),
    )


def scalar_model(seed: int = 0, **changes: object) -> ScalarModel:
    """A Llama with a scalar head."""
    base = llama(**changes).config
    torch.manual_seed(seed)
    base.num_labels = 1
    return ScalarModel(LlamaForSequenceClassification(base))


def gradients(module: torch.nn.Module, pieces: Iterable[tuple[torch.Tensor, object]]) -> dict[str, torch.Tensor]:
    """The summed gradients of all pieces of loss, by parameter, leaving the module's own gradients empty."""
    module.zero_grad()
    for loss, _ in pieces:
        loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal to rounding, and not all zero."""
    assert ours.keys() == theirs.keys() and any(bool(value.any()) for value in ours.values())
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def fit(
    module: L.LightningModule,
    data: L.LightningDataModule,
    folder: Path,
    callbacks: Sequence[L.Callback] = (),
    from_checkpoint: Path | None = None,
    **trainer: Any,
) -> L.Trainer:
    """Trains in `folder`, quietly."""
    made = L.Trainer(
        **{
            "accelerator": "cpu", "logger": CSVLogger(folder, name="", version=""), "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
            "log_every_n_steps": 1, "num_sanity_val_steps": 0, "callbacks": list(callbacks), "max_epochs": 1,
            "use_distributed_sampler": False, **trainer,
        }
    )  # fmt: skip
    made.fit(module, datamodule=data, ckpt_path=from_checkpoint)
    return made


def logged(folder: Path, name: str) -> list[float]:
    """All values of a metric, in order."""
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
