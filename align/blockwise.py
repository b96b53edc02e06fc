"""AdamW and Lion with 8-bit state that can be sharded: bitsandbytes' kernels on blocks that never cross a row.

bitsandbytes quantises the flattened state in blocks of 256 numbers with one scale (absmax) each. Where a block crosses
rows, a row shard cuts it, and the shards' states are no longer the whole's. Here every row has blocks of its own, so
state and scales are sharded by rows exactly as the parameter is: any number of ranks computes the same bits, and a
checkpoint moves between them. Rows that are a multiple of 256 long give the very numbers of bitsandbytes.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align import distributed, paged

BLOCK = 256
"""Numbers with one scale: what bitsandbytes' optimizer kernels are made for."""

SMALLEST = 4096
"""Parameters of fewer numbers keep 32-bit state, as in bitsandbytes."""

KERNELS = {"adamw": "adam", "lion": "lion"}
"""The names of bitsandbytes' kernels, whose weight decay is decoupled."""


class Blockwise(torch.optim.Optimizer):
    """AdamW or Lion. The state of groups with `bits: 8` takes a byte a number where that pays, of others four.

    Whether it pays is decided by the shape of the whole parameter: one with at least 4,096 numbers whose rows, filled
    up to whole blocks, are at most twice as long.

    Args:
        groups: Parameter groups; each may have `bits`, 8 or 32, beside `lr` and `weight_decay`.
        rule: Which optimizer.
        lr: Learning rate.
        betas: Decay of the moments; of Lion, of the update and of the moment.
        eps: Added to the root of the second moment, after the bias correction.
        paged: Large state is in CUDA managed memory (`align.paged`); parameters must be on a CUDA device.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        rule: Literal["adamw", "lion"],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        paged: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "bits": 8})
        self.rule, self.paged = rule, paged
        self._waiting: dict[nn.Parameter, dict[str, Any]] = {}
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient, each rank its own rows."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._take_over()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = self.new_state(parameter, group["bits"])
                state = self.state[parameter]
                state["step"] += 1
                if distributed.own_part(parameter).numel():
                    self._update(parameter, state, group)
        if self.paged:
            paged.settle()
        return loss

    def new_state(self, parameter: nn.Parameter, bits: int) -> dict[str, Any]:
        """The state before the first step: zeros, sharded as the parameter is."""
        moments = 2 if self.rule == "adamw" else 1
        state: dict[str, Any] = {"step": 0}
        for number in range(1, moments + 1):
            if bits == 8 and pays(parameter.shape):
                rows, blocks = parameter.shape[0], _blocks(parameter.shape)
                state[f"state{number}"] = self._moment(parameter, (rows, blocks * BLOCK), torch.uint8)
                state[f"absmax{number}"] = _zeros(parameter, (rows, blocks), torch.float32)
            else:
                state[f"state{number}"] = self._moment(parameter, parameter.shape, torch.float32)
        return state

    def _moment(self, parameter: nn.Parameter, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.paged and paged.pays(parameter):
            return paged.zeros(parameter, shape, dtype)
        return _zeros(parameter, shape, dtype)

    def _update(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        from bitsandbytes import functional  # takes a second, and says what it does not find

        assert parameter.grad is not None
        weights, grad = (distributed.own_part(tensor) for tensor in (parameter.detach(), parameter.grad))
        own = {name: distributed.own_part(value) for name, value in state.items() if name != "step"}
        (beta1, beta2), second = group["betas"], own.get("state2")
        paged.prefetch([value for name, value in own.items() if name.startswith("state")])
        if "absmax1" not in own:
            functional.optimizer_update_32bit(
                KERNELS[self.rule], grad.contiguous(), weights, own["state1"], beta1, group["eps"], state["step"],
                group["lr"], second, beta2, weight_decay=group["weight_decay"],
            )  # fmt: skip
            return
        columns = own["state1"].shape[1]
        filled = _filled(weights, columns)
        signed, unsigned = self._quantisation(weights.device)
        functional.optimizer_update_8bit_blockwise(
            KERNELS[self.rule], _filled(grad, columns), filled, own["state1"], second, beta1, beta2, 0.0, 0.0,
            group["eps"], state["step"], group["lr"], signed, unsigned if second is not None else None,
            own["absmax1"].view(-1), own["absmax2"].view(-1) if second is not None else None, group["weight_decay"],
        )  # fmt: skip
        if filled.data_ptr() != weights.data_ptr():
            weights.copy_(filled[:, : weights[0].numel()].view_as(weights))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a saved state over in its own number formats; torch would turn all of it into the parameter's."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, saved in state_dict["state"].items():
            device = parameters[number].device
            if self.paged:
                self._waiting[parameters[number]] = saved
                continue
            self.state[parameters[number]] = {
                name: value.to(device) if isinstance(value, Tensor) else value for name, value in saved.items()
            }

    def state_dict(self) -> dict[str, Any]:
        """The state, as every optimizer of torch gives it."""
        self._take_over()
        return super().state_dict()

    @torch.no_grad()
    def _take_over(self) -> None:
        """Fills paged state from what was loaded. Not when it is loaded: Lightning then moves all state to the GPU."""
        bits = {parameter: group["bits"] for group in self.param_groups for parameter in group["params"]}
        for parameter, saved in self._waiting.items():
            state = self.new_state(parameter, bits[parameter])
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    distributed.own_part(state[name]).copy_(distributed.own_part(value))
                else:
                    state[name] = value
            self.state[parameter] = state
        self._waiting = {}

    def _quantisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The 256 numbers that a byte can mean, for moments of either sign and for positive ones."""
        from bitsandbytes import functional

        if device not in self._maps:
            maps = (functional.create_dynamic_map(signed=True), functional.create_dynamic_map(signed=False))
            self._maps[device] = (maps[0].to(device), maps[1].to(device))
        return self._maps[device]


def pays(shape: torch.Size) -> bool:
    """Whether 8-bit state takes less memory than it costs: see `Blockwise`."""
    if len(shape) < 2 or shape.numel() < SMALLEST:
        return False
    return _blocks(shape) * BLOCK <= 2 * (shape.numel() // shape[0])


def _blocks(shape: torch.Size) -> int:
    """Blocks of a row."""
    return -(-(shape.numel() // shape[0]) // BLOCK)


def _zeros(parameter: nn.Parameter, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if not isinstance(parameter, DTensor):
        return torch.zeros(tuple(shape), dtype=dtype, device=parameter.device)
    return distributed.sharded_zeros(shape, dtype, mesh=parameter.device_mesh, device=parameter.device)


def _filled(tensor: Float[Tensor, "rows *_"], columns: int) -> Float[Tensor, "rows columns"]:
    """Rows filled up with zeros, whose state stays next to 0 and never decides a scale.

    Without a copy where there is nothing to fill.
    """
    flat = tensor.reshape(len(tensor), -1)
    return nn.functional.pad(flat, (0, columns - flat.shape[1])) if flat.shape[1] < columns else flat.contiguous()
