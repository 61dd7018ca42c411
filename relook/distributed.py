"""Ranks, barriers, collectives and sharded parameters, under torchrun and accelerate (DDP, FSDP2, DeepSpeed)."""

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
# The slowest process may need hours longer. A dead process needs no timeout: its launcher ends the others.
TIMEOUT = timedelta(hours=24)


def _state() -> PartialState:
    """Return the Trainer's PartialState, or a new one. `cpu` must be set, or it ignores other processes on CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def rank() -> int:
    """Return the rank of this process."""
    return int(_state().process_index)


def world_size() -> int:
    """Return the number of processes."""
    return int(_state().num_processes)


def collective_device() -> Any:
    """Return the device that this process's collectives run on."""
    return _state().device


def is_main() -> bool:
    """Return True if this process (rank 0) writes the files that all processes share."""
    return rank() == 0


def shard(values: Sequence[T]) -> Sequence[T]:
    """Return this process's share: every `world_size()`-th value from its rank on, so that none is left over."""
    return values[rank() :: world_size()]


def barrier(awaited: str) -> None:
    """Wait until every process has reached this point.

    Args:
        awaited: what is waited for, for the error message.

    Raises:
        RelookError: a process did not arrive within `TIMEOUT`.
    """
    if world_size() == 1:
        return
    # Unlike `barrier`, it names the ranks that are missing; it needs gloo.
    try:
        torch.distributed.monitored_barrier(_group(), TIMEOUT, wait_all_ranks=True)
    except RuntimeError as error:
        raise RelookError(
            f"Process {rank()} waited up to {TIMEOUT} for {awaited}, in vain: {str(error).splitlines()[0]}.",
            "See the last messages of the other processes.",
        ) from None


@cache
def _group() -> Any:
    """Return a gloo group: NCCL, the default on GPUs, kills a process that waits longer than its own timeout."""
    return torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)


def broadcast_from_main(make: Callable[[], T]) -> T:
    """Call `make` in the first process and return its result in all of them."""
    # accelerate fills the list in place in the other processes.
    shared: list[Any] = [make() if is_main() else None]
    value: T = broadcast_object_list(shared)[0]
    return value


def map_sharded(values: Sequence[T], make: Callable[[Sequence[T]], list[Any]], awaited: str) -> list[Any]:
    """Apply `make` to each process's share of `values`; return all results, in order, in every process.

    Args:
        awaited: what is made, for the error message of `barrier`.
    """
    # Pair each result with its index: the shares interleave, and are gathered rank by rank.
    local_results = list(zip(shard(range(len(values))), make(shard(values)), strict=True))
    barrier(awaited)
    by_index = dict(all_gather_objects(local_results))
    return [by_index[i] for i in range(len(values))]


def all_gather_objects(values: list[T]) -> list[T]:
    """Gather the values of all processes in every process."""
    gathered: list[T] = gather_object(values)
    return gathered


# ----------------------------------------------------------------------------------------------------
# Parameters that may be sharded over several processes: read and written whole, under DDP, FSDP2 and DeepSpeed.
#
# Reads and writes are collective: every process makes the same calls, for the same parameters in the same order.


def mean(value: Tensor) -> Tensor:
    """Compute a tensor's mean over all processes."""
    if world_size() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= world_size()
    return value


def gather_full(parameter: Tensor) -> Tensor:
    """Gather a whole parameter as one CPU tensor; under DeepSpeed, the float32 values that its optimizer updates."""
    if isinstance(parameter, DTensor):  # FSDP2
        full: Tensor = parameter.full_tensor()
        return full.detach().cpu()
    if _stepped_by_deepspeed(parameter):
        values = _deepspeed("utils").safe_get_full_fp32_param(parameter)
        if values is not None:
            return torch.as_tensor(values).detach().cpu().view(full_shape(parameter))
    if hasattr(parameter, "ds_id"):  # frozen under ZeRO-3: sharded, but without an optimizer's copy
        with _deepspeed("zero").GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return parameter.detach().cpu()


def local_shard(parameter: Tensor) -> Tensor:
    """Return the shard of a parameter that this process holds; it may be empty."""
    if isinstance(parameter, DTensor):
        local: Tensor = parameter.to_local()
        return local
    part: Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:  # not sharded
        return parameter
    # ZeRO-3 shards are of equal size; arbitrary values pad the last ones.
    start = part.numel() * dist.get_rank(getattr(parameter, "ds_process_group", None))
    return part.flatten()[: max(0, full_shape(parameter).numel() - start)]


def set_full(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, sharded or not, to values of its full shape."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            # Every process has the full values, so none is sent: each keeps its own shard.
            full = values.to(parameter.device, parameter.dtype)
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
        elif _stepped_by_deepspeed(parameter):
            _deepspeed("utils").safe_set_full_fp32_param(parameter, values)
        else:
            parameter.copy_(values)


def reshard(model: nn.Module) -> None:
    """Reshard a model after a forward pass without a backward pass, so that the optimizer's parameters are back.

    FSDP2 leaves its outermost unit unsharded then, and `zero_grad` would miss the gradients.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def gather_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's `state_dict` with whole tensors on the CPU, as a single process would have it."""
    # Indexed by position, not by name as torch's get_optimizer_state_dict: a checkpoint then suits one process as well.
    state = optimizer.state_dict()
    full_state = {
        index: {name: gather_full(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": full_state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a `state_dict` of whole tensors; each process takes its shard of those shaped like a sharded parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    local_state = {
        index: {name: _to_local_layout(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": local_state})


def _to_local_layout(value: Any, parameter: Tensor) -> Any:
    # Moments have the parameter's shape; a step counter is a scalar, and stays whole.
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the unsharded shape of a parameter: under ZeRO-3 the tensor that a process holds is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _stepped_by_deepspeed(parameter: Tensor) -> bool:
    # DeepSpeed marks parameters with ds_id under ZeRO-3, and with _hp_mapping below it.
    return parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"))


def _deepspeed(part: str) -> Any:
    return getattr(importlib.import_module("deepspeed"), part)


# ----------------------------------------------------------------------------------------------------
# Configuring FSDP2 and DeepSpeed for a policy.
#
# DDP, FSDP2 and DeepSpeed come from transformers' Trainer and accelerate, by their usual keys. Every process first
# loads the whole model and computes its share of the work before training; then the model is sharded.


def is_sharded(training: Mapping[str, Any]) -> bool:
    """Return True if FSDP or DeepSpeed will shard the model, set by a recipe's keys or accelerate's launcher."""
    # The environment variables are those that `accelerate launch` sets for its processes.
    launched = [os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")]
    return any(launched) or bool(training.get("fsdp") or training.get("deepspeed"))


# --- DeepSpeed


def deepspeed_names() -> list[str]:
    """List the names of the DeepSpeed configurations that ship with relook."""
    files = (resources.files("relook") / "deepspeed").iterdir()
    return sorted(path.name.removesuffix(".json") for path in files if path.name.endswith(".json"))


def deepspeed_config(config: Any) -> Any:
    """Return the DeepSpeed configuration of a recipe: the path of a file that ships with relook, or `config` itself.

    Raises:
        RecipeError: DeepSpeed is not installed, or there is no such file.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError("The recipe sets deepspeed, which is not installed.", "Run: pip install 'relook[deepspeed]'")
    if not isinstance(config, str) or Path(config).is_file():
        return config
    if config not in deepspeed_names():
        raise RecipeError(
            f"There is no DeepSpeed file {config!r}.", f"Give its path or one of {', '.join(deepspeed_names())}."
        )
    return str(resources.files("relook") / "deepspeed" / f"{config}.json")


# --- FSDP2


def prepare_fsdp(accelerator: Any, arguments: dict[str, Any] | None, dtype: torch.dtype) -> bool:
    """Configure accelerate's FSDP2 for a policy, whether the recipe or `accelerate launch` asks for it.

    accelerate's own mixed precision would round the log-probs of the policy to bfloat16, and reduce gradients in it.

    Args:
        arguments: keyword arguments of accelerate's plugin, as the Trainer builds them from `fsdp_config`; None if the
            recipe does not ask for FSDP.

    Returns:
        True if the policy will be sharded.

    Raises:
        RecipeError: FSDP1, loading in the first process only, or FSDP's own activation checkpointing is set.
    """
    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.num_processes > 1
    if plugin is None and (arguments is not None or launched):
        # accelerate ignores FSDP for processes without GPUs, and would silently run DDP.
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
    # Parameters are gathered in the low type and gradients summed in float32; what goes in and out is left as it is.
    low = None if dtype == torch.float32 else dtype
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    return True
