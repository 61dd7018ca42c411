"""Position numbers of token trees in models that number an image's positions by its rows and columns (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relook.data.packing import Tree
from relook.model.families import family_of


def tree_positions(config: Any, trees: Sequence[Tree], image_counts: Sequence[int], grids: Any) -> list[Tensor] | None:
    """Return each tree's position numbers (3, positions) in a model with M-RoPE; None where they are one for each token.

    Every branch goes on behind the prefix, as in a row of its own.

    Args:
        config: the model's config.
        image_counts: images of each tree.
        grids: `image_grid_thw` of all images, (I, 3), in order of trees; None without images.
    """
    base = family_of(config).base
    if not hasattr(base, "get_rope_index"):
        return None
    model = base.__new__(base)  # without parts: positions depend on the config alone
    nn.Module.__init__(model)
    model.config = config

    def row(ids: tuple[int, ...], grid: Tensor | None) -> Tensor:
        tokens = torch.tensor([ids])
        is_image = (tokens == config.image_token_id).long()
        return model.get_rope_index(
            tokens, mm_token_type_ids=is_image, image_grid_thw=grid, attention_mask=torch.ones_like(tokens)
        )[0][:, 0]

    positions = []
    per_tree = [None] * len(trees) if grids is None else grids.split(list(image_counts))
    for tree, grid in zip(trees, per_tree, strict=True):
        rows = [row((*tree.prefix, *branch.ids), grid) for branch in tree.branches]
        start = len(tree.prefix)
        positions.append(torch.cat([rows[0][:, :start], *(numbers[:, start:] for numbers in rows)], dim=1))
    return positions
