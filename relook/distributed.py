"""Several processes, as torchrun and accelerate start them: which one this is, and waiting for the others."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from relook.errors import RecipeError, RelookError

# ----------------------------------------------------------------------------------------------------

T = TypeVar("T")
# The slowest process may have hours more to do. One that dies needs no time-out: its launcher ends the others.
PATIENCE = timedelta(hours=24)


def _state() -> PartialState:
    """The one that the Trainer made, or a new one; without being told, it does not look for other processes on CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def rank() -> int:
    """This process's number."""
    return int(_state().process_index)


def count() -> int:
    """How many processes there are."""
    return int(_state().num_processes)


def device() -> Any:
    """Where this process's collectives work."""
    return _state().device


def first() -> bool:
    """Whether this process writes what all share."""
    return rank() == 0


def mine(values: Sequence[T]) -> Sequence[T]:
    """This process's share: one value in as many as there are processes, so none is left over."""
    return values[rank() :: count()]


def wait(what: str) -> None:
    """Until every process has come this far.

    Args:
        what: is waited for, as the error says it.

    Raises:
        RelookError: one of them has not come within `PATIENCE`.
    """
    if count() == 1:
        return
    try:
        torch.distributed.monitored_barrier(_group(), PATIENCE, wait_all_ranks=True)
    except RuntimeError as error:
        raise RelookError(
            f"Process {rank()} waited up to {PATIENCE} for {what}, in vain: {str(error).splitlines()[0]}.",
            "See what the other processes said last.",
        ) from None


@cache
def _group() -> Any:
    """NCCL, which the default group has on GPUs, ends a process that waits longer than its collectives may take."""
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def of_the_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in all of them."""
    found: list[Any] = [make() if first() else None]
    value: T = broadcast_object_list(found)[0]
    return value


def shared(values: Sequence[T], make: Callable[[Sequence[T]], list[Any]], what: str) -> list[Any]:
    """`make` over some values, each process over its share of them; the outcomes of all, in order, in every process.

    Args:
        what: is made, as `wait` says it.
    """
    made = list(zip(mine(range(len(values))), make(mine(values)), strict=True))
    wait(what)
    found = dict(gathered(made))
    return [found[i] for i in range(len(values))]


def gathered(values: list[T]) -> list[T]:
    """The values of all processes, in every one of them."""
    found: list[T] = gather_object(values)
    return found


# ----------------------------------------------------------------------------------------------------
# Parameters that may lie in parts over several processes: read and written whole, under DDP, FSDP2 and DeepSpeed.
#
# What reads or writes is collective: every process calls it, for the same parameters in the same order.


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


# ----------------------------------------------------------------------------------------------------
# How FSDP2 and DeepSpeed are told about a policy.
#
# DDP, FSDP2 and DeepSpeed come from transformers' Trainer and accelerate, by their usual keys. In all of them every
# process first loads the whole model and makes its share of what is computed before training; then it is sharded.


def shard(training: Mapping[str, Any]) -> bool:
    """Whether FSDP or DeepSpeed will take the model apart, by a recipe's keys or by accelerate's launcher."""
    launched = [os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")]
    return any(launched) or bool(training.get("fsdp") or training.get("deepspeed"))


# --- DeepSpeed


def deepspeed_names() -> list[str]:
    """The DeepSpeed settings that ship with relook."""
    files = (resources.files("relook") / "deepspeed").iterdir()
    return sorted(item.name.removesuffix(".json") for item in files if item.name.endswith(".json"))


def deepspeed_config(given: Any) -> Any:
    """What a recipe's `deepspeed` stands for: the path of a file that ships with relook, or what it says itself.

    Raises:
        RecipeError: DeepSpeed is not installed, or there is no such file.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError("The recipe sets deepspeed, which is not installed.", "Run: pip install 'relook[deepspeed]'")
    if not isinstance(given, str) or Path(given).is_file():
        return given
    if given not in deepspeed_names():
        raise RecipeError(
            f"There is no DeepSpeed file {given!r}.", f"Give its path or one of {', '.join(deepspeed_names())}."
        )
    return str(resources.files("relook") / "deepspeed" / f"{given}.json")


# --- FSDP2


def prepare_fsdp(accelerator: Any, arguments: dict[str, Any] | None, dtype: torch.dtype) -> bool:
    """Make accelerate's FSDP2 fit a policy, whether the recipe or `accelerate launch` asks for it.

    accelerate's own mixed precision would round the log-probs of the policy to bfloat16, and reduce gradients in it.

    Args:
        arguments: of accelerate's plugin, as the Trainer makes them of `fsdp_config`; None where it is not asked for.

    Returns:
        Whether the policy will be sharded.

    Raises:
        RecipeError: FSDP's first version, or loading in the first process only.
    """
    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.num_processes > 1
    if plugin is None and (arguments is not None or launched):
        # accelerate ignores FSDP where processes have no GPUs: there it would be DDP under another name.
        plugin = state.fsdp_plugin = FullyShardedDataParallelPlugin(**(arguments or {}))
        state.distributed_type = DistributedType.FSDP
    if plugin is None:
        return False
    if plugin.fsdp_version != 2:
        raise RecipeError("FSDP's first version is not supported.", "Set fsdp_version 2.")
    if plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "fsdp_cpu_ram_efficient_loading leaves the other processes without a model to compute references with.",
            "Set it to false.",
        )
    if plugin.activation_checkpointing:
        raise RecipeError("FSDP's activation_checkpointing is not supported.", "Set gradient_checkpointing instead.")
    low = None if dtype == torch.float32 else dtype
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    return True
