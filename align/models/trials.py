"""What a model can do, tried out once a model: sequences end to end or behind one prompt, logits from hidden states.

A model that cannot, or is not sure to, gets its sequences as transformers expects them.
"""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models import compiled, flash, products, sharding, shared
from align.models.attention import causal, looks_all_the_way
from align.models.packed import Packed, grain, pack, padded
from align.models.packed import micro_batches as packed_batches
from align.models.shared import SharedPrompts
from align.types import sent

ROUNDING = 0.05
"""Of the largest hidden state: more than bfloat16 rounds, and far less than a wrong position or mask changes."""

CACHED_NUMBERS = 2**19
"""Numbers of hidden states that a CPU computes at once at most: a model of 256 hidden units was slower with four
times as many tokens (docs/performance.md), presumably since its caches no longer held what is made of them."""

CACHED_TOKENS = 2048
"""As many tokens may come at once in any case: wider models need them for large products."""

_packing: "weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype, bool]]" = weakref.WeakKeyDictionary()
"""By arithmetic, as attention is another in 16 bits."""

_sharing: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()

_plain_heads: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode inside the block, each submodule's own mode restored after it."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def packs(device: torch.device, *models: PreTrainedModel) -> bool:
    """Whether models compute the same where sequences lie end to end, and shall (`padded`): tried out once a model.

    Not where attention looks only so far back, or is not ours (`align.models.attention`).
    """
    return all(_known_to_pack(model, device) and model not in padded for model in models)


def _known_to_pack(model: PreTrainedModel, device: torch.device) -> bool:
    known, arithmetic = _packing.setdefault(model, {}), products.arithmetic(device, model.dtype)
    if arithmetic not in known:
        known[arithmetic] = looks_all_the_way(model) and _packs(model, device)
    return known[arithmetic]


def micro_batches(
    lengths: Int[Tensor, " batch"], budget: int, device: torch.device, *models: PreTrainedModel
) -> list[Int[Tensor, " picked"]]:
    """Which rows of a batch these models compute at once on a device; see `packed.micro_batches`.

    On a CPU, fewer sequences lie end to end than the budget may allow: see `CACHED_NUMBERS`.
    """
    together = packs(device, *models)
    if together and device.type == "cpu":
        widest = max(model.config.get_text_config().hidden_size for model in models)
        budget = min(budget, max(CACHED_TOKENS, CACHED_NUMBERS // widest))
    return packed_batches(lengths, budget, packs=together)


def laid_end_to_end(model: PreTrainedModel, device: torch.device, lengths: Int[Tensor, " batch"], time: int) -> Packed:
    """How a model that `packs` gets the first tokens of right-padded rows, in the arithmetic at hand."""
    return pack(lengths, time, grain(device), ragged=flash.suits(device, model))


def _packs(model: PreTrainedModel, device: torch.device) -> bool:
    ids = torch.tensor([[1, 2, 3, 0, 0], [1, 2, 0, 3, 1], [2, 3, 1, 0, 0]], device=device)
    lengths = torch.tensor([3, 5, 4])
    places = (torch.arange(5) < lengths[:, None]).flatten().nonzero()[:, 0]
    with torch.no_grad(), evaluating(model), sharding.gathered(model), compiled.off():
        apart = sharding.run(model, hidden, ids).flatten(0, 1)[places].float()
        laid_out = laid_end_to_end(model, device, lengths, ids.shape[1])
        try:
            together = sharding.run(model, _packed_hidden, ids, sent(laid_out, device))[laid_out.find(places)].float()
        except (TypeError, ValueError, RuntimeError):  # it takes no such arguments, or not in this form
            return False
    return bool((together - apart).abs().max() <= ROUNDING * apart.abs().max())


def shares_prompts(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a model computes the same where sequences share their prompt: tried out once a model.

    Not where attention looks only so far back, or is not ours (`align.models.attention`).
    """
    if model not in _sharing:
        _sharing[model] = looks_all_the_way(model) and _shares(model, device)
    return _sharing[model]


def _shares(model: PreTrainedModel, device: torch.device) -> bool:
    ids = torch.tensor([[1, 2, 3, 0, 0], [1, 2, 0, 3, 1], [2, 3, 1, 0, 0]])
    lengths = torch.tensor([3, 5, 4])
    laid_out = sent(shared.share(ids, lengths, torch.tensor([0, 0, 1]), apart=device.type == "cpu"), device)
    with torch.no_grad(), evaluating(model), sharding.gathered(model), compiled.off():
        apart = sharding.run(model, hidden, ids.to(device))[torch.arange(3), lengths - 1].float()
        try:
            together = sharding.run(model, shared_hidden, laid_out)[laid_out.last].float()
        except (TypeError, ValueError, RuntimeError):  # it takes no such arguments, or not in this form
            return False
    return bool((together - apart).abs().max() <= ROUNDING * apart.abs().max())


def has_plain_head(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the model's logits are its output embedding applied to its last hidden state and nothing more.

    Some families scale or cap the logits afterwards (Gemma 2, Cohere, Granite). One tiny pass tells, once a model;
    such models are asked for their logits whole, which costs memory and stays right.
    """
    if model not in _plain_heads:
        with torch.no_grad(), evaluating(model), sharding.gathered(model), compiled.off():
            _plain_heads[model] = sharding.run(model, _head_is_plain, torch.arange(2, device=device)[None])
    return _plain_heads[model]


def _head_is_plain(model: PreTrainedModel, ids: Int[Tensor, "batch time"]) -> bool:
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.equal(unembedding(model)(hidden), model.forward(input_ids=ids, use_cache=False).logits)


def hidden(model: PreTrainedModel, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time d"]:
    """The last hidden states of a right-padded batch."""
    with causal(model):
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def _packed_hidden(
    model: PreTrainedModel, ids: Int[Tensor, "batch time"], laid_out: Packed
) -> Float[Tensor, "tokens d"]:
    with causal(model):
        return model.base_model(**laid_out.arguments(ids), use_cache=False).last_hidden_state[0]


def shared_hidden(model: PreTrainedModel, laid_out: SharedPrompts) -> Float[Tensor, "tokens d"]:
    """The last hidden states of sequences that share their prompts."""
    # A mask of four axes is taken as it is by transformers, which would make one of all tokens by all tokens.
    none = torch.zeros((1, 1, 1, 1), device=laid_out.ids.device)
    out = model.base_model(
        input_ids=laid_out.ids, position_ids=laid_out.positions, attention_mask=none, use_cache=False, shared=laid_out
    )
    return out.last_hidden_state[0]


def unembedding(model: PreTrainedModel) -> nn.Module:
    """The output embedding of a language model."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module), f"{type(model).__name__} is no language model"
    return head
