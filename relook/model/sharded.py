"""Parameters that may lie in parts over several processes: read and written whole, under DDP, FSDP2 and DeepSpeed.

What reads or writes is collective: every process calls it, for the same parameters in the same order.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values as one tensor on the CPU; of a DeepSpeed one the float32 values that its optimizer steps."""
    if isinstance(parameter, DTensor):
        full: Tensor = parameter.full_tensor()
        return full.detach().cpu()
    if _stepped_by_deepspeed(parameter):
        values = _deepspeed("utils").safe_get_full_fp32_param(parameter)
        if values is not None:
            return torch.as_tensor(values).detach().cpu().view(full_shape(parameter))
    if hasattr(parameter, "ds_id"):
        with _deepspeed("zero").GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return parameter.detach().cpu()


def held(parameter: Tensor) -> Tensor:
    """The part of a parameter's values that lies in this process; it may be empty."""
    if isinstance(parameter, DTensor):
        local: Tensor = parameter.to_local()
        return local
    part: Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter
    # Of ZeRO-3: equal parts, the last of which are filled up with anything.
    start = part.numel() * dist.get_rank(getattr(parameter, "ds_process_group", None))
    return part.flatten()[: max(0, full_shape(parameter).numel() - start)]


def put(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter to values of its full shape."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            full = values.to(parameter.device, parameter.dtype)
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
        elif _stepped_by_deepspeed(parameter):
            _deepspeed("utils").safe_set_full_fp32_param(parameter, values)
        else:
            parameter.copy_(values)


def lay_down(model: nn.Module) -> None:
    """After a forward pass without a backward one: its parameters are those that the optimizer steps again.

    FSDP2 leaves its outermost unit whole then, and `zero_grad` would miss the gradients.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's `state_dict` with whole tensors on the CPU, as one process alone would have it."""
    state = optimizer.state_dict()
    each = {
        index: {name: whole(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": each}


def put_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load such a `state_dict`; of tensors in the shape of a sharded parameter each process takes its part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    each = {
        index: {name: _as_lies(v, parameters[index]) for name, v in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": each})


def _as_lies(value: Any, parameter: Tensor) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole of it: under ZeRO-3 what a process holds of a parameter is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _stepped_by_deepspeed(parameter: Tensor) -> bool:
    return parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"))


def _deepspeed(part: str) -> Any:
    return getattr(importlib.import_module("deepspeed"), part)
