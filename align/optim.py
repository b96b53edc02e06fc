"""AdamW and its learning-rate schedule, described by one frozen record.

Betas default to InstructGPT's (0.9, 0.95, appendix C); the paper leaves epsilon, weight decay and clipping open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from align.blockwise import Blockwise

Name = Literal[
    "adamw", "adamw8bit", "lion", "lion8bit", "paged_adamw", "paged_adamw8bit", "paged_lion", "paged_lion8bit"
]  # fmt: skip

PAGED = "paged_"


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, warm-up, decay and clipping.

    Attributes:
        lr: Peak learning rate.
        name: "adamw", PyTorch's; "lion"; or "adamw8bit" and "lion8bit", whose moments take a byte a number. Embeddings
            and vectors keep 32 bits, as do small matrices (`align.blockwise`). With "paged_" before it, large moments
            leave the GPU for CPU memory while it is short of its own (`align.paged`).
        betas: Decay of the first and second moment.
        epsilon: Added after the bias correction, as PyTorch does.
        weight_decay: Decoupled; of matrices only.
        max_grad_norm: Each network's gradient is scaled down to this norm; 0 leaves it alone.
        schedule: After the warm-up: "constant", or "cosine" or "linear" to `final_fraction` at the last step.
        final_fraction: Of `lr`, where the decay ends.
        warmup_steps: Optimizer steps of linear rise from `warmup_from` to 1.
        warmup_from: Of `lr`, at the first step of the warm-up.
        max_nonfinite: A step whose gradient has a NaN or an infinity changes nothing; so many in a row end the run.
    """

    lr: float
    name: Name = "adamw"
    betas: Sequence[float] = (0.9, 0.95)
    epsilon: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_fraction: float = 0.1
    warmup_steps: int = 0
    warmup_from: float = 0.1
    max_nonfinite: int = 3

    @classmethod
    def config_errors(cls, arguments: dict[str, object]) -> list[str]:
        """What is wrong with these constructor arguments, in words."""
        limits = {"lr": 0.0, "epsilon": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "warmup_steps": 0}
        given = {name: arguments.get(name) for name in limits}
        errors = [
            f"{name}: got {value}, expected a number of at least {limits[name]}"
            for name, value in given.items()
            if isinstance(value, int | float) and value < limits[name]
        ]
        if isinstance(most := arguments.get("max_nonfinite"), int) and most < 1:
            errors.append(f"max_nonfinite: got {most}, expected at least 1, which ends the run at the first such step")
        name = arguments.get("name")
        if isinstance(name, str) and name.startswith(PAGED) and not torch.cuda.is_available():
            errors.append(
                f"name: got {name}, whose state is in CUDA managed memory, but this machine has no CUDA device; "
                f"expected one, or {name.removeprefix(PAGED)}"
            )
        betas = arguments.get("betas", (0.9, 0.95))
        if isinstance(betas, Sequence) and len(betas) != 2:
            errors.append(f"betas: got {len(betas)} numbers, expected 2, such as [0.9, 0.95]")
        elif isinstance(betas, Sequence) and not all(0 <= beta < 1 for beta in betas):
            errors.append(f"betas: got {list(betas)}, expected two numbers from 0 to below 1, such as [0.9, 0.95]")
        return errors

    def fraction(self, step: int, steps: int) -> float:
        """The share of the peak learning rate used for optimizer step `step` (0-based) of `steps`."""
        if step < self.warmup_steps:
            return self.warmup_from + (1.0 - self.warmup_from) * step / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        if self.schedule == "constant":
            return 1.0
        shape = (1.0 + cos(pi * done)) / 2.0 if self.schedule == "cosine" else 1.0 - done
        return self.final_fraction + (1.0 - self.final_fraction) * shape

    def build(
        self, networks: Mapping[str, nn.Module], *, steps: int, lrs: Mapping[str, float] | None = None
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """One optimizer for all networks, and its schedule, to be stepped once an optimizer step.

        Args:
            networks: By name. Every group of the optimizer carries its network's name under "name". A parameter of two
                networks is the later one's.
            steps: Optimizer steps of the whole run.
            lrs: Peak learning rates of networks that have their own.

        Raises:
            ValueError: Nothing in a network learns; or state shall be paged, but the weights are not on a CUDA device.
        """
        rule, bits, paged = parsed(self.name)
        groups = []
        for name, trained in learning(networks):
            shared = {"lr": (lrs or {}).get(name, self.lr), "name": name}
            if paged:
                self._check_pageable(name, trained)
            matrices = [p for p in trained if p.ndim >= 2]
            vectors = [p for p in trained if p.ndim < 2]
            own = [{"params": matrices, "weight_decay": self.weight_decay, **shared}]
            own += [{"params": vectors, "weight_decay": 0.0, **shared}] if vectors else []
            if bits == 8:
                own += _embeddings_apart(own, networks[name])
            groups += own
        first, second = self.betas
        optimizer: torch.optim.Optimizer
        if self.name == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(first, second), eps=self.epsilon, fused=True)
        else:
            groups = [{"bits": bits, **group} for group in groups]
            optimizer = Blockwise(groups, rule=rule, lr=self.lr, betas=(first, second), eps=self.epsilon, paged=paged)
        return optimizer, LambdaLR(optimizer, lambda step: self.fraction(step, steps))

    def _check_pageable(self, name: str, parameters: Sequence[nn.Parameter]) -> None:
        if elsewhere := {parameter.device.type for parameter in parameters} - {"cuda"}:
            raise ValueError(
                f"module.optim.name: got {self.name}, but the weights of {name} are on {elsewhere.pop()}, expected "
                "a CUDA device, as its state is in CUDA managed memory; set trainer.accelerator to gpu and no "
                f"cpu_offload, or take {self.name.removeprefix(PAGED)}"
            )


def learning(networks: Mapping[str, nn.Module]) -> list[tuple[str, list[nn.Parameter]]]:
    """What each network learns, in the networks' order; what lies in another network apart, which may be sharded."""
    taken: set[nn.Parameter] = set()
    found = []
    for name in reversed(list(networks)):
        network = networks[name]
        learned = [p for p in network.parameters() if p.requires_grad and p not in taken]
        inside = {p for module in network.modules() for p in module.parameters(recurse=False)}
        parts = [[p for p in learned if (p in inside) is within] for within in (False, True)]
        if not learned:
            raise ValueError(f"{name}: has no weight that learns; quantised weights are frozen, and learn by lora only")
        found += [(name, part) for part in parts if part]
        taken |= set(learned)
    return found[::-1]


def parsed(name: str) -> tuple[Literal["adamw", "lion"], int, bool]:
    """What the name of an optimizer says: the rule, the bits of a moment, and whether those are paged."""
    rest = name.removeprefix(PAGED)
    return ("lion" if rest.startswith("lion") else "adamw"), (8 if rest.endswith("8bit") else 32), rest != name


def _embeddings_apart(groups: list[dict[str, Any]], network: nn.Module) -> list[dict[str, Any]]:
    """Takes the embeddings out of groups, into groups of 32 bits: rare tokens move by few, large gradients.

    See "8-bit optimizers" in the documentation of bitsandbytes, on the stable embedding layer.
    """
    embeddings = {p for module in network.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    apart = []
    for group in groups:
        own = [parameter for parameter in group["params"] if parameter in embeddings]
        group["params"] = [parameter for parameter in group["params"] if parameter not in embeddings]
        if own:
            apart.append({**group, "params": own, "bits": 32})
    return apart
