"""Parameters that may lie in parts over several processes: read and written whole, under DDP, FSDP2 and DeepSpeed.

All of it is collective: every process calls it, for the same parameters in the same order.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values as one tensor on the CPU; of a DeepSpeed one the float32 values that its optimizer steps."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor().cpu()
    if _stepped_by_deepspeed(parameter):
        values = _deepspeed("utils").safe_get_full_fp32_param(parameter)
        if values is not None:
            return torch.as_tensor(values).detach().cpu().view(full_shape(parameter))
    if hasattr(parameter, "ds_id"):
        with _deepspeed("zero").GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return parameter.detach().cpu()


def put(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter to values of its full shape."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            full = values.to(parameter.device, parameter.dtype)
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
        elif _stepped_by_deepspeed(parameter):
            _deepspeed("utils").safe_set_full_fp32_param(parameter, values)
        else:
            parameter.copy_(values)


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole of it: under ZeRO-3 what a process holds of a parameter is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _stepped_by_deepspeed(parameter: Tensor) -> bool:
    return parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"))


def _deepspeed(part: str) -> Any:
    return getattr(importlib.import_module("deepspeed"), part)
