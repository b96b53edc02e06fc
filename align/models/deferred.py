"""Models made without their weights, which are read later: only the rows that a rank keeps, or one tensor at a time.

So a model that is sharded never exists whole on any rank. Where a folder's files do not hold the model's tensors under
their own names (other formats than safetensors, weights that transformers converts), it is loaded whole as ever.

Where only shapes matter, models have no weights at all, nor files that could hold them.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from align import distributed
from align.models.quantised import QuantisedLinear, quantised

ATTRIBUTE = "align_source"
"""Of a model without weights: where they are."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class _State:
    wanted = False
    only_shapes = False


@contextlib.contextmanager
def _switched_on(name: str) -> Iterator[None]:
    before = getattr(_State, name)
    setattr(_State, name, True)
    try:
        yield
    finally:
        setattr(_State, name, before)


def weights() -> contextlib.AbstractContextManager[None]:
    """Models loaded inside the block are made without weights where that is possible."""
    return _switched_on("wanted")


def wanted() -> bool:
    """Whether models shall be made without weights."""
    return _State.wanted


def shapes() -> contextlib.AbstractContextManager[None]:
    """Models loaded inside the block have shapes alone; of their folders or hub names only the config.json is read."""
    return _switched_on("only_shapes")


def only_shapes() -> bool:
    """Whether models shall have no weights, now or ever."""
    return _State.only_shapes


@dataclass(frozen=True)
class Source:
    """Where the weights of a model are.

    Attributes:
        files: Tensor name -> file.
        made: Tensors that no file has, by name.
    """

    files: dict[str, Path]
    made: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, name: str, start: int, stop: int, *, transposed: bool = False) -> Tensor:
        """Some rows of a tensor, or of its transpose, without reading the others."""
        if name in self.made:
            return self.made[name][start:stop]
        with safe_open(self.files[name], framework="pt") as file:
            part = file.get_slice(name)
            return part[:, start:stop].T if transposed else part[start:stop]


def make(factory: Any, path: str, **arguments: Any) -> PreTrainedModel | None:
    """A model of the factory's `from_config`, on the meta device but for its buffers; None where it must be whole.

    Args:
        factory: One of transformers' Auto classes.
        path: Folder or hub name.
        arguments: `config`, `dtype`.
    """
    files = _tensor_files(path)
    with _parameters_on_meta():
        model = factory.from_config(**arguments)
    names = {name for name, _ in model.named_parameters()}
    kept_buffers = model.state_dict().keys() & files.keys() & {name for name, _ in model.named_buffers()}
    if names - files.keys() - {"score.weight"} or kept_buffers:
        return None
    setattr(model, ATTRIBUTE, Source(files))
    return model


def outline(factory: Any, **arguments: Any) -> PreTrainedModel:
    """A model of the factory's `from_config` that has shapes alone: see `shapes`."""
    with _parameters_on_meta():
        return factory.from_config(**arguments)


def source_of(model: PreTrainedModel) -> Source | None:
    """Where the weights of a model are; None: it has them."""
    return getattr(model, ATTRIBUTE, None)


@torch.no_grad()
def fill(model: PreTrainedModel, device: torch.device) -> None:
    """Reads the weights of a model that was made without: this rank's rows of those that are sharded.

    Args:
        model: Sharded, or to be whole on every rank.
        device: Where the weights shall be. Buffers stay where they are.
    """
    source = source_of(model)
    if source is None:
        return
    # No file has them, or `make` would have refused; they are what the configuration makes them.
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, buffer)
    model.tie_weights()
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    for name, parameter in model.named_parameters():
        start, stop = 0, parameter.shape[0]
        if isinstance(parameter, DTensor):
            start, stop = distributed.own_rows(stop, parameter.device_mesh)
        layer, plain = layers.get(name.rpartition(".")[0]), name.replace(".base_layer.", ".")  # LoRA wraps layers
        if layer is None or name.endswith(".bias"):
            distributed.own_part(parameter).copy_(source.rows(plain, start, stop))
        elif parameter is layer.weight:  # which is read together with its scales
            layer.take(source.rows(plain, start, stop, transposed=layer.transposed))
    delattr(model, ATTRIBUTE)


def value_of(model: PreTrainedModel, name: str) -> Tensor:
    """A weight as it is, or as it would be if it had been read.

    Args:
        model: With or without weights.
        name: Of the weight in the model.
    """
    source = source_of(model)
    if source is None:
        return model.state_dict()[name]
    owner, _, last = name.rpartition(".")
    layer, plain = model.get_submodule(owner), owner.replace(".base_layer", "")
    if isinstance(layer, QuantisedLinear) and last != "bias":
        whole = source.rows(f"{plain}.weight", 0, layer.out_features, transposed=layer.transposed)
        return quantised(whole, layer.bits)[last == "scales"]
    return source.rows(f"{plain}.{last}", 0, model.state_dict()[name].shape[0])


def _tensor_files(path: str) -> dict[str, Path]:
    """Tensor name -> safetensors file; empty where there are none."""
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", INDEX]))
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    if not (folder / SINGLE).exists():
        return {}
    with safe_open(folder / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside the block have no storage. Buffers do: nobody could say what was in them."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
