"""Position numbers of token trees in models that number an image's positions by its rows and columns (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relook.data.packing import Tree
from relook.model.families import family_of


def row_positions(config: Any, ids: Sequence[int], grids: Sequence[Tensor | None]) -> Tensor | None:
    """Return a row's position numbers (3, positions) in a model with M-RoPE; None where they count the tokens.

    Args:
        config: the model's config.
        grids: `image_grid_thw` of each image, (1, 3), in the order of its placeholders.
    """
    base = family_of(config).base
    if not hasattr(base, "get_rope_index"):
        return None
    model = base.__new__(base)  # without parts: positions depend on the config alone
    nn.Module.__init__(model)
    model.config = config
    tokens = torch.tensor([ids])
    positions: Tensor = model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == config.image_token_id).long(),
        image_grid_thw=torch.cat([grid for grid in grids if grid is not None]) if grids else None,
        attention_mask=torch.ones_like(tokens),
    )[0]
    return positions[:, 0]


def tree_positions(
    config: Any, trees: Sequence[Tree], image_counts: Sequence[int], grids: Tensor | None
) -> list[Tensor] | None:
    """Return each tree's position numbers, as `row_positions`; every branch goes on behind the prefix.

    Args:
        image_counts: images of each tree.
        grids: `image_grid_thw` of all images, (I, 3), in order of trees; None without images.
    """
    trees_grids = [()] * len(trees) if grids is None else [grid.split(1) for grid in grids.split(list(image_counts))]
    positions = []
    for tree, image_grids in zip(trees, trees_grids, strict=True):
        # A branch's numbers depend on the prefix and not on its siblings, so each is numbered in a row of its own; the
        # prefix has the same numbers in all of these rows.
        rows = [row_positions(config, (*tree.prefix, *branch.ids), list(image_grids)) for branch in tree.branches]
        if rows[0] is None:
            return None
        start = len(tree.prefix)
        positions.append(torch.cat([rows[0][:, :start], *(row[:, start:] for row in rows if row is not None)], dim=1))
    return positions
