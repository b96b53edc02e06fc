"""transformers' `sdpa` attention with additions: for CPUs in mixed precision, for shared prompts, and for writing.

Under bfloat16 autocast the backward pass of `scaled_dot_product_attention` takes up to six times as long on a CPU as
in float32 (PyTorch 2.13, AMX; 64 sequences of 32 tokens). With attention alone in float32, a model of 256 hidden units
learns 1.6 times as fast as in float32 throughout.

Sequences come end to end (`align.models.packed`), or with one prompt for several answers (`align.models.shared`): all
that is computed token by token sees next to no padding, and only here they are laid out. Sequences that are being
written keep keys and values in `Slots`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.models.groups import GroupedSlots, attend_in_groups
from align.models.packed import Packed
from align.models.shared import SharedPrompts
from align.models.slots import Slots

NAME = "align_sdpa"

CAUSAL = "align_causal"
"""The same under a name of which transformers knows no mask, and so makes none: attention is causal then."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Packed | None = None,
    shared: SharedPrompts | None = None,
    slots: Slots | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, in float32 under CPU autocast but for single tokens being written.

    The form is that of its `AttentionInterface`.

    Args:
        module, query, key, value, attention_mask, arguments: See there.
        packed: How sequences lie end to end.
        shared: How those that share their prompts do.
        slots: Where the keys and values of sequences being written are; these are prompts, or one token of each row.
    """
    if slots is not None:
        if slots.filling is None:
            return _attend_to_slots(module, query, key, value, slots, **arguments), None
        slots.fill(module.layer_idx, key, value)  # type: ignore[arg-type]
    if packed is not None:
        return _attend_in_bands(module, query[0], key[0], value[0], packed, **arguments), None
    if shared is not None:
        return _attend_to_shared(module, query[0], key[0], value[0], shared, **arguments), None
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **arguments)


@torch.compiler.disable(reason="it would be compiled anew for each number of bands")
def _attend_in_bands(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, **arguments: Any
) -> Tensor:
    """Each sequence attends to itself. Split and joined as a whole, so that no gradient is copied band by band."""
    sizes = [sequences * width for sequences, width in packed.bands]
    found = []
    for band, *own in zip(packed.bands, *(values.split(sizes, dim=1) for values in (query, key, value)), strict=True):
        apart = (values.unflatten(1, band).transpose(0, 1) for values in own)
        found.append(attend(module, *apart, attention_mask=None, **arguments)[0].flatten(0, 1))
    return torch.cat(found)[None]


@torch.compiler.disable(reason="it would be compiled anew for each number of prompts")
def _attend_to_shared(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, shared: SharedPrompts, **arguments: Any
) -> Tensor:
    """What sequences begin with attends to itself, what each has of its own to both: cheaper than all to all.

    Split as a whole, so that no part's gradient is as large as all.
    """

    def at(values: Tensor, places: Tensor) -> Tensor:
        return _picked(values, places).transpose(1, 2)

    sizes = [part.tokens for part in shared.parts]
    sizes.append(query.shape[1] - sum(sizes))  # padding
    found = []
    parts = zip(*(values.transpose(0, 1).split(sizes) for values in (query, key, value)), strict=True)
    for part, (queries, keys, values) in zip(shared.parts, parts, strict=False):
        if part.beginnings.numel():
            own = (at(states, part.beginnings) for states in (queries, keys, values))
            found.append(attend(module, *own, attention_mask=None, **arguments)[0])
        seen = (at(states, part.seen) for states in (keys, values))
        found.append(attend(module, at(queries, part.own), *seen, attention_mask=part.mask, **arguments)[0])
    return _picked(torch.cat([out.flatten(0, 1) for out in found]), shared.back)[None]


def _picked(values: Tensor, places: Tensor) -> Tensor:
    """`values[places]`, whose gradient a CPU sums by one thread; that of `index_select` a GPU sums in any order."""
    if values.device.type != "cpu":
        return values[places]
    return values.index_select(0, places.flatten()).unflatten(0, places.shape)


def _attend_to_slots(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, slots: Slots, **arguments: Any
) -> Tensor:
    if arguments.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a bias for positions, which rows of different lengths lack")
    if isinstance(slots, GroupedSlots):
        return attend_in_groups(query, key, value, module.layer_idx, slots, arguments.get("scaling"))  # type: ignore[arg-type]
    found = []
    with torch.autocast(query.device.type, enabled=False):  # in what they are kept in: there are no gradients
        for rows, keys, values, mask in slots.put(module.layer_idx, key, value):  # type: ignore[arg-type]
            asked = query[rows].to(keys.dtype)
            found.append(sdpa_attention_forward(module, asked, keys, values, mask, **arguments)[0])
    return torch.cat(found).to(value.dtype)


def looks_all_the_way(model: PreTrainedModel) -> bool:
    """Whether attention is ours in every layer, and from no layer looks only so far back."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    far = kinds <= {"full_attention"} and (kinds or not getattr(config, "sliding_window", None))
    return bool(far) and model.config._attn_implementation == NAME


@contextlib.contextmanager
def causal(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block right-padded sequences pass without transformers' search for masks, which waits for a GPU.

    Changes nothing where attention is not ours or looks only so far back.
    """
    if not looks_all_the_way(model):
        yield
        return
    model.config._attn_implementation = CAUSAL
    try:
        yield
    finally:
        model.config._attn_implementation = NAME


def use_attend(model: PreTrainedModel) -> None:
    """Lets a model that would use `sdpa` use `attend`; others keep what they have."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionInterface.register(CAUSAL, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
