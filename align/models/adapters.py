"""LoRA (Hu et al. 2021, arXiv:2106.09685): small trained updates of a frozen model, in peft's layers.

Several updates (adapters) may lie in one model; those in use are chosen for the length of a block (`using`), so one set
of frozen weights serves as policy, value network, reward model and, with no adapter in use, as the KL reference.
What is trained is exported twice: added to the weights (`merged`), as a plain model, and by itself (`write`), in peft's
format.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align import distributed, seeds
from align.models import deferred, sharding
from align.models.quantised import QuantisedLinear, restored

OWN = "default"
"""The adapter that a model is loaded with, and exported with."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""The files of an adapter's folder, as peft names them."""

PREFIX = "base_model.model."
"""Of tensor names in peft's files."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """W + alpha/rank · B A instead of W, where only A and B are trained. B is 0 at first, so nothing changes.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: See above.
        dropout: Of what A is applied to.
        targets: The layers' names in a block, such as [q_proj, v_proj]; null: all linear ones.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Sequence[str] | None = None

    @classmethod
    def config_errors(cls, arguments: dict[str, Any]) -> list[str]:
        """What is wrong with these constructor arguments, in words."""
        errors = []
        if arguments["rank"] < 1:
            errors.append(f"rank: got {arguments['rank']}, expected at least 1")
        if arguments["alpha"] <= 0.0:
            errors.append(f"alpha: got {arguments['alpha']}, expected a positive number, such as twice the rank")
        if not 0.0 <= arguments["dropout"] < 1.0:
            errors.append(f"dropout: got {arguments['dropout']}, expected at least 0 and less than 1")
        if arguments["targets"] is not None and not arguments["targets"]:
            errors.append("targets: got an empty list, which trains nothing; expected names of layers, or null for all")
        return errors


def add(
    model: PreTrainedModel,
    lora: LoRA,
    *,
    name: str = OWN,
    trained: bool = True,
    seed: int = 0,
    blocks: Sequence[int] | None = None,
) -> None:
    """Gives a model a new adapter; all weights that are no adapter's are frozen.

    Args:
        model: Its blocks' linear layers are wrapped, if they are not already.
        lora: Of what form.
        name: Of the adapter.
        trained: Whether it shall learn.
        seed: Of A, drawn from U(-1/√columns, 1/√columns), which is peft's initialisation.
        blocks: Numbers of the blocks that get it; None: all.

    Raises:
        ValueError: The model has no layers of the names asked for.
    """
    chosen = _targets(model, lora, blocks)
    others = list(_layers(model).values())
    in_use = others[0].active_adapters if others else [name]
    before = {parameter: parameter.requires_grad and bool(others) for parameter in model.parameters()}
    from peft import inject_adapter_in_model  # takes a second

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute in the model")
        # On the meta device: peft would draw values, and from a generator that is not this function's.
        inject_adapter_in_model(_config(model, lora, chosen, blocks), model, name, low_cpu_mem_usage=True)
    for layer in _layers(model).values():
        for part in _PARTS if name in layer.lora_A else ():
            # In float32 whatever the base model is kept in; and where that is.
            getattr(layer, part)[name].float().to_empty(device=layer.get_base_layer().weight.device)
    for parameter in model.parameters():
        parameter.requires_grad_(before.get(parameter, trained))
    generator = seeds.generator(seed, "lora")
    for place, parameter in named_parameters(model, name) if not deferred.only_shapes() else ():
        uniform = torch.rand(parameter.shape, generator=generator) * 2.0 - 1.0
        of_a = ".lora_A." in place
        _set(model, place, parameter, uniform / parameter.shape[1] ** 0.5 if of_a else torch.zeros(parameter.shape))
    _use(model, in_use)


def present(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(_is_adapted(module) for module in model.modules())


def form(model: PreTrainedModel) -> tuple[LoRA, list[int] | None]:
    """Of a model's own adapter, without its dropout; and the numbers of the blocks that have it, None: all."""
    own = {path: layer for path, layer in _layers(model).items() if OWN in layer.lora_A}
    one = next(iter(own.values()))
    targets = sorted({path.rpartition(".")[2] for path in own})
    lora = LoRA(rank=one.r[OWN], alpha=one.lora_alpha[OWN], targets=targets)
    blocks, layers = sharding.numbered_blocks(model), set(own.values())
    having = [number for number, block in blocks.items() if layers & {*block.modules()}]
    return lora, having if len(having) < len(blocks) else None


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """The model with one adapter inside the block, or with none. Backward passes belong in the block too.

    Without that, activations that are computed again for a backward pass (gradient checkpointing) would be another
    adapter's. A model without adapters stays as it is.
    """
    layers = list(_layers(model).values())
    before = layers[0].active_adapters if layers else []
    _use(model, [] if name is None else [name])
    try:
        yield
    finally:
        _use(model, before)


def named_parameters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of one adapter, by their names in the model."""
    for path, layer in _layers(model).items():
        for part in _PARTS:
            if name in (linears := getattr(layer, part)):
                yield f"{path}.{part}.{name}.weight", linears[name].weight


def merged(model: PreTrainedModel, value_of: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model without adapters that computes what this one does with its own.

    Args:
        model: With or without adapters and quantised layers.
        value_of: A tensor's name in the model -> its value, whole. Called in the same order on all ranks.

    Yields:
        Names as of a plain model, and values in the type that the model was loaded in.
    """
    for name, own in plain_names(model).items():
        yield name, merged_tensor(model, own, value_of)


def plain_names(model: PreTrainedModel) -> dict[str, str]:
    """Tensor name in the same model without adapters or quantised layers -> its name in this one."""
    found = {}
    for name in sharding.tensors_once(model):
        owner, _, last = name.rpartition(".")
        quantised = isinstance(model.get_submodule(owner), QuantisedLinear)
        if ".lora_A." not in name and ".lora_B." not in name and not (quantised and last == "scales"):
            found[name.replace(".base_layer.", ".")] = name
    return found


def merged_tensor(model: PreTrainedModel, name: str, value_of: Callable[[str], Tensor]) -> Tensor:
    """One tensor of `merged`, by its name in the model."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    weight, transposed = value_of(name), isinstance(module, Conv1D)
    if last == "weight" and isinstance(module, QuantisedLinear):
        weight = restored(weight, value_of(f"{owner}.scales"), module.bits, module.in_features, module.dtype)
        weight, transposed = weight.T if module.transposed else weight, module.transposed
    path = owner.removesuffix(".base_layer")
    layer: Any = model.get_submodule(path)
    if last != "weight" or path == owner or OWN not in layer.lora_A:
        return weight
    first, second = (value_of(f"{path}.{part}.{OWN}.weight") for part in _PARTS)
    update = layer.scaling[OWN] * (second.float() @ first.float())
    return (weight.float() + (update.T if transposed else update)).to(weight.dtype)


def write(model: PreTrainedModel, value_of: Callable[[str], Tensor], folder: Path) -> None:
    """Writes a model's own adapter, and a scalar head that was trained with it, in peft's format.

    Args:
        model: With adapters.
        value_of: See `merged`. Where ranks share weights, all must call this; the first one writes.
        folder: Is made.
    """
    head = [name for name in ("score.weight", "score.bias") if name in dict(model.named_parameters())]
    own = {path: layer for path, layer in _layers(model).items() if OWN in layer.lora_A}
    found = {f"{path}.{part}.weight": value_of(f"{path}.{part}.{OWN}.weight") for path in own for part in _PARTS}
    found |= {name: value_of(name) for name in head}
    if not distributed.is_first():
        return
    lora, blocks = form(model)
    config = _config(model, lora, list(lora.targets or ()), blocks).to_dict() | {
        "base_model_name_or_path": model.config.name_or_path,
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "modules_to_save": ["score"] if head else None,
        "inference_mode": True,
    }
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=sorted) + "\n", encoding="utf-8")
    found = {f"{PREFIX}{name}": value.contiguous() for name, value in found.items()}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def read(model: PreTrainedModel, folder: Path, *, name: str, trained: bool) -> dict[str, Tensor]:
    """Gives a model an adapter that `write` has written.

    Args:
        model: The one the adapter was trained on, without its head.
        folder: With `CONFIG` and `WEIGHTS`.
        name: For the adapter in the model.
        trained: Whether it shall learn.

    Returns:
        The tensors of the file that are no layer's update: a scalar head, by its name in the model.

    Raises:
        ValueError: It was trained on another model.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    base, own = str(config.get("base_model_name_or_path")), str(model.config.name_or_path)
    if base != own and Path(base).resolve() != Path(own).resolve():
        raise ValueError(
            f"the adapter in {folder} was trained on {base}, and the policy is {own}: on other weights it means "
            f"nothing; if they are the same, correct base_model_name_or_path in {folder / CONFIG}"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        saved = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    lora = LoRA(rank=config["r"], alpha=config["lora_alpha"], targets=sorted(config["target_modules"]))
    blocks = config.get("layers_to_transform")
    add(model, lora, name=name, trained=trained, blocks=[blocks] if isinstance(blocks, int) else blocks)
    for place, parameter in named_parameters(model, name):
        saved_name = place.replace(f".{name}.weight", ".weight")
        value = saved.pop(saved_name, None)
        if value is None or value.shape != parameter.shape:
            raise ValueError(f"the adapter in {folder} has no {saved_name} of shape {tuple(parameter.shape)}")
        _set(model, place, parameter, value.float())
    unread = sorted(key for key in saved if ".lora_" in key)
    if unread:
        raise ValueError(
            f"the adapter in {folder} has a tensor that no layer of the policy takes: {unread[0]}; {CONFIG} there says "
            "which layers have one (target_modules, layers_to_transform), so take both files from the same training"
        )
    return saved


_PARTS = ("lora_A", "lora_B")


def _config(model: PreTrainedModel, lora: LoRA, targets: list[str], blocks: Sequence[int] | None) -> Any:
    from peft import LoraConfig

    chosen = {}
    if blocks is not None:
        known = set(sharding.numbered_blocks(model).values())
        lists = {path.split(".")[-2] for path, module in model.named_modules() if module in known}
        chosen = {"layers_to_transform": list(blocks), "layers_pattern": sorted(lists)}
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, **chosen)  # type: ignore[arg-type]


def _set(model: PreTrainedModel, place: str, parameter: nn.Parameter, value: Tensor) -> None:
    """Gives a parameter its value, now or when the model gets its weights."""
    source = deferred.source_of(model)
    if source is not None:
        source.made[place] = value
    else:
        parameter.detach().copy_(value)


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is one of peft's `LoraLayer`."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def _layers(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if _is_adapted(module)}


def _use(model: nn.Module, names: list[str]) -> None:
    # peft's own set_adapter and enable_adapters also switch requires_grad, which the optimizer, and FSDP2 when it first
    # gathers a weight, take for final.
    for layer in _layers(model).values():
        layer._active_adapter = names
        layer._disable_adapters = not names


def _targets(model: PreTrainedModel, lora: LoRA, blocks: Sequence[int] | None) -> list[str]:
    """The last names of the layers that get an adapter."""
    numbered = sharding.numbered_blocks(model)
    chosen = sharding.blocks(model) if blocks is None else [numbered[number] for number in blocks]
    parts = (item for block in chosen for item in block.named_modules())
    inside = [path for path, part in parts if isinstance(part, nn.Linear | Conv1D) or _is_adapted(part)]
    known = sorted({path.rpartition(".")[2] for path in inside if ".lora_" not in path} - {"base_layer"})
    wrong = [target for target in lora.targets or () if target not in known]
    if wrong or not known:
        raise ValueError(
            f"lora.targets: {type(model).__name__} has no linear layer {wrong[0] if wrong else ''!r} in its blocks "
            f"(known: {', '.join(known) or 'none'})"
        )
    return list(lora.targets or known)
