"""Recomputing a trunk's layers in the backward pass, under the name that the installed transformers has for it.

Recipes say `gradient_checkpointing`, as every program of the field does. transformers 5.23 calls the same thing
`activation_checkpointing` and warns of the old name, which versions before it alone know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

OLD, NEW = "gradient_checkpointing", "activation_checkpointing"
NAME = NEW if hasattr(PreTrainedModel, f"{NEW}_enable") else OLD


def renamed(training: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of TrainingArguments under the names that it does not warn of."""
    return {key.replace(OLD, NAME): value for key, value in training.items()}


def enable(model: PreTrainedModel, **kwargs: Any) -> None:
    """Let a model recompute its layers; keyword arguments are those of the Trainer's call."""
    getattr(model, f"{NAME}_enable")(**kwargs)
    if not (kwargs.get(f"{NAME}_kwargs") or {}).get("use_reentrant"):
        # For reentrant recomputation transformers lets embeddings require gradients. Those of the frozen vision tower,
        # too: its layers would be kept and computed again for nothing.
        model.disable_input_require_grads()
