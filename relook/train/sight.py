"""What a frozen vision tower says of each image, computed once before a trunk trains behind it.

The tower is the same at every step, and LLaVA's features of an image, 1.2 MB in bf16, take less than its pixels. So no
step decodes an image, or runs the tower, again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relook import processes
from relook.console import progress, readable_size, say
from relook.data.ahead import ahead
from relook.data.encode import Example
from relook.data.images import ImageLoader
from relook.errors import RecipeError
from relook.model.trunks import feature_rows, feature_size, trunk_of
from relook.recipe import Recipe
from relook.train.plan import half_of_memory_takes
from relook.train.policy import Policy
from relook.tree import to_host

IMAGES = 32  # at a time


def keeps_features(recipe: Recipe, config: Any, count: int) -> bool:
    """Whether a recipe keeps vision features, where there is memory for them; `count` processes would each hold them.

    Raises:
        RecipeError: they are wanted of a model that cuts images into tiles, whose features the projector's rows are not
            yet.
    """
    wanted = recipe.feature_cache == "memory"
    if not recipe.sees_once or not (wanted or count == 1):
        return False
    if not trunk_of(config).projects_rows and wanted:
        raise RecipeError("feature_cache memory: this model cuts images into tiles.", "Set feature_cache off.")
    return trunk_of(config).projects_rows


@torch.no_grad()
def features_once(
    recipe: Recipe, policy: Policy, examples: Sequence[Example], images: ImageLoader
) -> dict[Path, Tensor] | None:
    """Vision features (M, V) by image; None where each step computes its own.

    That is where they are not to be kept (`keeps_features`), and under `feature_cache auto` where they would take more
    than half of the free memory.

    Raises:
        RecipeError: see `keeps_features`.
    """
    paths = list(dict.fromkeys(path for example in examples for path in example.images))
    if not paths or not keeps_features(recipe, policy.config, processes.count()):
        return None
    rows = feature_rows(policy.config, images.size(paths[0]))
    size = len(paths) * rows * feature_size(policy.config) * policy.dtype.itemsize
    if recipe.feature_cache == "auto" and not half_of_memory_takes(size):
        return None
    say(f"  vision features: {readable_size(size)} in memory")
    found: dict[Path, Tensor] = {}
    policy.eval()
    batches = [paths[start : start + IMAGES] for start in range(0, len(paths), IMAGES)]
    read = ahead(lambda batch: images.batch(batch)["pixel_values"], batches)
    with progress("vision features") as report:
        for batch, pixels in zip(batches, read, strict=True):
            features = policy.vision_features(pixels.to(policy.device))
            found.update(zip(batch, to_host(torch.stack(features).to(policy.dtype)), strict=True))
            report(len(found), len(paths))
    return found
