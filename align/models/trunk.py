"""Value and reward models that share the policy's weights, for little memory.

In place of a model of its own, `PPOModule` takes a description of what to put on the policy:

* `Head`: a value head on the policy's own hidden states, so that one pass gives log-probabilities and values, and the
  value loss moves the policy's weights too (as in lm-human-preferences).
* `Adapter`: LoRA weights and head that the reward stage has trained on the same frozen weights. Value network and
  reward model then cost a few per cent of a model each, and the reference nothing: it is the policy with no adapter.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models import adapters, deferred, quantised, sharding
from align.models.heads import ScalarModel
from align.models.quantised import Bits
from align.paths import ModelPath

FOLDER = "adapter"
"""Where a model's folder has the adapter that was trained to make it."""


class TrunkModel(ScalarModel):
    """A scalar model whose trunk is another model's: it has a head and, perhaps, an adapter of its own.

    Its parameters are what it learns: the head, and its adapter, which is a part of the trunk.

    Args:
        trunk: The policy, which owns the weights.
        projection: The head.
        adapter: Its name in the trunk; None: the hidden states are the policy's own.
        bias: See `ScalarModel`.
    """

    def __init__(self, trunk: PreTrainedModel, projection: nn.Linear, adapter: str | None, bias: float = 0.0) -> None:
        nn.Module.__init__(self)
        self._trunk = (trunk,)  # in a tuple, so that it is not a part of this module too
        self.projection = projection
        self.adapter = adapter
        self._bias = bias

    @property
    def hf(self) -> PreTrainedModel:  # type: ignore[override]
        """The policy."""
        return self._trunk[0]

    @property
    def head(self) -> nn.Linear:
        """See `ScalarModel`."""
        return self.projection

    @property
    def bias(self) -> float:
        """See `ScalarModel`."""
        return self._bias

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """See `ScalarModel`."""
        return contextlib.nullcontext() if self.adapter is None else adapters.using(self.hf, self.adapter)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the head and of the adapter."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if self.adapter is not None and recurse:
            yield from adapters.named_parameters(self.hf, self.adapter)


def one_pass(model: ScalarModel) -> bool:
    """Whether a scalar model reads the hidden states of the policy as it is."""
    return isinstance(model, TrunkModel) and model.adapter is None


@dataclass(frozen=True)
class Head:
    """A value head on the policy's hidden states, 0 at first. Its loss needs a weight: `PPO.value_coef`."""

    def on(self, policy: PreTrainedModel, name: str, *, trained: bool) -> TrunkModel:
        """The head on a policy. Arguments as of `Adapter.on`."""
        return TrunkModel(policy, _projection(policy, {}, trained), None)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A scalar model that was trained with LoRA on the policy's base model.

    Attributes:
        path: The reward stage's folder, which has an `adapter` folder in it.
    """

    path: ModelPath

    def on(self, policy: PreTrainedModel, name: str, *, trained: bool) -> TrunkModel:
        """The adapter on a policy.

        Args:
            policy: With LoRA, of the same base model. Where only shapes matter (`deferred.shapes`), nothing is read,
                and the adapter is of the form of the policy's.
            name: Of the adapter in the policy.
            trained: Whether it shall learn.

        Raises:
            ValueError: The policy has no LoRA, or the folder no adapter for it.
        """
        if not adapters.present(policy):
            raise ValueError(
                f"{name}: an Adapter needs a policy with frozen weights; give module.policy.lora, or load {self.path} "
                "with align.models.load.load_scalar_model"
            )
        if deferred.only_shapes():
            lora, blocks = adapters.form(policy)
            adapters.add(policy, lora, name=name, trained=trained, blocks=blocks)
            return TrunkModel(policy, _projection(policy, {}, trained), name)
        folder = Path(self.path)
        if not (folder / FOLDER / adapters.CONFIG).is_file():
            raise ValueError(
                f"{name}: {folder} has no {FOLDER}/{adapters.CONFIG}, so it was not trained with LoRA; train it with "
                "module.model.lora, or load it with align.models.load.load_scalar_model"
            )
        saved = adapters.read(policy, folder / FOLDER, name=name, trained=trained)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return TrunkModel(policy, _projection(policy, saved, trained), name, float(config.get("reward_bias", 0.0)))


def _projection(policy: PreTrainedModel, saved: dict[str, Tensor], trained: bool) -> nn.Linear:
    """The head of a file, or one that gives 0."""
    weight, bias = saved.get("score.weight"), saved.get("score.bias")
    made = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight if weight is not None else torch.zeros_like(made.weight))
        if bias is not None:
            made.bias.copy_(bias)
    return made.requires_grad_(trained)


def reference_of(policy: PreTrainedModel, bits: Bits | None) -> PreTrainedModel | None:
    """The KL reference: a frozen copy of the policy, or None where it is the policy without its adapter.

    Args:
        policy: As it is before it learns.
        bits: Keeps the copy in 8 or 4 bits.

    Raises:
        ValueError: It shall be in few bits, but is no copy.
    """
    if not adapters.present(policy):
        reference = copy.deepcopy(policy).requires_grad_(False).eval()
        if bits is not None:
            quantised.quantise(reference, sharding.blocks(reference), bits)
        return reference
    if bits is not None:
        raise ValueError(
            f"quantise_reference: got {bits}, but with lora the reference is the policy without its adapter; "
            "module.policy.quantise keeps the weights of both in few bits"
        )
    return None
