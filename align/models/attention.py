"""transformers' `sdpa` attention with additions: for CPUs, for shared prompts, and for writing.

Sequences come end to end (`align.models.packed`), or with one prompt for several answers (`align.models.shared`): all
that is computed token by token sees next to no padding, and only here they are laid out. Sequences that are being
written keep keys and values in `Slots`.

On CPUs that suit it short sequences do without `scaled_dot_product_attention` (`align.models.dense`). Under bfloat16
autocast its backward pass takes up to six times as long on a CPU as in float32 (PyTorch 2.13, AMX; 64 sequences of 32
tokens), so where it is used it computes in float32.
"""

import contextlib
import functools
import itertools
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.models import flash
from align.models.dense import LONGEST, Run, attend_densely, lay_out, suits_cpu
from align.models.fixed import FixedSlots
from align.models.groups import GroupedSlots, attend_in_groups
from align.models.packed import Packed
from align.models.products import arithmetic
from align.models.shared import Band, Part, SharedPrompts
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
    slots: Slots | FixedSlots | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, in float32 under CPU autocast, but for tokens being written and for `align.models.dense`.

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
        _fill(module, key, value, slots)
    if packed is not None:
        if packed.starts is not None and flash.takes(query, value) and _is_plain(module, arguments):
            starts, scaling = packed.starts, arguments.get("scaling")
            found = flash.attend_end_to_end(query[0], key[0], value[0], starts, packed.longest, scaling)
            return found[None], None
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
    bands = packed.bands or [(1, width) for width in packed.starts.diff().tolist()]  # type: ignore[union-attr]
    densely = _densely(module, query, arguments)
    far = list(itertools.takewhile(lambda band: band[1] > densely, bands))  # the longest come first, padding last
    near = _runs(bands[len(far) :])
    sizes = [sequences * width for sequences, width in far]
    pieces = zip(
        *(part.split([*sizes, part.shape[1] - sum(sizes)], dim=1) for part in (query, key, value)), strict=True
    )
    found = []
    for band, own in zip(far, pieces, strict=False):
        apart = (values.unflatten(1, band).transpose(0, 1) for values in own)
        found.append(_attend_causally(module, *apart, **arguments).flatten(0, 1))
    if near:
        query, key, value = next(pieces)
        found.append(attend_densely(query, key, value, lay_out(near, query.shape[1]), arguments.get("scaling")))
    return torch.cat(found)[None]


def _densely(module: nn.Module, query: Tensor, arguments: dict[str, Any]) -> int:
    """Sequences of up to so many tokens attend by `align.models.dense`."""
    suits = query.device.type == "cpu" and suits_cpu() and _is_plain(module, arguments)
    return LONGEST.get(arithmetic(query.device, query.dtype), 0) if suits else 0


def _runs(bands: Sequence[tuple[int, int]]) -> tuple[Run, ...]:
    starts = itertools.accumulate((sequences * width for sequences, width in bands), initial=0)
    return tuple(Run(sequences, width, start) for (sequences, width), start in zip(bands, starts, strict=False))


def _attend_causally(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """Each token to those before it and itself, where queries are those of the last tokens."""
    mask = None
    if key.shape[2] > query.shape[2]:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        mask = mask.tril(key.shape[2] - query.shape[2])[None, None]
    return attend(module, query, key, value, attention_mask=mask, **arguments)[0]


def _is_plain(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether nothing is asked of attention but that it be causal and scaled."""
    is_causal = arguments.get("is_causal")
    return (
        bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and not arguments.get("dropout")
        and all(arguments.get(name) is None for name in ("position_bias", "softcap", "cache"))
    )


@torch.compiler.disable(reason="it would be compiled anew for each number of prompts")
def _attend_to_shared(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, shared: SharedPrompts, **arguments: Any
) -> Tensor:
    """What sequences begin with attends to itself, what each has of its own to both: cheaper than all to all."""
    densely = _densely(module, query, arguments)
    ways = [(near, list(parts)) for near, parts in itertools.groupby(shared.parts, lambda part: part.fits(densely))]
    sizes: list[int] = []
    for near, parts in ways:
        of_each = [size for part in parts for size in part.sizes]
        sizes += [sum(of_each)] if near else of_each
    sizes.append(padding := query.shape[1] - sum(sizes))
    pieces = zip(*(values.split(sizes, dim=1) for values in (query, key, value)), strict=True)
    found = []
    for near, parts in ways:
        if near:
            query, key, value = next(pieces)
            layout = lay_out(_runs_of_parts(parts), query.shape[1])
            found.append(attend_densely(query, key, value, layout, arguments.get("scaling")))
            continue
        for part in parts:
            begun = [values.unflatten(1, (part.prompts, part.common)).transpose(0, 1) for values in next(pieces)]
            if part.common:
                found.append(_attend_causally(module, *begun, **arguments).flatten(0, 1))
            for band in part.bands:
                apart = (band.sequences, band.width)
                asked, *own = (values.unflatten(1, apart).transpose(0, 1) for values in next(pieces))
                seen = [torch.cat([_of_each(band, *both), both[1]], dim=2) for both in zip(begun[1:], own, strict=True)]
                if band.mask is None:
                    found.append(_attend_causally(module, asked, *seen, **arguments).flatten(0, 1))
                else:
                    found.append(attend(module, asked, *seen, attention_mask=band.mask, **arguments)[0].flatten(0, 1))
    if padding:
        found.append(found[0].new_zeros(padding, *found[0].shape[1:]))
    return torch.cat(found)[None]


def _runs_of_parts(parts: Sequence[Part]) -> tuple[Run, ...]:
    """Of parts of one prompt each."""
    runs, start = [], 0
    for part in parts:
        begun = start
        if part.common:
            runs.append(Run(1, part.common, begun))
        start += part.common
        for band in part.bands:
            runs.append(Run(band.sequences, band.width, start, part.common, begun))
            start += band.sequences * band.width
    return tuple(runs)


def _of_each(band: Band, begun: Tensor, own: Tensor) -> Tensor:
    """What is known of the tokens that a band's sequences begin with, for each of them."""
    if band.prompt is None:
        return begun.expand(len(own), -1, -1, -1)
    return begun[band.prompt]  # the gradient of `index_select` a GPU would sum in any order


@torch.compiler.disable(reason="it would be compiled anew for each layer")
def _fill(module: nn.Module, key: Tensor, value: Tensor, slots: Slots | FixedSlots) -> None:
    slots.fill(module.layer_idx, key, value)  # type: ignore[arg-type]


@torch.compiler.disable(reason="it would be compiled anew for each layer")
def _attend_to_slots(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, slots: Slots | FixedSlots, **arguments: Any
) -> Tensor:
    if arguments.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a bias for positions, which rows of different lengths lack")
    if isinstance(slots, FixedSlots):
        return _attend_to_fixed(module, query, key, value, slots, **arguments)
    if isinstance(slots, GroupedSlots):
        return attend_in_groups(query, key, value, module.layer_idx, slots, arguments.get("scaling"))  # type: ignore[arg-type]
    found = []
    with torch.autocast(query.device.type, enabled=False):  # in what they are kept in: there are no gradients
        for rows, keys, values, mask in slots.put(module.layer_idx, key, value):  # type: ignore[arg-type]
            asked = query[rows].to(keys.dtype)
            found.append(sdpa_attention_forward(module, asked, keys, values, mask, **arguments)[0])
    return torch.cat(found).to(value.dtype)


def _attend_to_fixed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, slots: FixedSlots, **arguments: Any
) -> Tensor:
    """By `align.models.kernels` where that can be, else to a copy of all that a row has room for, most of it masked."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    with torch.autocast(query.device.type, enabled=False):  # in what they are kept in: there are no gradients
        keys, values = slots.of(layer, key, value)
        if _is_plain(module, arguments) and reads_kept(query, keys, values):
            from align.models import kernels

            next_query, next_key, next_value = (part[:, :, 0] for part in (query, key, value))
            places = slots.starts, slots.lengths, slots.growing
            scaling = arguments.get("scaling") or query.shape[-1] ** -0.5
            found = kernels.attend_to_kept(next_query, next_key, next_value, keys, values, *places, scaling)[:, None]
        else:
            keys, values = slots.put(layer, key, value)
            found = sdpa_attention_forward(module, query.to(keys.dtype), keys, values, slots.mask, **arguments)[0]
    return found.to(value.dtype)


def reads_kept(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether our kernel works for heads like these: tried out once for each kind of them.

    Args:
        query: Of one token a row: (rows, heads, 1, d).
        keys, values: What is kept: (tokens, heads, d).
    """
    if query.device.type != "cuda" or keys.dtype.itemsize != 2 or keys.shape[1:] != values.shape[1:]:
        return False
    return _kernel_works(query.shape[1] // keys.shape[1], keys.shape[2], keys.dtype, query.device)


@functools.cache
def _kernel_works(group: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Needs Triton, which comes with torch for GPUs, a C compiler that it finds, and a GPU with room for its blocks."""
    try:
        from triton.errors import TritonError  # pyright: ignore[reportMissingImports]

        from align.models import kernels
    except ImportError:
        return False
    waiting = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")  # in a trial of a model's step it may be an error to wait
    try:
        return kernels.works(group, size, dtype, device)
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError):
        return False
    finally:
        torch.cuda.set_sync_debug_mode(waiting)


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
