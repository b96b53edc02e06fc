"""What a pass over a model holds in memory, found by making it on tensors without contents.

Every operation is dispatched as in a run and nothing is computed, so a model of any size is traced on any machine in
less than a minute, without its weights. What is counted is every tensor from when it is made until it is freed: what
the backward pass needs, what it makes on the way, gradients of a tied matrix that wait to be added up. What a kernel
uses inside itself is not seen.
"""

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Concatenate, ParamSpec, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from align.models import forward, hydra, sharding
from align.models.heads import Network, ScalarModel, inner
from align.models.quantised import is_quantised
from align.rollout.sampler import draw

Arguments = ParamSpec("Arguments")

DEPTHS = (4, 8)
"""Blocks that are traced of deeper models; each further one adds as much. Fours, as kinds of blocks may take turns."""

EARLY = 3
"""Blocks after which the backward pass does with each block what it did with the one before, and keeps one less."""

TYPICAL_LENGTH = 512
"""Tokens of a sequence in the pass that is counted; what is held hardly depends on it."""


@dataclass(frozen=True)
class Arithmetic:
    """How a model is computed.

    Attributes:
        dtype: Of the arithmetic, where it is not that of the weights.
        sharded: Weights come gathered in `dtype`, gradients leave block by block.
        gpu: On a GPU, whose attention takes any number format (`align.models.attention`).
        depth: The model's first blocks, so many; None: all.
        last: Its last blocks instead, which learn where not all do.
    """

    dtype: torch.dtype | None = None
    sharded: bool = False
    gpu: bool = False
    depth: int | None = None
    last: bool = False


@dataclass(frozen=True)
class Pass:
    """What one holds, in bytes, beside weights and gradients.

    Attributes:
        casts: Weights once more, in the arithmetic's number format; autocast keeps them for the whole step.
        kept: When the forward pass has ended: what the backward pass needs.
        early: The most that is there with all this, until the last `EARLY` blocks' backward passes are done.
        late: The most after that.
    """

    casts: int = 0
    kept: int = 0
    early: int = 0
    late: int = 0

    @property
    def passing(self) -> int:
        """The most that is there beyond casts and what is kept, at any time."""
        return max(self.early, self.late) - self.kept - self.casts


class Watch(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block.

    Attributes:
        now: Of those that are there.
        most: Of those that were there at a time, since `mark` was called.
        earlier: Of those that were there at a time, before that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.earlier = 0, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operation comes by here."""
        if func is torch.ops.prim.device.default:  # half of all calls
            return func(*args)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def mark(self) -> None:
        """A part of the pass has ended, and another begins; the first call counts."""
        if not self.earlier:
            self.earlier, self.most = self.most, self.now

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Leaves tensors out that were made before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number = storage._cdata
        if number in self._known:
            return
        self._known.add(number)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, number, storage.nbytes())

    def _gone(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


def _by_depth(
    traced: Callable[Concatenate[Network, Arithmetic, Arguments], Pass], *, learns: bool = False
) -> Callable[Concatenate[Network, Arithmetic, Arguments], Pass]:
    """What is found of a deep model from two shallow ones: each number grows by as much with each block.

    In a pass that learns, frozen blocks at the bottom add nothing to what is kept, so it is as if they were not there.
    """

    @functools.wraps(traced)
    def found(network: Network, arithmetic: Arithmetic, *arguments: Arguments.args, **named: Arguments.kwargs) -> Pass:
        frozen = hydra.depth(inner(network)) if learns else 0
        arithmetic = replace(arithmetic, last=frozen > 0)
        depth = len(sharding.blocks(inner(network))) - frozen
        if depth <= DEPTHS[1]:
            part = replace(arithmetic, depth=depth) if frozen else arithmetic
            return traced(network, part, *arguments, **named)
        few, more = (astuple(traced(network, replace(arithmetic, depth=part), *arguments, **named)) for part in DEPTHS)
        further = (depth - DEPTHS[1]) / (DEPTHS[1] - DEPTHS[0])
        return Pass(*(round(high + further * (high - low)) for low, high in zip(few, more, strict=True)))

    return found


@functools.partial(_by_depth, learns=True)
def learning(network: Network, arithmetic: Arithmetic, tokens: int) -> Pass:
    """A micro-batch's forward and backward pass, as a module makes it that has made others before in this step.

    Args:
        network: In its training mode; on any device, also without weights.
        arithmetic: How it is computed.
        tokens: Of the micro-batch.
    """
    with _hollow(network, arithmetic) as (model, watch):
        sends = _sent_block_by_block(model, watch) if arithmetic.sharded else _added_up(model, watch)
        # What is kept shrinks with each block: the most is there when the backward pass begins, or when it ends.
        for parameter in (p for block in sharding.blocks(inner(model))[:-EARLY] for p in block.parameters()):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _: watch.mark())
        ids = _ids(tokens, inner(model))
        casts = _casts(model, watch, ids)
        watch.most = watch.now
        loss = _outputs(model, ids).sum()
        kept = watch.now - casts
        loss.backward()
        del loss
        sends()
        watch.mark()
        return Pass(casts, kept, watch.earlier, watch.most)


@_by_depth
def scoring(network: Network, arithmetic: Arithmetic, tokens: int) -> Pass:
    """A micro-batch's forward pass without gradients. Arguments as of `learning`."""
    with _hollow(network, arithmetic) as (model, watch), torch.no_grad():
        model.eval()
        ids = _ids(tokens, inner(model))
        casts = _casts(model, watch, ids)
        watch.most = watch.now
        _outputs(model, ids)
        return Pass(casts, 0, watch.most)


@_by_depth
def writing(network: Network, arithmetic: Arithmetic, sequences: int, prompt: int, response: int) -> Pass:
    """Answering prompts: the pass over them, and the last step, when the cache of keys and values is fullest.

    As with transformers' cache and all prompts at once. `align.models.slots` holds as many tokens in the end; it
    computes prompts in turns, but also while its rows are full. Prompts with several answers, kept once, need less.

    Args:
        network: The policy.
        arithmetic: How it is computed.
        sequences: Answered at a time.
        prompt: Tokens of each prompt.
        response: Tokens of each response.
    """
    with _hollow(network, arithmetic) as (policy, watch), torch.no_grad():
        policy.eval()
        casts = _casts(policy, watch, torch.zeros((1, 2), dtype=torch.long))
        watch.most = watch.now
        cache, points = DynamicCache(config=policy.config), torch.zeros(sequences, dtype=torch.float64)

        def step(length: int, seen: int) -> None:
            ids, mask = torch.zeros((sequences, length), dtype=torch.long), torch.ones((sequences, seen + length))
            out = policy(
                input_ids=ids, attention_mask=mask.long(), position_ids=ids, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            draw(out.logits[:, -1].float(), 0.5, points)

        step(prompt, 0)
        watch.mark()
        for number, layer in enumerate(cast(list[Any], cache.layers)):
            keys, values = (
                part[:, :, :1].expand(-1, -1, max(0, response - 2), -1) for part in (layer.keys, layer.values)
            )
            cache.update(keys, values, number)
        step(1, prompt + max(0, response - 2))
        return Pass(casts, 0, watch.earlier, watch.most)


@contextlib.contextmanager
def _hollow(network: Network, arithmetic: Arithmetic) -> Iterator[tuple[Any, Watch]]:
    """The network with tensors without contents in it, the arithmetic switched on, and what counts new tensors."""
    mode, watch, blocks = FakeTensorMode(), Watch(), sharding.blocks(inner(network))
    depth = len(blocks) if arithmetic.depth is None else arithmetic.depth
    out = blocks[: len(blocks) - depth] if arithmetic.last else blocks[depth:]
    instead: dict[int, Any] = {id(block): nn.Identity() for block in out}
    unused = {parameter for block in out for parameter in block.parameters()}
    with mode, torch.device("cpu"):
        quantised = is_quantised(inner(network))
        for parameter in {*network.parameters(), *inner(network).parameters()} - unused:
            gathered = arithmetic.dtype if arithmetic.sharded and not quantised else None
            empty = torch.empty(parameter.shape, dtype=gathered or parameter.dtype)
            instead[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        for buffer in {*network.buffers(), *inner(network).buffers()}:
            instead[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    own = [tensor for tensor in instead.values() if isinstance(tensor, Tensor)]
    model = copy.deepcopy(network, instead)
    if arithmetic.depth is not None:
        _cut(inner(model), depth, last=arithmetic.last)
    if arithmetic.gpu and inner(model).config._attn_implementation != "eager":
        inner(model).set_attn_implementation("sdpa")
    watch.ignore(iter(own))
    autocast = torch.autocast("cpu", arithmetic.dtype, enabled=arithmetic.dtype is not None)
    with mode, torch.device("cpu"), watch, autocast:
        yield model, watch


def _cut(model: PreTrainedModel, depth: int, *, last: bool) -> None:
    """Leaves the first blocks of a model, or its last ones."""
    end, config = -1 if last else 0, model.config.get_text_config()
    kept = sharding.blocks(model)[end]
    (stack,) = (part for part in model.modules() if isinstance(part, nn.ModuleList) and part[end] is kept)
    if last:
        del stack[: len(stack) - depth]
        if vars(config).get("layer_types"):  # of each block; some models find it out themselves
            config.layer_types = config.layer_types[-depth:]
    else:
        del stack[depth:]
    config.num_hidden_layers = depth


def _outputs(model: Network, ids: Tensor) -> Tensor:
    if not isinstance(model, ScalarModel):
        return forward.every_logprob(model, ids)
    with model.in_use():
        return forward.every_value(model, ids)


def _casts(model: Network, watch: Watch, ids: Tensor) -> int:
    """What autocast keeps of the weights, which the first pass of a step leaves behind."""
    before = watch.now
    _outputs(model, ids[:1, :2])
    gc.collect()
    return watch.now - before


def _ids(tokens: int, model: PreTrainedModel) -> Tensor:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TYPICAL_LENGTH
    rows = max(1, tokens // min(TYPICAL_LENGTH, longest))
    return torch.zeros((rows, max(2, tokens // rows)), dtype=torch.long)


def _added_up(model: nn.Module, watch: Watch) -> Callable[[], None]:
    """Gradients are there, of earlier micro-batches."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    watch.ignore(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    watch.now = 0
    return lambda: None


def _sent_block_by_block(model: nn.Module, watch: Watch) -> Callable[[], None]:
    """What FSDP does with whole gradients: a block's are sent off in float32 when all are there, the others last.

    A message's buffer is kept until the next one is sent.
    """
    sent: list[Tensor] = []

    def send(parameters: list[nn.Parameter]) -> None:
        sent.append(torch.empty(sum(p.numel() for p in parameters), dtype=torch.float32))
        for parameter in parameters:
            parameter.grad = None
        del sent[:-1]

    whole = inner(model)  # type: ignore[arg-type]
    rest = {parameter: None for parameter in whole.parameters() if parameter.requires_grad}
    for block in sharding.blocks(whole):
        own = [parameter for parameter in block.parameters() if parameter.requires_grad]

        def arrived(_: Tensor, own: list[nn.Parameter] = own) -> None:
            if all(parameter.grad is not None for parameter in own):
                send(own)

        for parameter in own:
            parameter.register_post_accumulate_grad_hook(arrived)
            del rest[parameter]

    return lambda: send(list(rest))
