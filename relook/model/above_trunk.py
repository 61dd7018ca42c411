"""What stands above a trunk, by itself: post decoder and lm_head. Runs on cached trunk states need nothing else."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from relook.errors import CheckpointError
from relook.model.source import ModelSource

ABOVE = ("model.post_decoder.", "lm_head.")
PROJECTOR = "model.multi_modal_projector."  # small, and a post decoder may start from it
EMBEDDINGS = "model.language_model.embed_tokens.weight"


class AboveTrunk(nn.Module):
    """Post decoder, if any, and lm_head of a model, which it shares; parameters have the names that they have there."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.model = nn.Module()
        if hasattr(model.model, "post_decoder"):
            self.model.post_decoder = model.model.post_decoder
        self.lm_head = model.lm_head

    @property
    def device(self) -> torch.device:
        found: torch.device = self.lm_head.weight.device
        return found


def without_trunk(source: ModelSource, dtype: torch.dtype, device: str | torch.device) -> Any:
    """A model with weights for what stands above its trunk, and for its projector; the trunk's have none ("meta")."""
    with torch.device("meta"):
        model: Any = source.model_class(copy.deepcopy(source.config)).to(dtype)
    tensors = source.read(*ABOVE, PROJECTOR)
    if "lm_head.weight" not in tensors:  # it is tied to the embeddings, which are not there
        tensors["lm_head.weight"] = source.read(EMBEDDINGS)[EMBEDDINGS]
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    read = {name: t.to(device, dtype) for name, t in tensors.items()}
    model.load_state_dict(read, strict=False, assign=True)
    lacking = [n for n, p in model.named_parameters() if p.is_meta and n.startswith((*ABOVE, PROJECTOR))]
    if lacking:
        raise CheckpointError(f"{source.path} has no {lacking[0]}.", "Check that the folder is complete.")
    return model
