"""For tests of compiled blocks: models with what may meet compilation, and graphs that run as they are taken."""

import contextlib
import inspect
from collections.abc import Iterator
from unittest import mock

import tiny
import torch
from torch._dynamo.utils import counters
from transformers import AttentionInterface, PreTrainedModel

from align.models import adapters, attention, hydra
from align.types import Sequences


@contextlib.contextmanager
def afresh(backend: str | None = "eager") -> Iterator[None]:
    """Nothing is compiled when the block begins, nor counted.

    Inside transformer blocks no shapes are checked, which only tests do: that would be compiled too, anew for each
    length.

    Args:
        backend: What runs graphs: "eager", as they are, to the same bits; None, what a run uses.
    """
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    checked, plain = attention.attend, inspect.unwrap(attention.attend)
    for name in (attention.NAME, attention.CAUSAL):
        AttentionInterface.register(name, plain)  # for models that are there, and those to come
    shared = inspect.unwrap(attention._attend_to_shared, stop=lambda it: hasattr(it, "_torchdynamo_disable"))
    unchecked = mock.patch.multiple(attention, attend=plain, _attend_to_shared=shared)
    with unchecked, torch.compiler.set_stance(force_backend=backend):
        yield
    for name in (attention.NAME, attention.CAUSAL):
        AttentionInterface.register(name, checked)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def graphs() -> int:
    """How many have been compiled so far."""
    return counters["stats"]["unique_graphs"]


def model(kind: str) -> PreTrainedModel:
    """A model that makes use of what its name says, without dropout, in training."""
    made = tiny.gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0) if kind == "gpt2" else tiny.llama()
    attention.use_attend(made)
    if kind == "checkpointing":
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if kind == "frozen":
        hydra.freeze(made, 1)
    if kind == "lora":
        adapters.add(made, adapters.LoRA(rank=2))
        for name, parameter in adapters.named_parameters(made, adapters.OWN):
            parameter.data.fill_(0.01 if ".lora_B." in name else 0.3)
    return made.train()


def text(prompts: list[int], responses: list[int]) -> Sequences:
    """Demonstrations of these lengths."""
    episodes = tiny.completions(prompts, responses)
    return Sequences(ids=episodes.ids, lengths=episodes.lengths, mask=episodes.token_mask)
