"""How much memory a run will need on each rank, before it starts; and how much it needed, when it has ended.

Weights, gradients and optimizer state are counted exactly, from shapes. What the backward pass keeps is counted by
running each model's forward pass on tensors without contents. What remains are the framework's own buffers.
"""

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.modeling_utils import local_torch_dtype

from align.blockwise import BLOCK, pays
from align.models import forward, sharding
from align.models.heads import ScalarModel
from align.modules.base import AlignModule
from align.optim import parsed

LOGIT_COPIES = 3
"""Of the logits of a chunk: themselves in float32, their log-softmax, and its gradient."""

TYPICAL_LENGTH = 512
"""Tokens of a sequence in the forward pass that is counted; what is kept hardly depends on it."""


@dataclass(frozen=True)
class Share:
    """What one network needs on a rank, in bytes.

    Attributes:
        offloaded: Weights, gradients and optimizer state are in CPU memory, beside a GPU that computes.
    """

    name: str
    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    offloaded: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run needs on a rank, in bytes.

    Attributes:
        shares: Of each network.
        logits: Of the largest chunk that is computed at once.
        gathered: Of sharded networks, what is whole at a time while they learn.
        cache: Keys and values while responses are written, and the policy gathered for it.
    """

    shares: tuple[Share, ...]
    logits: int
    gathered: int = 0
    cache: int = 0

    @property
    def kept(self) -> int:
        """Between steps."""
        return sum(share.weights + share.optimizer for share in self.shares if not share.offloaded)

    @property
    def update(self) -> int:
        """At the height of a step."""
        rest = sum(share.activations + share.gradients * (not share.offloaded) for share in self.shares)
        return self.kept + rest + self.logits + self.gathered

    @property
    def peak(self) -> int:
        """The most at any time, where it computes."""
        return max(self.update, self.kept + self.cache)

    def lines(self) -> list[str]:
        """The plan as a table."""
        names = ("weights", "gradients", "optimizer", "activations")
        rows = [["memory per process", *names]]
        rows += [[share.name, *(shown(getattr(share, name)) for name in names)] for share in self.shares]
        wide = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        table = [
            "  ".join(
                [row[0].ljust(wide[0]), *(cell.rjust(width) for cell, width in zip(row[1:], wide[1:], strict=True))]
            )
            for row in rows
        ]
        rest = [f"logits {shown(self.logits)}"]
        rest += [f"gathered {shown(self.gathered)}"] if self.gathered else []
        rest += [f"rollout {shown(self.cache)}"] if self.cache else []
        apart = sum(one.weights + one.gradients + one.optimizer for one in self.shares if one.offloaded)
        rest += [f"in CPU memory {shown(apart)}"] if apart else []
        return [*table, f"{', '.join(rest)}; at most {shown(self.peak)} at a time"]


@dataclass(frozen=True)
class Setting:
    """How a run computes.

    Attributes:
        ranks: Processes.
        sharded: Weights are spread over them.
        reshard: Blocks are freed after their forward pass.
        offloaded: What is sharded is in CPU memory, and a GPU computes.
        keeps_frozen: Networks that do not learn are whole on every rank.
        dtype: Of the arithmetic, where it is not that of the weights.
        tokens: The most computed at once: `micro_batch_tokens`.
        decoding: Sequences answered at a time, and the most tokens of each; None without rollouts.
        optimizer: Its name: `Optim.name`.
    """

    ranks: int = 1
    sharded: bool = False
    reshard: bool = True
    offloaded: bool = False
    keeps_frozen: bool = False
    dtype: torch.dtype | None = None
    tokens: int = 8192
    decoding: tuple[int, int] | None = None
    optimizer: str = "adamw"


def plan(module: AlignModule, setting: Setting) -> Plan:
    """The memory of a module's run on each rank."""
    trained = dict(module.networks())
    shares, gathered, logits = [], 0, 0
    for name, network in _networks(module).items():
        inner = _inner(network)
        if name not in trained:
            whole = setting.sharded and setting.keeps_frozen
            weights = _whole_bytes(inner, setting) if whole else _bytes(inner, setting)
            shares.append(Share(name, weights, offloaded=setting.offloaded and not whole))
            continue
        weights = _bytes(inner, setting)
        learning = sum(_own_bytes(p, setting, p.element_size()) for p in inner.parameters() if p.requires_grad)
        embeddings = {p for part in inner.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
        state = sum(_state_bytes(p, setting, p in embeddings) for p in inner.parameters() if p.requires_grad)
        shares.append(Share(name, weights, learning, state, activations(inner, setting), setting.offloaded))
        if setting.sharded:
            gathered += _gathered(inner, setting)
        if not isinstance(network, ScalarModel):
            vocab = inner.config.get_text_config().vocab_size
            logits = max(logits, min(setting.tokens * vocab, forward.LOGITS_PER_CHUNK) * 4 * LOGIT_COPIES)
    return Plan(tuple(shares), logits, gathered, _decoding(trained, setting))


def activations(model: PreTrainedModel, setting: Setting) -> int:
    """Bytes that a micro-batch's backward pass needs of its forward pass, logits aside."""
    rows = max(1, setting.tokens // TYPICAL_LENGTH)
    kept: dict[int, tuple[int, Tensor]] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(), torch.device(device):
        with local_torch_dtype(next(model.parameters()).dtype):
            copy = type(model)(model.config).train(model.training)
        if model.is_gradient_checkpointing:
            copy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        own = {parameter.untyped_storage()._cdata for parameter in copy.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), tensor)  # which keeps its number from being used again
            return tensor

        ids = torch.zeros((rows, setting.tokens // rows), dtype=torch.long)
        arithmetic = torch.autocast(device, setting.dtype, enabled=setting.dtype is not None)
        with arithmetic, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            copy.base_model(input_ids=ids, use_cache=False)
    total = sum(size for size, _ in kept.values())
    return total if not model.is_gradient_checkpointing else total + _of_a_block(model, setting)


def _of_a_block(model: PreTrainedModel, setting: Setting) -> int:
    """What one block keeps when it is computed again."""
    model.gradient_checkpointing_disable()
    try:
        return activations(model, setting) // len(sharding.blocks(model))
    finally:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def needed(before: int) -> int:
    """The most memory that this process has used, in bytes: of its GPU, or else of the machine, beyond `before`."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return used() - before


def used() -> int:
    """The most memory of the machine that this process has had so far, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def shown(size: int) -> str:
    """Bytes, readably."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _networks(module: nn.Module) -> dict[str, nn.Module]:
    """The models of a module by attribute name."""
    children = dict(module.named_children()).items()
    return {name: child for name, child in children if isinstance(child, PreTrainedModel | ScalarModel)}


def _inner(network: nn.Module) -> PreTrainedModel:
    inner = network.hf if isinstance(network, ScalarModel) else network
    assert isinstance(inner, PreTrainedModel)
    return inner


def _own_rows(parameter: nn.Parameter, setting: Setting) -> float:
    """The share of a parameter's rows that the fullest rank has."""
    if not setting.sharded or not parameter.ndim:
        return 1.0
    return -(-parameter.shape[0] // setting.ranks) / parameter.shape[0]


def _own_bytes(parameter: nn.Parameter, setting: Setting, each: int) -> int:
    return round(parameter.numel() * _own_rows(parameter, setting) * each)


def _bytes(model: nn.Module, setting: Setting) -> int:
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return buffers + sum(_own_bytes(p, setting, p.element_size()) for p in model.parameters())


def _state_bytes(parameter: nn.Parameter, setting: Setting, embedding: bool) -> int:
    rule, bits, _ = parsed(setting.optimizer)
    moments = 1 if rule == "lion" else 2
    if embedding or bits != 8 or not pays(parameter.shape):
        each = parameter.element_size() if setting.optimizer == "adamw" else 4
        return moments * _own_bytes(parameter, setting, each)
    columns = -(-(parameter.numel() // parameter.shape[0]) // BLOCK) * BLOCK
    own = round(parameter.shape[0] * _own_rows(parameter, setting))
    return moments * own * (columns + 4 * columns // BLOCK)


def _gathered(model: PreTrainedModel, setting: Setting) -> int:
    """What is outside the blocks, and two blocks: one computed, one on its way; or all of it."""
    sizes = [_whole_bytes(block, setting) for block in sharding.blocks(model)]
    rest = _whole_bytes(model, setting) - sum(sizes)
    return rest + (2 * max(sizes) if setting.reshard else sum(sizes))


def _whole_bytes(model: nn.Module, setting: Setting) -> int:
    each = setting.dtype.itemsize if setting.dtype is not None else None
    return sum(p.numel() * (each or p.element_size()) for p in model.parameters())


def _decoding(trained: Mapping[str, nn.Module], setting: Setting) -> int:
    """Keys and values of the sequences answered at a time, and the gathered policy."""
    policy = trained.get("policy")
    if policy is None or setting.decoding is None:
        return 0
    model = _inner(policy)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = (setting.dtype or next(model.parameters()).dtype).itemsize
    sequences, tokens = setting.decoding
    cache = sequences * tokens * config.num_hidden_layers * 2 * heads * width * each
    return cache + (_whole_bytes(model, setting) if setting.sharded else 0)
