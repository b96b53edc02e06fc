"""How much memory a run will need on each rank, before it starts; and how much it needed, when it has ended.

Weights, gradients and optimizer state are counted exactly, from shapes. What a step holds beside them is found by
making its passes on tensors without contents (`traced`). What remains are the framework's own buffers.
"""

import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from transformers import PreTrainedModel

from align import traced
from align.blockwise import BLOCK, pays
from align.models import hydra, sharding
from align.models.heads import Network, ScalarModel, inner
from align.models.quantised import QuantisedLinear, is_quantised
from align.models.trunk import TrunkModel, one_pass
from align.modules.base import AlignModule
from align.optim import learning, parsed
from align.strategy import FSDP
from align.traced import Arithmetic


@dataclass(frozen=True)
class Share:
    """What one network needs on a rank, in bytes.

    Attributes:
        name: In its module.
        parameters: Of the whole network.
        weights: With buffers.
        gradients: After the backward pass.
        optimizer: Its state.
        casts: Weights once more, in the number format of mixed precision, for as long as a step takes.
        activations: What the backward pass of a micro-batch needs of its forward pass.
        offloaded: Weights, gradients and optimizer state are in CPU memory, beside a GPU that computes.
    """

    name: str
    parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    casts: int = 0
    activations: int = 0
    offloaded: bool = False

    @property
    def resting(self) -> int:
        """What is there between steps, and gradients."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Plan:
    """What a run needs on a rank, in bytes.

    Attributes:
        shares: Of each network.
        passing: What comes and goes at the height of a forward and backward pass: logits, gradients on their way.
        gathered: Of sharded networks, what is whole at a time while they learn.
        rollout: While responses are written and scored: the cache of keys and values, a model gathered for it.
        states: What frozen blocks give for the episodes of a rollout (`align.models.hydra`).
    """

    shares: tuple[Share, ...]
    passing: int
    gathered: int = 0
    rollout: int = 0
    states: int = 0

    @property
    def kept(self) -> int:
        """Between steps."""
        return self.states + sum(share.weights + share.optimizer for share in self.shares if not share.offloaded)

    @property
    def casts(self) -> int:
        """Of all networks that learn."""
        return sum(share.casts for share in self.shares)

    @property
    def activations(self) -> int:
        """At a time: the networks that learn are computed one after the other."""
        return max(share.activations for share in self.shares)

    @property
    def update(self) -> int:
        """At the height of a step."""
        gradients = sum(share.gradients for share in self.shares if not share.offloaded)
        return self.kept + gradients + self.casts + self.activations + self.passing + self.gathered

    @property
    def peak(self) -> int:
        """The most at any time, where it computes."""
        return max(self.update, self.kept + self.casts + self.rollout if self.rollout else 0)

    def lines(self) -> list[str]:
        """The plan as a table."""
        names = ["weights", "gradients", "optimizer", *(["casts"] if self.casts else []), "activations"]
        rows = [["memory per process", *names]]
        rows += [[share.name, *(shown(getattr(share, name)) for name in names)] for share in self.shares]
        wide = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        table = [
            "  ".join(
                [row[0].ljust(wide[0]), *(cell.rjust(width) for cell, width in zip(row[1:], wide[1:], strict=True))]
            )
            for row in rows
        ]
        rest = [f"passing {shown(self.passing)}"]
        rest += [f"gathered {shown(self.gathered)}"] if self.gathered else []
        rest += [f"rollout {shown(self.rollout)}"] if self.rollout else []
        rest += [f"states of frozen blocks {shown(self.states)}"] if self.states else []
        apart = sum(share.resting for share in self.shares if share.offloaded)
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
        gpu: It computes on GPUs.
        tokens: The most computed at once: `micro_batch_tokens`, or the longest sequence.
        decoding: Sequences answered at a time, and the most tokens of a prompt and a response; None without rollouts.
        episodes: Of a rollout, on this rank.
        optimizer: Its name: `Optim.name`.
    """

    ranks: int = 1
    sharded: bool = False
    reshard: bool = True
    offloaded: bool = False
    keeps_frozen: bool = False
    dtype: torch.dtype | None = None
    gpu: bool = False
    tokens: int = 8192
    decoding: tuple[int, int, int] | None = None
    episodes: int = 0
    optimizer: str = "adamw"

    @property
    def arithmetic(self) -> Arithmetic:
        """What matters to one pass."""
        return Arithmetic(self.dtype, self.sharded, self.gpu)


def setting_of(
    module: AlignModule, data: LightningDataModule, *, ranks: int, strategy: object, precision: str, gpu: bool
) -> Setting:
    """The setting of a run.

    Args:
        module: What learns.
        data: What from, which knows how long a sequence may be.
        ranks: Processes.
        strategy: How they share a model.
        precision: The trainer's, which is no longer "auto".
        gpu: It computes on GPUs.
    """
    sampler = getattr(module, "sampler", None)
    prompt = getattr(data, "max_prompt_tokens", None)
    response = getattr(sampler, "max_new_tokens", None)
    at_once = getattr(sampler, "batch_size", None)
    episodes = -(-getattr(data, "rollout_batch", 0) // ranks)
    decoding = None
    if at_once and prompt and response:
        decoding = (min(at_once, episodes or at_once), prompt, response)
    longest = (prompt or 0) + (response or getattr(data, "max_response_tokens", None) or 0)
    return Setting(
        ranks=ranks,
        sharded=isinstance(strategy, FSDP),
        reshard=isinstance(strategy, FSDP) and strategy.reshard_after_forward,
        offloaded=isinstance(strategy, FSDP) and strategy.cpu_offload and gpu,
        keeps_frozen=isinstance(strategy, FSDP) and strategy.keep_frozen,
        dtype=torch.bfloat16 if precision == "bf16-mixed" else torch.float16 if precision == "16-mixed" else None,
        gpu=gpu,
        tokens=max(module.micro_batch_tokens, longest),
        decoding=decoding,
        episodes=episodes,
        optimizer=module.optim.name,
    )


def plan(module: AlignModule, setting: Setting) -> Plan:
    """The memory of a module's run on each rank."""
    learned: dict[str, list[nn.Parameter]] = {}
    for name, parameters in learning(module.networks()):
        learned.setdefault(name, []).extend(parameters)
    shares, gathered, passing = [], 0, 0
    for name, network in networks(module).items():
        count = _count(network)
        if name not in learned:
            whole = setting.sharded and setting.keeps_frozen and not isinstance(network, TrunkModel)
            weights = _whole_bytes(network, setting) if whole else _bytes(network, setting)
            weights -= _lower_bytes(module, setting) if name == "reference" and not is_quantised(network) else 0
            shares.append(Share(name, count, weights, offloaded=setting.offloaded and not whole))
            continue
        embeddings = {p for part in network.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
        gradients = sum(_own_bytes(p, setting, p.element_size()) for p in learned[name])
        state = sum(_state_bytes(p, setting, p in embeddings) for p in learned[name])
        if isinstance(network, ScalarModel) and one_pass(network):
            step = traced.Pass()  # its pass is the policy's
        else:
            step = traced.learning(network, setting.arithmetic, setting.tokens)
        weights = _bytes(network, setting)
        shares.append(Share(name, count, weights, gradients, state, step.casts, step.kept, setting.offloaded))
        passing = max(passing, step.passing)
        if setting.sharded and not isinstance(network, TrunkModel):
            gathered = max(gathered, _gathered(inner(network), setting))  # one network learns after the other
    return Plan(tuple(shares), passing, gathered, _rollout(networks(module), setting), _states(module, setting))


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


def networks(module: nn.Module) -> dict[str, Network]:
    """The models of a module by attribute name."""
    return {name: child for name, child in module.named_children() if isinstance(child, Network)}


def _own_rows(parameter: nn.Parameter, setting: Setting) -> float:
    """The share of a parameter's rows that the fullest rank has."""
    if not setting.sharded or not parameter.ndim:
        return 1.0
    return -(-parameter.shape[0] // setting.ranks) / parameter.shape[0]


def _own_bytes(parameter: nn.Parameter, setting: Setting, each: int) -> int:
    return round(parameter.numel() * _own_rows(parameter, setting) * each)


def _held(network: nn.Module) -> set[nn.Parameter]:
    """The parameters that lie in a network: of one on another's trunk, its head alone."""
    return {parameter for part in network.modules() for parameter in part.parameters(recurse=False)}


def _count(network: nn.Module) -> int:
    """Parameters that lie in a network, quantised ones among them by what they stand for."""
    layers = [part for part in network.modules() if isinstance(part, QuantisedLinear)]
    codes = {parameter for layer in layers for parameter in (layer.weight, layer.scales)}
    plain = sum(parameter.numel() for parameter in _held(network) - codes)
    return plain + sum(layer.in_features * layer.out_features for layer in layers)


def _bytes(model: nn.Module, setting: Setting) -> int:
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return buffers + sum(_own_bytes(p, setting, p.element_size()) for p in _held(model))


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
    each = setting.dtype.itemsize if setting.dtype is not None and not is_quantised(model) else None
    return sum(p.numel() * (each or p.element_size()) for p in model.parameters())


def _rollout(models: Mapping[str, Network], setting: Setting) -> int:
    """What responses need while they are written; and each model, gathered where it is sharded, while it scores them.

    Unsharded, no scoring pass needs what an update does not.
    """
    policy = models.get("policy")
    if setting.decoding is None or not isinstance(policy, PreTrainedModel):
        return 0
    written = traced.writing(policy, setting.arithmetic, *setting.decoding).passing
    if not setting.sharded:
        return written
    needs = [written + _whole_bytes(policy, setting)]
    for network in _of_different_shapes(models.values()):
        scored = traced.scoring(network, setting.arithmetic, setting.tokens).passing
        needs.append(scored + _whole_bytes(inner(network), setting))
    return max(needs)


def _hydra(module: AlignModule, setting: Setting) -> PreTrainedModel | None:
    """The policy, if others share its frozen blocks."""
    policy = networks(module).get("policy")
    if setting.sharded or not getattr(module, "share_frozen", False) or not isinstance(policy, PreTrainedModel):
        return None
    return policy if hydra.depth(policy) else None


def _lower_bytes(module: AlignModule, setting: Setting) -> int:
    """Of the frozen weights that the reference has in common with the policy."""
    policy = _hydra(module, setting)
    if policy is None:
        return 0
    return sum(weight.nbytes for weight in hydra.lower_parameters(policy, hydra.depth(policy)).values())


def _states(module: AlignModule, setting: Setting) -> int:
    """At most: of episodes that are all as long as they may be."""
    policy = _hydra(module, setting)
    if policy is None or setting.decoding is None or setting.ranks > 1:
        return 0
    _, prompt, response = setting.decoding
    width = policy.config.get_text_config().hidden_size
    return setting.episodes * (prompt + response) * width * policy.dtype.itemsize


def _of_different_shapes(models: Iterable[Network]) -> list[Network]:
    """One of those that are alike: the reference is a copy of the policy."""
    return list({(type(inner(one)), tuple(p.shape for p in one.parameters())): one for one in models}.values())
