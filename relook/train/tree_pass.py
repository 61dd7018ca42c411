"""The language model over packed trees: FlexAttention with a block mask on a GPU, SDPA with a dense mask elsewhere.

FlexAttention skips the blocks of the mask that are empty, so that many trees can share one long row without padding;
its kernels, and compiled layers, are made for one row length, so lengths are rounded up to a few (`tree.bucket`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from relook.errors import RelookError
from relook.tree import BLOCK, PREFIX, PackedTrees

LENGTHS = 64  # of rows that layers are compiled for: 16 in a doubling, see `tree.bucket`


def resolve(how: str, device: str) -> str:
    """What "auto" means on a device: compiled on a GPU, dense elsewhere."""
    return how if how != "auto" else "compiled" if device == "cuda" else "dense"


def packs(how: str) -> bool:
    """Whether one long row of many trees is cheaper than a row for each."""
    return how != "dense"


def block_mask(packed: PackedTrees) -> BlockMask:
    """The mask of `PackedTrees.mask` in FlexAttention's form, (R, 1, L, L)."""
    tree, branch = packed.tree, packed.branch
    R, L = tree.shape

    def allowed(r: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (branch[r, k] == PREFIX) | (branch[r, k] == branch[r, q])
        return (q >= k) & (tree[r, q] == tree[r, k]) & own

    create = _compiled_create() if tree.is_cuda else create_block_mask
    return create(allowed, R, None, L, L, device=tree.device, BLOCK_SIZE=BLOCK)


@cache
def _compiled_create() -> Any:
    """Compiled, it never holds L x L numbers: 1 ms instead of 25 for 16,384 positions on an H100."""
    return torch.compile(create_block_mask)


class TreePass:
    """A language model that reads packed trees.

    Args:
        language_model: transformers' base language model, whose decoder layers are its `layers`.
        how: "compiled" (FlexAttention, layers compiled), "flex" (FlexAttention) or "dense" (SDPA).
    """

    def __init__(self, language_model: Any, how: str) -> None:
        self.packs = packs(how)
        self.model = _with_compiled_layers(language_model) if how == "compiled" else language_model

    def __call__(self, embeds: Tensor, packed: PackedTrees) -> Tensor:
        """Last hidden states, (R, L, D), of embedded trees (R, L, D).

        Raises:
            RelookError: the layers cannot be compiled here.
        """
        mask = block_mask(packed) if self.packs else packed.mask()
        # Above torch's own limit of 8 lengths it would go on uncompiled, and only warn.
        limit = torch._dynamo.config.patch(recompile_limit=LENGTHS)
        with limit, _attention(self.model.config, "flex_attention" if self.packs else None):
            try:
                states: Tensor = self.model(
                    inputs_embeds=embeds, attention_mask=mask, position_ids=packed.positions, use_cache=False
                ).last_hidden_state
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                raise RelookError(
                    f"torch cannot compile the trunk here: {str(error).splitlines()[0]}",
                    "Install a C compiler (triton needs one), or set trunk_pass dense.",
                ) from error
        return states


def _with_compiled_layers(language_model: Any) -> Any:
    """The same modules under a shell of their own, so that `generate`, with its many lengths, stays uncompiled.

    One layer is compiled, not the whole model: all layers share its code.
    """
    shell = copy.copy(language_model)
    shell._modules = dict(language_model._modules)
    shell.layers = nn.ModuleList()
    shell.layers._modules = {
        n: torch.compile(layer, dynamic=False) for n, layer in language_model.layers._modules.items()
    }
    return shell


@contextmanager
def _attention(config: Any, name: str | None) -> Iterator[None]:
    """transformers' attention of that name, for a while."""
    before = config._attn_implementation
    config._attn_implementation = name or before
    try:
        yield
    finally:
        config._attn_implementation = before
