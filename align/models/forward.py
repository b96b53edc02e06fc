"""The one address of shifts, positions and padding: log-probabilities, values and scores from token ids.

Sequences are right-padded and attention is causal, so padding needs no mask and no position ids: a token's hidden
state does not depend on what stands to its right. Padded tokens cost time, never correctness; `micro_batches` groups
sequences of like length so that few are computed. The unembedding runs only where a token is scored, and in chunks.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from align.formulas.losses import entropy
from align.models import compiled, hydra, sharding, shared
from align.models.attention import causal, looks_all_the_way
from align.models.heads import ScalarModel
from align.models.hydra import Below
from align.models.shared import SharedPrompts
from align.types import sent

LOGITS_PER_CHUNK = 2**25
"""At most this many logits exist at once (128 MiB in float32); more tokens are done in turns and recomputed."""

CALL_TOKENS = 128
"""What a pass costs before its first token, in tokens: about 8 ms of Python for a model of four layers on two cores.

Larger models compute fewer tokens in that time; for them it only matters that the number is small.
"""

ROUNDING = 0.05
"""Of the largest hidden state: more than bfloat16 rounds, and far less than a wrong position or mask changes."""

OfLogits = Callable[[Float[Tensor, "tokens vocab"], Int[Tensor, " tokens"]], Tensor]
"""(logits, what came next) -> something of each token."""

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


def micro_batches(lengths: Int[Tensor, " batch"], budget: int) -> list[Int[Tensor, " picked"]]:
    """Splits a batch into micro-batches of like lengths, none larger than `budget` tokens with its padding.

    Of all such splits it is the one that computes least, where each micro-batch costs `CALL_TOKENS` beside its tokens.
    A sequence longer than the budget is a micro-batch of its own. The split depends on the lengths alone, so the
    rollout's scoring pass and the update see equal shapes.

    Args:
        lengths: Tokens of each sequence.
        budget: Tokens a micro-batch may hold, padding included.

    Returns:
        Row indices; every row once, longest sequences first (so that memory runs out at once or never).
    """
    order = torch.argsort(lengths.cpu(), descending=True, stable=True)
    sizes = lengths.cpu()[order].tolist()
    # cheapest[end]: the least cost of the first `end` rows, and where the last of their groups starts.
    cheapest: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(sizes) + 1):
        best = (cheapest[end - 1][0] + sizes[end - 1] + CALL_TOKENS, end - 1)
        for start in range(end - 2, -1, -1):
            computed = (end - start) * sizes[start]
            if computed > budget:
                break
            best = min(best, (cheapest[start][0] + computed + CALL_TOKENS, start))
        cheapest.append(best)
    groups, end = [], len(sizes)
    while end > 0:
        start = cheapest[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


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
    if not _has_plain_head(model, ids.device):
        return _over_logits(model, ids, mask, temperature, function, below), token_values(value, ids, mask, below)

    def both(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        places = _places(mask, ids.device)
        inputs, targets = _before(_hidden(model, ids, below), places), ids.flatten()[places]
        head, vocab = _unembedding(model), _vocab(model)
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
    places = _places(mask, ids.device)
    return sharding.run(model.hf, lambda hf: _scalar(model, _before(_hidden(hf, ids, below), places)))


def final_scores(
    model: ScalarModel, ids: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """The reward of each whole sequence, read at its last token (the EOS token of a finished response)."""
    ends = torch.arange(len(ids), device=lengths.device) * ids.shape[1] + lengths
    places = sent(ends, ids.device)
    return sharding.run(model.hf, lambda hf: _scalar(model, _before(_hidden(hf, ids), places)))


def final_scores_sharing(model: ScalarModel, laid_out: SharedPrompts) -> Float[Tensor, " batch"]:
    """`final_scores` of sequences that share their prompts, for models that can: `shares_prompts`."""
    return sharding.run(model.hf, lambda hf: _scalar(model, _shared_hidden(hf, laid_out)[laid_out.last]))


def every_logprob(model: PreTrainedModel, ids: Int[Tensor, "batch time"]) -> Float[Tensor, " tokens"]:
    """`token_logprobs` of all tokens but the first of each row, of a model whose logits are plain.

    Asks for no number in a tensor, so it runs on tensors without contents too (`align.traced`).
    """
    inputs = _hidden(model, ids)[:, :-1].flatten(0, 1)
    head, targets = _unembedding(model), ids[:, 1:].flatten()
    return _in_chunks(head, inputs, targets, _logprobs_of, temperature=1.0, vocab=_vocab(model))


def every_value(model: ScalarModel, ids: Int[Tensor, "batch time"]) -> Float[Tensor, " tokens"]:
    """`token_values` of all tokens but the first of each row; see `every_logprob`."""
    return _scalar(model, _hidden(model.hf, ids)[:, :-1].flatten(0, 1))


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


def _before(hidden: Float[Tensor, "batch time d"], places: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d"]:
    """The states from which the tokens at these places are told."""
    return hidden.flatten(0, 1)[places - 1]


def _hidden(
    model: PreTrainedModel, ids: Int[Tensor, "batch time"], below: Below | None = None
) -> Float[Tensor, "batch time d"]:
    with hydra.above(model, below), causal(model):
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def _shared_hidden(model: PreTrainedModel, laid_out: SharedPrompts) -> Float[Tensor, "tokens d"]:
    # A mask of four axes is taken as it is by transformers, which would make one of all tokens by all tokens.
    none = torch.zeros((1, 1, 1, 1), device=laid_out.ids.device)
    out = model.base_model(
        input_ids=laid_out.ids, position_ids=laid_out.positions, attention_mask=none, use_cache=False, shared=laid_out
    )
    return out.last_hidden_state[0]


def shares_prompts(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a model computes the same where sequences share their prompt: tried out once a model.

    Not where attention looks only so far back, or is not ours (`align.models.attention`).
    """
    if model not in _sharing:
        _sharing[model] = looks_all_the_way(model) and _shares(model, device)
    return _sharing[model]


def _shares(model: PreTrainedModel, device: torch.device) -> bool:
    ids = torch.tensor([[1, 2, 3, 0, 0], [1, 2, 0, 3, 1], [2, 3, 1, 0, 0]], device=device)
    lengths, prompts = torch.tensor([3, 5, 4], device=device), torch.tensor([0, 0, 1], device=device)
    laid_out = shared.share(ids, lengths, prompts, apart=True)
    with torch.no_grad(), evaluating(model), sharding.gathered(model), compiled.off():
        apart = sharding.run(model, _hidden, ids)[torch.arange(3, device=device), lengths - 1].float()
        try:
            together = sharding.run(model, _shared_hidden, laid_out)[laid_out.last].float()
        except (TypeError, ValueError, RuntimeError):  # it takes no such arguments, or not in this form
            return False
    return bool((together - apart).abs().max() <= ROUNDING * apart.abs().max())


def _scalar(model: ScalarModel, hidden: Float[Tensor, "places d"]) -> Float[Tensor, " places"]:
    head = model.head  # which may be in float32 on a trunk that is not
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
    plain = _has_plain_head(model, ids.device)
    return sharding.run(model, _function_of_logits, ids, mask, temperature, function, plain, below)


def _function_of_logits(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    temperature: float,
    function: OfLogits,
    plain: bool,
    below: Below | None,
) -> Tensor:
    places = _places(mask, ids.device)
    targets = ids.flatten()[places]
    if plain:
        head, inputs = _unembedding(model), _before(_hidden(model, ids, below), places)
    else:
        with hydra.above(model, below), causal(model):
            head, inputs = nn.Identity(), _before(model.forward(input_ids=ids, use_cache=False).logits, places)
    return _in_chunks(head, inputs, targets, function, temperature=temperature, vocab=_vocab(model))


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

    size = max(1, LOGITS_PER_CHUNK // vocab)
    if len(targets) <= size:
        return chunk(inputs, targets)
    if not torch.is_grad_enabled():
        return torch.cat([chunk(*part) for part in zip(inputs.split(size), targets.split(size), strict=True)])
    parts = zip(inputs.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])  # type: ignore[arg-type]


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


def _has_plain_head(model: PreTrainedModel, device: torch.device) -> bool:
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
    return torch.equal(_unembedding(model)(hidden), model.forward(input_ids=ids, use_cache=False).logits)


def _vocab(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _unembedding(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module), f"{type(model).__name__} is no language model"
    return head
