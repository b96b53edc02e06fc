"""Tiny random models of several families, a tokenizer and records, for tests. Nothing is downloaded."""

import torch
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
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
