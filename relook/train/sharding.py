"""How FSDP2 and DeepSpeed are told about a policy.

DDP, FSDP2 and DeepSpeed come from transformers' Trainer and accelerate, by their usual keys. In all of them every
process first loads the whole model and makes its share of what is computed before training; then it is sharded.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from relook.errors import RecipeError


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
