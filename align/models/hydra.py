"""Frozen lower blocks that networks have in common, kept and computed once (the "hydra" models of trlx).

A policy of which only the last blocks learn (`freeze`) has the same lower blocks as its reference, and as a value
network and a reward model that were trained like that from the same weights. Their hidden states there are then the
same too: `below` computes them, and `above` lets each network go on from them. Adapters of the last blocks alone leave
the lower ones to all that use the policy's weights: with none the reference, with others the value network.

Both work on any model that has its blocks in a list: for the length of a pass, something stands in place of the blocks
that are not to be computed.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models import compiled, sharding
from align.models.attention import causal
from align.models.packed import Packed
from align.types import sent

ROUNDING = 1e-3
"""Of the largest hidden state: more than two passes with the same weights may differ."""

OF_LONG_SEQUENCES = ("rope", "window", "layer_types", "position", "chunk")
"""Parts of names in a model's configuration: what differs there may not show in a few tokens."""


@dataclass(frozen=True)
class Below:
    """Hidden states of a batch where the frozen blocks end.

    Attributes:
        hidden: The states, without gradient.
        depth: How many blocks have been computed.
    """

    hidden: Float[Tensor, "batch time d"]
    depth: int

    def rows_at(self, index: Int[Tensor, " picked"], width: int) -> "Below":
        """Those of the picked rows, as far as their first `width` tokens."""
        return replace(self, hidden=self.hidden[sent(index, self.hidden.device), :width])

    def packed(self, laid_out: Packed) -> "Below":
        """Those of sequences end to end."""
        return replace(self, hidden=laid_out.filled_up(self.hidden.flatten(0, 1)[laid_out.places]))


@dataclass(frozen=True)
class Hydra:
    """A policy, and the networks that go on from its frozen blocks.

    Attributes:
        policy: Owns the weights they share.
        depth: How many blocks that are; 0: nothing is shared.
        heads: The networks by name; one that uses the policy's weights throughout is the policy.
    """

    policy: PreTrainedModel
    depth: int = 0
    heads: Mapping[str, PreTrainedModel] = field(default_factory=dict)

    def below(self, ids: Int[Tensor, "batch time"], laid_out: Packed | None = None) -> Below | None:
        """Where the policy and the other networks can go on from; None: nothing is shared. Arguments as of `below`."""
        return below(self.policy, ids, self.depth, laid_out) if self.depth else None

    def given(self, network: PreTrainedModel, states: Below | None) -> Below | None:
        """The states, if the network goes on from them."""
        return states if network is self.policy or any(network is head for head in self.heads.values()) else None

    def described(self) -> str:
        """Who shares how much."""
        if not self.depth:
            return "the policy's frozen blocks are no other network's"
        return f"{self.depth} frozen blocks are one for policy, {', '.join(self.heads)}"


def grow(policy: PreTrainedModel, networks: Mapping[str, PreTrainedModel | None]) -> Hydra:
    """Lets all networks that can use the policy's frozen lower weights do so; see `join`. None is the policy itself."""
    models = {name: policy if model is None else model for name, model in networks.items()}
    joined = {model for model in {*models.values()} if join(policy, model)}
    heads = {name: model for name, model in models.items() if model in joined}
    return Hydra(policy, depth(policy) if heads else 0, heads)


class StandIn(nn.Module):
    """In place of blocks: gives the same hidden states whatever comes in; if it has none yet, the first that do."""

    def __init__(self, hidden: Float[Tensor, "batch time d"] | None) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *arguments: object, **named: object) -> Tensor:
        """Takes what a block takes."""
        if self.hidden is None:
            self.hidden = hidden_states
        return self.hidden


def freeze(model: PreTrainedModel, trained_blocks: int) -> None:
    """Freezes the embeddings, and all blocks but the last ones.

    What stands behind the blocks still learns: the last norm, a head, and an output embedding unless it is tied to the
    input's.

    Raises:
        ValueError: The model has fewer blocks.
    """
    blocks, learning = sharding.blocks(model), last_blocks(model, trained_blocks)
    last = {id(block) for number, block in sharding.numbered_blocks(model).items() if number in learning}
    for block in blocks:
        if id(block) not in last:
            block.requires_grad_(False)
    for parameter in _embeddings(model, blocks):
        parameter.requires_grad_(False)


def last_blocks(model: PreTrainedModel, count: int) -> list[int]:
    """The numbers of the last blocks.

    Raises:
        ValueError: The model has fewer.
    """
    numbers = sorted(sharding.numbered_blocks(model))
    if not 1 <= count <= len(numbers):
        raise ValueError(
            f"trained_blocks: got {count}, expected 1 to {len(numbers)}, the number of the model's blocks; "
            "null trains all"
        )
    return numbers[-count:]


def depth(model: PreTrainedModel) -> int:
    """How many of the lowest blocks are frozen, with the embeddings before them; the last block never counts.

    0 where weights are sharded: each network gathers its own.
    """
    if sharding.is_sharded(model) or all(parameter.requires_grad for parameter in model.parameters()):
        return 0
    blocks = sharding.blocks(model)
    if any(parameter.requires_grad for parameter in _embeddings(model, blocks)):
        return 0
    learns = [any(p.requires_grad for p in block.parameters()) for block in blocks[:-1]]
    return [*learns, True].index(True)


def below(model: PreTrainedModel, ids: Int[Tensor, "batch time"], depth: int, laid_out: Packed | None = None) -> Below:
    """The hidden states of a right-padded batch behind the first `depth` blocks, which must not be all.

    Args:
        model: The policy.
        ids: Right-padded.
        depth: How many blocks.
        laid_out: Computes them end to end (`forward.laid_out`); of what does not lie there the states are 0.
    """
    with torch.no_grad():
        return _below(model, ids, depth, laid_out)


def _below(model: PreTrainedModel, ids: Int[Tensor, "batch time"], depth: int, laid_out: Packed | None = None) -> Below:
    stand_in, packed = StandIn(None), sent(laid_out, ids.device)
    with _standing_in(model, slice(depth, None), stand_in), causal(model):
        model.base_model(**({"input_ids": ids} if packed is None else packed.arguments(ids)), use_cache=False)
    hidden = stand_in.hidden
    assert hidden is not None
    if packed is not None:
        rows = hidden.new_zeros(ids.numel(), hidden.shape[-1]).index_copy(
            0, packed.places, hidden[0, : len(packed.places)]
        )
        hidden = rows.view(*ids.shape, -1)
    return Below(hidden=hidden, depth=depth)


@contextlib.contextmanager
def above(model: PreTrainedModel, states: Below | None) -> Iterator[None]:
    """Inside the block the model goes on from these states, which must be of the ids it is given; None: no change."""
    if states is None:
        yield
        return
    with _standing_in(model, slice(states.depth), StandIn(states.hidden)):
        yield


def join(policy: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Lets a network use the policy's frozen lower weights, if it never changes them and has the same.

    Returns:
        Whether it does: then `below` of the policy holds for it too.
    """
    count = depth(policy)
    if other is policy or count == 0:
        return count > 0 and _goes_on(policy, policy, count)
    own, theirs = lower_parameters(policy, count), lower_parameters(other, count)
    if depth(other) < count or _settings(policy) != _settings(other) or own.keys() != theirs.keys():
        return False
    if not all(_same(own[name], theirs[name]) for name in own) or not _goes_on(policy, other, count):
        return False
    instead = {id(theirs[name]): parameter for name, parameter in own.items()}
    for module in other.modules():
        for name, parameter in module._parameters.items():  # an output embedding may be tied to the input's
            module._parameters[name] = instead.get(id(parameter), parameter)
    return True


def lower_parameters(model: PreTrainedModel, count: int) -> dict[str, nn.Parameter]:
    """The weights of the first blocks and of embeddings outside blocks, by name."""
    blocks = sharding.blocks(model)
    lower = {parameter for block in blocks[:count] for parameter in block.parameters()} | _embeddings(model, blocks)
    return {name: parameter for name, parameter in model.base_model.named_parameters() if parameter in lower}


def _embeddings(model: PreTrainedModel, blocks: list[nn.Module]) -> set[nn.Parameter]:
    """The weights of embeddings of tokens, of positions, and of what else a model looks up before its blocks."""
    inside = {module for block in blocks for module in block.modules()}
    return {p for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside for p in m.parameters()}


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """What the configuration says of positions, and of how far attention looks."""
    found = model.config.get_text_config().to_dict()
    return {name: value for name, value in found.items() if any(part in name for part in OF_LONG_SEQUENCES)}


def _same(one: nn.Parameter, other: nn.Parameter) -> bool:
    return one is other or (one.dtype == other.dtype and one.device == other.device and torch.equal(one, other))


def _goes_on(policy: PreTrainedModel, other: PreTrainedModel, count: int) -> bool:
    """Whether the models agree about a few tokens, both where the shared blocks end and when they go on from there."""
    ids = torch.arange(12, device=policy.device).reshape(2, 6) % policy.config.get_text_config().vocab_size
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), compiled.off():  # dropout, which would be found here, draws
        try:
            states, again, theirs = (_below(model, ids, count).hidden for model in (policy, policy, other))
            if _learns(policy, states) or _learns(other, theirs):
                return False
            if not (torch.equal(states, again) and torch.equal(states, theirs)):  # dropout, or other than in weights
                return False
            with torch.no_grad():
                whole, gone_on = (_last(other, ids, given) for given in (None, Below(states, count)))
        except (TypeError, ValueError, AttributeError, RuntimeError, LookupError, AssertionError):
            return False  # its blocks take or give something else
    return bool((whole - gone_on).abs().max() <= ROUNDING * whole.abs().max())


def _learns(model: PreTrainedModel, states: Tensor) -> bool:
    """Whether the states depend on a weight that learns."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (weights and states.requires_grad):
        return False
    return any(grad is not None for grad in torch.autograd.grad(states.sum(), weights, allow_unused=True))


def _last(model: PreTrainedModel, ids: Int[Tensor, "batch time"], states: Below | None) -> Tensor:
    with above(model, states):
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@contextlib.contextmanager
def _standing_in(model: PreTrainedModel, which: slice, stand_in: StandIn) -> Iterator[None]:
    replaced = set(sharding.blocks(model)[which])
    places = [
        (parent, name, child)
        for parent in model.base_model.modules()
        if isinstance(parent, nn.ModuleList)
        for name, child in parent.named_children()
        if child in replaced
    ]
    for parent, name, _ in places:
        parent._modules[name] = stand_in
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
