"""Writing token after token with `Slots`: prompts into the cache, then one token a row and call.

For every model whose attention is ours (`align.models.attention`) and looks back all the way; a trial pass tells.
"""

import contextlib
import warnings
import weakref
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models import products, sharding
from align.models.attention import causal, looks_all_the_way
from align.models.fixed import Begun, FixedSlots
from align.models.groups import GroupedSlots
from align.models.packed import micro_batches
from align.models.slots import Filling, Slots
from align.models.trials import ROUNDING, evaluating, laid_end_to_end, packs
from align.types import sent

PROMPT_TOKENS = 8192
"""Prompt tokens computed at once."""

_able: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[type, torch.dtype], bool]]" = weakref.WeakKeyDictionary()

_token_bytes: "weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype, int]]" = weakref.WeakKeyDictionary()


def fill(
    model: PreTrainedModel,
    ids: Int[Tensor, "prompts time"],
    lengths: Int[Tensor, " prompts"],
    slots: Slots | FixedSlots,
    rows: Int[Tensor, " prompts"],
) -> None:
    """Computes prompts and puts their keys and values into rows of the cache; equal prompts are computed once.

    Args:
        model: The language model.
        ids: Right-padded.
        lengths: How many tokens of each to compute; may be 0.
        slots: The cache, which has these rows.
        rows: Of each prompt.
    """
    if isinstance(slots, FixedSlots):
        _fill_fixed(model, ids, lengths, slots, rows)
        return
    if isinstance(slots, GroupedSlots):
        _fill_groups(model, ids, lengths, slots)
        return
    different, which = without_padding(ids, lengths).unique(dim=0, return_inverse=True)
    sizes = (different >= 0).sum(1)
    some = (sizes > 0).nonzero()[:, 0]
    for picked in micro_batches(sizes[some], PROMPT_TOKENS) if len(some) else []:
        prompts = some[picked.to(some.device)]
        place = torch.full_like(sizes, -1).index_copy(0, prompts, torch.arange(len(prompts), device=ids.device))[which]
        own = place >= 0
        slots.filling = Filling(rows[own], place[own])
        part = different[prompts, : int(sizes[prompts].max())].clamp_min(0)
        sharding.run(model, _fill, part, slots)
    slots.filling = None


def _fill_fixed(
    model: PreTrainedModel,
    ids: Int[Tensor, "prompts time"],
    lengths: Int[Tensor, " prompts"],
    slots: FixedSlots,
    rows: Int[Tensor, " prompts"],
) -> None:
    """Prompts end to end. Where tokens come from and go to is found out in host memory; a GPU is waited for once."""
    ids_and_rows = torch.cat([without_padding(ids, lengths), rows[:, None]], dim=1).cpu()
    different, which = ids_and_rows[:, :-1].unique(dim=0, return_inverse=True)
    sizes, rows = (different >= 0).sum(1), ids_and_rows[:, -1]
    some = (sizes > 0).nonzero()[:, 0]
    for picked in micro_batches(sizes[some], PROMPT_TOKENS, packs=True) if len(some) else []:
        prompts = some[picked]
        place = torch.full_like(sizes, -1).index_copy(0, prompts, torch.arange(len(prompts)))[which]
        own = (place >= 0).nonzero()[:, 0]
        time = int(sizes[prompts].max())
        laid_out = laid_end_to_end(model, ids.device, sizes[prompts], time)
        counts = sizes[prompts][place[own]]
        positions = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        source = laid_out.find((place[own] * time).repeat_interleave(counts) + positions)
        begun = Begun(rows[own].repeat_interleave(counts), positions, source)
        tokens, laid_out, slots.filling = sent((different[prompts, :time].clamp_min(0), laid_out, begun), ids.device)
        with causal(model):
            model.base_model(**laid_out.arguments(tokens), use_cache=False, slots=slots)
    slots.filling = None


def _fill_groups(
    model: PreTrainedModel, ids: Int[Tensor, "rows time"], lengths: Int[Tensor, " rows"], slots: GroupedSlots
) -> None:
    """Computes the prompts of the last rows and keeps each once: longest first, and equal ones side by side."""
    different, of = without_padding(ids, lengths).unique_consecutive(dim=0, return_inverse=True)
    sizes = (different >= 0).sum(1)
    longest, start = sizes.tolist(), 0
    while start < len(longest):
        end = start + max(1, PROMPT_TOKENS // max(1, longest[start]))
        begun = slots.begin_with(sizes[start:end], of[(of >= start) & (of < end)] - start)
        sharding.run(model, _fill, different[start:end, : begun.width].clamp_min(0), slots)
        start = end
    slots.filling = None


def without_padding(ids: Int[Tensor, "rows time"], lengths: Int[Tensor, " rows"]) -> Int[Tensor, "rows time"]:
    """The ids with -1 behind each row's end, so that rows are equal if and only if their tokens are."""
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return torch.where(inside, ids, -1)


def next_logits(
    model: PreTrainedModel, tokens: Int[Tensor, " rows"], slots: Slots | FixedSlots
) -> Float[Tensor, "rows vocab"]:
    """Puts one more token into each row; the logits of what follows it."""
    slots.begin()
    # A mask of four axes is taken as it is by transformers, which would make one of its own.
    none = torch.zeros((1, 1, 1, 1), device=tokens.device)
    out = model(
        input_ids=tokens[:, None],
        position_ids=slots.positions[:, None],
        attention_mask=none,
        use_cache=False,
        logits_to_keep=1,
        slots=slots,
    )
    slots.end()
    return out.logits[:, -1]


def _fill(model: PreTrainedModel, ids: Int[Tensor, "prompts time"], slots: Slots) -> None:
    model.base_model(input_ids=ids, use_cache=False, slots=slots)


def able(model: PreTrainedModel, device: torch.device, kind: type[Slots] | type[FixedSlots] = Slots) -> bool:
    """Whether a model's logits are right this way: tried out once a model, kind of cache, and arithmetic.

    On a GPU `FixedSlots` must also do without copies and without waiting, as a step that is recorded has to.
    """
    known, which = _able.setdefault(model, {}), (kind, products.arithmetic(device, model.dtype))
    if which not in known:
        fits = looks_all_the_way(model) and (kind is not FixedSlots or packs(device, model))
        known[which] = fits and _try(model, device, kind)
    return known[which]


def bytes_a_token(model: PreTrainedModel, device: torch.device) -> int:
    """What the keys and values of a token take, of a model that is `able` of `FixedSlots` in the arithmetic at hand."""
    return _token_bytes[model][products.arithmetic(device, model.dtype)]


def _try(model: PreTrainedModel, device: torch.device, kind: type[Slots] | type[FixedSlots]) -> bool:
    """Two prompts of different lengths and two tokens more of each, against one pass over all of it."""
    ids = torch.tensor([[1, 2, 3, 2, 1], [2, 3, 1, 3, 1]], device=device)
    lengths, rows = torch.tensor([3, 2], device=device), torch.arange(2, device=device)
    got, tokens = [], [ids[rows, lengths + step] for step in range(2)]
    with torch.no_grad(), evaluating(model), sharding.gathered(model):
        expected = model(input_ids=ids, use_cache=False).logits
        slots = _laid_out(kind, lengths)
        try:
            fill(model, ids, lengths, slots, rows)
            with _never_waiting(device) if kind is FixedSlots else contextlib.nullcontext():
                for token in tokens:
                    got.append(next_logits(model, token, slots))
        except (TypeError, ValueError, RuntimeError):  # it takes no such arguments, or not in this form
            return False
    wanted = torch.stack([expected[rows, lengths + step] for step in range(2)])
    if isinstance(slots, FixedSlots):
        _token_bytes.setdefault(model, {})[products.arithmetic(device, model.dtype)] = slots.bytes_a_token
        if slots.copied and device.type == "cuda":
            return False
    return bool((torch.stack(got) - wanted).abs().max() <= ROUNDING * wanted.abs().max())


@contextlib.contextmanager
def _never_waiting(device: torch.device) -> Iterator[None]:
    """RuntimeError from what would wait for a GPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not notice everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _laid_out(kind: type[Slots] | type[FixedSlots], lengths: Int[Tensor, " rows"]) -> Slots | FixedSlots:
    """For prompts of a trial."""
    if issubclass(kind, FixedSlots):
        fixed = kind(torch.full((len(lengths),), 5), lengths.device)
        fixed.lengths.copy_(lengths)
        fixed.growing.fill_(1)
        return fixed
    slots = kind(lengths.device, most=5)
    slots.lay_out(torch.full_like(lengths, -1), lengths)
    return slots
