"""Transformer blocks compiled by torch.compile, in place: modules, names of weights and copies stay what they are.

Passes of learning and of scoring run compiled. Writing does not (`off`) where a cache of keys and values changes its
form all the time, only where its steps are recorded (`align.rollout.replay`), nor do passes that only try a model out.
Attention to shared prompts and to what is kept leaves the compiled block and comes back (`align.models.attention`).
"""

import contextlib
import textwrap
from collections.abc import Iterable

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from align.models import sharding
from align.models.attention import causal
from align.models.packed import padded

VARIANTS = 64
"""A block's code is compiled for at most this many cases before torch runs it uncompiled: with gradients or without,
one sequence or several, its weights learning or frozen, each adapter; so for all networks of a module together."""

REHEARSED = (3, 61)
"""Sequences and tokens of a rehearsal; fewer tokens where a model has fewer positions. Unlike a model's own sizes, with
which torch would take them to be one."""

MOST_OF_A_REASON = 300
"""Characters: a C++ compiler can say pages."""


def compile_blocks(models: Iterable[PreTrainedModel], *, ragged: bool = False) -> None:
    """Lets blocks be compiled when they are first computed, once for sequences of any number and length.

    Args:
        models: Before they are sharded, which hides what their blocks are.
        ragged: Attention to sequences end to end is one operation (`align.models.flash`). Otherwise it would cut the
            compiled blocks into pieces, so sequences do not come end to end then.

    Raises:
        ValueError: One does not say what its blocks are.
    """
    models = list(models)
    if not ragged:
        padded.update(models)
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in (block for model in models for block in sharding.blocks(model)):
        block.compile(dynamic=True)


def off() -> contextlib.AbstractContextManager[object]:
    """Blocks run uncompiled inside the block. Backward passes of what runs there belong in it too."""
    return torch.compiler.set_stance("force_eager")


def on() -> contextlib.AbstractContextManager[object]:
    """Compiled blocks run compiled inside the block, also where `off` is around it."""
    return torch.compiler.set_stance("default")


def rehearse(model: PreTrainedModel, device: torch.device) -> None:
    """A small pass and its backward pass, so that what cannot be compiled is known before training. All ranks call it.

    Args:
        model: Whose blocks shall be compiled.
        device: Where it computes.

    Raises:
        ValueError: It cannot.
    """
    rows, time = REHEARSED
    time = min(time, getattr(model.config.get_text_config(), "max_position_embeddings", None) or time)
    ids = torch.zeros((rows, time), dtype=torch.long, device=device)
    try:
        sharding.run(model, _learn, ids)
    except TorchDynamoException as error:
        reason = textwrap.shorten(str(error).strip().split("\n\n")[0], MOST_OF_A_REASON)
        raise ValueError(
            f"compile: got true, but the blocks of {type(model).__name__} cannot be compiled here: {reason}; expected "
            "a model that torch.compile can take and, on a CPU, a C++ compiler such as g++ (CXX names another one); "
            "compile: false trains the same without"
        ) from error
    for parameter in model.parameters():
        parameter.grad = None


def _learn(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with causal(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if hidden.requires_grad:
        hidden.float().sum().backward()
