"""The one address of shifts, positions and padding: log-probabilities, values and scores from token ids.

Sequences come right-padded, and a model computes them end to end, without padding and without what stands behind the
last token that counts (`align.models.packed`). Models that cannot, get them as they are: attention is causal, so
padding needs no mask and no position ids, and costs time, never correctness. The unembedding runs only where a token
is scored, and in chunks.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from align.formulas.losses import entropy
from align.models import hydra, sharding
from align.models.attention import causal
from align.models.heads import ScalarModel
from align.models.hydra import Below
from align.models.packed import Packed, grain
from align.models.shared import SharedPrompts
from align.models.trials import evaluating as evaluating
from align.models.trials import has_plain_head, hidden, laid_end_to_end, packs, shared_hidden, unembedding
from align.types import sent

LOGITS_PER_CHUNK = 2**25
"""At most this many logits exist at once (128 MiB in float32); more tokens are done in turns and recomputed."""

OfLogits = Callable[[Float[Tensor, "tokens vocab"], Int[Tensor, " tokens"]], Tensor]
"""(logits, what came next) -> something of each token."""


def token_logprobs(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    temperature: float = 1.0,
    below: Below | None = None,
) -> Float[Tensor, " tokens"]:
    """log π(token | what stands before it) of the tokens where `mask` is True, row after row, in float32.

    Args:
        model: The language model.
        ids: Right-padded.
        mask: True at tokens to score; never at position 0.
        temperature: The logits are divided by it, as when sampling.
        below: What the model's frozen blocks give for these ids, if that is known.
    """
    return _over_logits(model, ids, mask, temperature, _logprobs_of, below)


def token_logprobs_and_entropies(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    temperature: float = 1.0,
    below: Below | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """`token_logprobs`, with the entropy in nats of the distribution each token was drawn from."""
    both = _over_logits(model, ids, mask, temperature, _logprobs_and_entropies_of, below)
    return both[:, 0], both[:, 1]


def token_logprobs_and_values(
    model: PreTrainedModel,
    value: ScalarModel,
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    temperature: float = 1.0,
    below: Below | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """`token_logprobs` and `token_values` of a value head on the model itself, in one pass if the model allows it."""
    return _with_values(model, value, ids, mask, temperature, _logprobs_of, below)


def token_logprobs_entropies_and_values(
    model: PreTrainedModel,
    value: ScalarModel,
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    temperature: float = 1.0,
    below: Below | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """`token_logprobs_and_entropies`, and `token_values` as in `token_logprobs_and_values`."""
    both, values = _with_values(model, value, ids, mask, temperature, _logprobs_and_entropies_of, below)
    return both[:, 0], both[:, 1], values


def _with_values(
    model: PreTrainedModel,
    value: ScalarModel,
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    temperature: float,
    function: OfLogits,
    below: Below | None = None,
) -> tuple[Tensor, Float[Tensor, " tokens"]]:
    if not has_plain_head(model, ids.device):
        return _over_logits(model, ids, mask, temperature, function, below), token_values(value, ids, mask, below)

    laid_out = _layout_for(model, ids, mask)

    def both(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        inputs, targets = _before(model, ids, mask, laid_out, below)
        head, vocab = unembedding(model), _vocab(model)
        return _in_chunks(head, inputs, targets, function, temperature=temperature, vocab=vocab), _scalar(value, inputs)

    return sharding.run(model, both)


def token_logprobs_and_hits(
    model: PreTrainedModel, ids: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """`token_logprobs` at temperature 1, with 1 where the token is the likeliest one and 0 elsewhere."""
    both = _over_logits(model, ids, mask, 1.0, _logprobs_and_hits_of)
    return both[:, 0], both[:, 1]


def token_values(
    model: ScalarModel,
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    below: Below | None = None,
) -> Float[Tensor, " tokens"]:
    """V(s_t) of the tokens where `mask` is True: read at the token before, when token t was not yet chosen."""
    laid_out = _layout_for(model.hf, ids, mask)
    return sharding.run(model.hf, lambda hf: _scalar(model, _before(hf, ids, mask, laid_out, below)[0]))


def final_scores(
    model: ScalarModel, ids: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """The reward of each whole sequence, read at its last token (the EOS token of a finished response)."""
    ends = torch.arange(len(ids), device=lengths.device) * ids.shape[1] + lengths - 1
    packed = layout(model.hf, ids, lengths)
    return sharding.run(model.hf, lambda hf: _scalar(model, _at(ends, hf, ids, packed)))


def final_scores_sharing(model: ScalarModel, laid_out: SharedPrompts) -> Float[Tensor, " batch"]:
    """`final_scores` of sequences that share their prompts, for models that can: `shares_prompts`."""
    return sharding.run(model.hf, lambda hf: _scalar(model, shared_hidden(hf, laid_out)[laid_out.last]))


def every_logprob(model: PreTrainedModel, ids: Int[Tensor, "batch time"]) -> Float[Tensor, " tokens"]:
    """`token_logprobs` of all tokens but the first of each row, of a model whose logits are plain.

    Asks for no number in a tensor, so it runs on tensors without contents too (`align.traced`).
    """
    inputs = hidden(model, ids)[:, :-1].flatten(0, 1)
    head, targets = unembedding(model), ids[:, 1:].flatten()
    return _in_chunks(head, inputs, targets, _logprobs_of, temperature=1.0, vocab=_vocab(model))


def every_value(model: ScalarModel, ids: Int[Tensor, "batch time"]) -> Float[Tensor, " tokens"]:
    """`token_values` of all tokens but the first of each row; see `every_logprob`."""
    return _scalar(model, hidden(model.hf, ids)[:, :-1].flatten(0, 1))


def fitted(columns: Shaped[Tensor, "batch time"], lengths: Int[Tensor, " batch"]) -> Shaped[Tensor, "batch fitted"]:
    """Ids or a mask without the columns that are padding in every row."""
    return columns[:, : int(lengths.max())]


def in_order(values: Shaped[Tensor, "batch *_"], groups: Sequence[Int[Tensor, " _"]]) -> Shaped[Tensor, "batch *_"]:
    """What was found of one micro-batch after another, in the order of the batch."""
    return torch.empty_like(values).index_copy(0, torch.cat([*groups]), values)


def by_response(
    flat: Float[Tensor, " tokens"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """Token values, row after row, laid out by response; 0 where the mask is False. Gradients pass."""
    return flat.new_zeros(mask.numel()).index_copy(0, _places(mask, flat.device), flat).view(mask.shape)


def _places(mask: Bool[Tensor, "batch time"], device: torch.device) -> Int[Tensor, " tokens"]:
    """Where in the flattened batch the mask is True."""
    return sent(mask.flatten().nonzero()[:, 0], device)


def layout(model: PreTrainedModel, ids: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"]) -> Packed | None:
    """How the first tokens of each row lie end to end, so many of each; None: the model gets the rows as they are."""
    return laid_end_to_end(model, ids.device, lengths, ids.shape[1]) if packs(ids.device, model) else None


def _layout_for(
    model: PreTrainedModel, ids: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Packed | None:
    """See `layout`: of each row what stands before its last scored token."""
    return layout(model, ids, (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1))


def _before(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    packed: Packed | None,
    below: Below | None,
    *,
    logits: bool = False,
) -> tuple[Float[Tensor, "tokens _"], Int[Tensor, " tokens"]]:
    """The hidden states (or logits) from which the tokens are told where the mask is True, and these tokens."""
    places = mask.flatten().nonzero()[:, 0]
    return _at(places - 1, model, ids, packed, below, logits=logits), ids.flatten()[sent(places, ids.device)]


def _at(
    places: Int[Tensor, " places"],
    model: PreTrainedModel,
    ids: Int[Tensor, "batch time"],
    packed: Packed | None,
    below: Below | None = None,
    *,
    logits: bool = False,
) -> Float[Tensor, "places _"]:
    """The hidden states, or logits, at places of the flattened batch."""
    arguments = {"input_ids": ids}
    if packed is not None:
        places, packed = sent((packed.find(places), packed), ids.device)
        arguments, below = packed.arguments(ids), below and below.packed(packed)
    with hydra.above(model, below), causal(model):
        if logits:
            found = model.forward(**arguments, use_cache=False).logits
        else:
            found = model.base_model(**arguments, use_cache=False).last_hidden_state
    return found.flatten(0, 1)[sent(places, ids.device)]


def _exactly(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """No mixed precision inside the block."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def _scalar(model: ScalarModel, hidden: Float[Tensor, "places d"]) -> Float[Tensor, " places"]:
    head = model.head  # which may be in float32 on a trunk that is not, and stays so in mixed precision
    with _exactly(hidden.device):
        return head(hidden.to(head.weight.dtype))[:, 0].float() - model.bias


def _over_logits(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    temperature: float,
    function: OfLogits,
    below: Below | None = None,
) -> Tensor:
    """`function(logits, targets)` of the scored tokens, computing no other logits where the model allows it."""
    plain, packed = has_plain_head(model, ids.device), _layout_for(model, ids, mask)

    def of_logits(model: PreTrainedModel) -> Tensor:
        inputs, targets = _before(model, ids, mask, packed, below, logits=not plain)
        head = unembedding(model) if plain else nn.Identity()
        return _in_chunks(head, inputs, targets, function, temperature=temperature, vocab=_vocab(model))

    return sharding.run(model, of_logits)


def _in_chunks(
    head: nn.Module,
    inputs: Float[Tensor, "tokens _"],
    targets: Int[Tensor, " tokens"],
    function: OfLogits,
    *,
    temperature: float,
    vocab: int,
) -> Tensor:
    """`function(head(inputs) / temperature, targets)`, never of more than `LOGITS_PER_CHUNK` logits at once."""

    def chunk(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = head(inputs).float()
        return function(logits / temperature if temperature != 1.0 else logits, targets)

    size, count = max(1, LOGITS_PER_CHUNK // vocab), len(targets)
    if isinstance(head, nn.Linear) and (padding := -count % grain(inputs.device)):
        inputs, targets = nn.functional.pad(inputs, (0, 0, 0, padding)), nn.functional.pad(targets, (0, padding))
    if len(targets) <= size:
        return chunk(inputs, targets)[:count]
    parts = zip(inputs.split(size), targets.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk(*part) for part in parts])[:count]
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])[:count]  # type: ignore[arg-type]


def _logprobs_of(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return -nn.functional.cross_entropy(logits, targets, reduction="none")


def _logprobs_and_entropies_of(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens 2"]:
    return torch.stack([_logprobs_of(logits, targets), entropy(logits)], dim=-1)


def _logprobs_and_hits_of(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens 2"]:
    return torch.stack([_logprobs_of(logits, targets), (logits.argmax(-1) == targets).float()], dim=-1)


def _vocab(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size
