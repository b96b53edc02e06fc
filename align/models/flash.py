"""FlashAttention on a GPU, in 16 bits: sequences of any lengths end to end in one call, none of them filled up.

torch brings the kernels along. See `align.models.packed` for the layout, and `align.models.kernels` for tokens that are
being written.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import PreTrainedModel

from align.models.products import arithmetic

MOST_PER_HEAD = 256
"""Numbers of a head that the kernels take, in multiples of 8."""

_SHARED = {"enable_gqa": True} if "enable_gqa" in (varlen.varlen_attn.__kwdefaults__ or {}) else {}
"""How a version of torch that wants to be told is told that several heads of queries may share one of keys."""


def suits(device: torch.device, model: PreTrainedModel) -> bool:
    """Whether a model may be attended to this way on a device, in the arithmetic at hand."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = getattr(config, "v_head_dim", None) is None and _is_size(size)
    return plain and arithmetic(device, model.dtype).itemsize == 2 and _has_kernels(device)


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels, if there are any, take heads like these."""
    size = query.shape[-1]
    return size == value.shape[-1] and _is_size(size) and arithmetic(query.device, query.dtype).itemsize == 2


def _is_size(size: int) -> bool:
    return size <= MOST_PER_HEAD and not size % 8


def attend_end_to_end(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """Each token attends to those before it in its sequence, and to itself. Part of compiled blocks.

    Args:
        query: (heads, tokens, d); heads that share a key lie next to each other.
        key, value: (shared, tokens, d), of the same tokens.
        starts: Where sequences begin, and where the last ends; int32.
        longest: No sequence has more tokens.
        scaling: Of the products; None: 1 / √d.

    Returns:
        (tokens, heads, d), in 16 bits.
    """
    kind = arithmetic(query.device, query.dtype)
    own = [values.to(kind).transpose(0, 1) for values in (query, key, value)]
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0), **_SHARED}
    return varlen.varlen_attn(*own, starts, starts, longest, longest, **options)  # type: ignore[call-arg]
