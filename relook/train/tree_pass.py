"""The language model over packed trees: FlexAttention with a block mask on a GPU, SDPA with a dense mask elsewhere.

FlexAttention skips the blocks of the mask that are empty, so that many trees can share one long row without padding.
Layers are compiled for the first length of a row that they see, and where another one comes, once more for any length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from relook.errors import RecipeError, RelookError
from relook.tree import BLOCK, PREFIX, PackedTrees

BUDGET = 0.8  # on an H100 as fast as 1, with 10 GiB less in a LoRA step of 8 pairs at 7B
KINDS = 64  # of passes that one layer's code is compiled for: models of a process, with and without gradients, lengths


def resolve(how: str, device: str, sharded: bool = False, activation_memory_budget: float = BUDGET) -> str:
    """What "auto" means on a device: compiled on a GPU, or "flex" there if `sharded`; dense elsewhere.

    Raises:
        RecipeError: compiled layers of a model that FSDP or DeepSpeed takes apart, which swap their parameters; or a
            budget for layers that are not compiled.
    """
    if how == "compiled" and sharded:
        raise RecipeError("trunk_pass compiled does not go with FSDP or DeepSpeed.", "Set trunk_pass flex.")
    if how == "auto":
        how = "dense" if device != "cuda" else "flex" if sharded else "compiled"
    if how != "compiled" and activation_memory_budget != BUDGET:
        raise RecipeError(
            f"activation_memory_budget is of compiled layers, and trunk_pass is {how} here.",
            "Leave it out, or set gradient_checkpointing true.",
        )
    return how


def packs(how: str) -> bool:
    """Whether one long row of many trees is cheaper than a row for each."""
    return how != "dense"


def visible(packed: PackedTrees) -> tuple[Tensor, Tensor, Tensor]:
    """What `PackedTrees.mask` allows as two intervals: position q sees [start, fork) and [own, q], each (R, L).

    [start, fork) is the prefix of q's tree, [own, q] the part of its own branch that is behind it. Where q itself lies
    in a prefix, or is padding, the first interval is empty and the second one is all it sees.
    """
    tree, branch = packed.tree, packed.branch
    index = torch.arange(tree.shape[1], device=tree.device)
    begins = torch.ones_like(tree, dtype=torch.bool)
    begins[:, 1:] = (tree[:, 1:] != tree[:, :-1]) | (branch[:, 1:] != branch[:, :-1])
    latest = lambda where: torch.where(where, index, 0).cummax(1).values  # noqa: E731
    start, own = latest(begins & (branch == PREFIX)), latest(begins)
    fork = torch.where(branch > PREFIX, latest(begins & (branch == PREFIX + 1)), start)
    return start, fork, own


def block_mask(packed: PackedTrees) -> BlockMask:
    """The mask of `PackedTrees.mask` in FlexAttention's form, (R, 1, L, L); L must be a multiple of BLOCK.

    Made from intervals: torch's `create_block_mask` works through all L x L pairs, which takes 25 ms for 16,384
    positions on an H100, and compiled for some lengths it keeps ptxas busy for minutes.
    """
    start, fork, own = visible(packed)
    L = start.shape[1]
    index = torch.arange(L, device=start.device)
    low = torch.arange(0, L, BLOCK, device=start.device)
    high = low + BLOCK
    near = own[..., None] < high
    some = ((start[..., None] < high) & (fork[..., None] > low)) | (near & (index[:, None] >= low))
    every = ((start[..., None] <= low) & (fork[..., None] >= high)) | (
        (own[..., None] <= low) & (index[:, None] >= high - 1)
    )
    some, every = some.unflatten(1, (-1, BLOCK)).any(2), every.unflatten(1, (-1, BLOCK)).all(2)

    def allowed(r: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= start[r, q]) & (k < fork[r, q])) | ((k >= own[r, q]) & (k <= q))

    partly, full = _listed(some & ~every), _listed(every)
    return BlockMask.from_kv_blocks(*partly, *full, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(L, L))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """From which blocks are meant, (R, rows, columns), to how many they are and their columns first, with a head."""
    count = blocks.sum(-1, dtype=torch.int32)
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[:, None], columns[:, None]


class TreePass:
    """A language model that reads packed trees.

    Args:
        language_model: transformers' base language model, whose decoder layers are its `layers`.
        how: "compiled" (FlexAttention, layers compiled), "flex" (FlexAttention) or "dense" (SDPA).
        activation_memory_budget: share of a compiled layer's activations that are kept for its backward pass; torch
            computes the others again, those first that cost least time for their memory.
    """

    def __init__(self, language_model: Any, how: str, activation_memory_budget: float = BUDGET) -> None:
        self.packs = packs(how)
        self.budget = activation_memory_budget
        self.model = _with_compiled_layers(language_model) if how == "compiled" else language_model

    def __call__(self, embeds: Tensor, packed: PackedTrees) -> Tensor:
        """Last hidden states, (R, L, D), of embedded trees (R, L, D).

        Raises:
            RelookError: the layers cannot be compiled here.
        """
        mask = block_mask(packed) if self.packs else packed.mask()
        # Above torch's own limit of 8 kinds it would go on uncompiled, and only warn.
        limit = torch._dynamo.config.patch(recompile_limit=KINDS)
        budget = torch._functorch.config.patch(activation_memory_budget=self.budget)
        with limit, budget, _attention(self.model.config, "flex_attention" if self.packs else None):
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

    One layer is compiled, not the whole model: all layers share its code. On a CPU for each length anew: the C++ that
    torch 2.13 makes of FlexAttention for any length has errors.
    """
    shell = copy.copy(language_model)
    shell._modules = dict(language_model._modules)
    shell.layers = nn.ModuleList()
    dynamic = None if language_model.device.type == "cuda" else False
    shell.layers._modules = {
        n: torch.compile(layer, dynamic=dynamic) for n, layer in language_model.layers._modules.items()
    }
    return shell


@contextmanager
def _attention(config: Any, name: str | None) -> Iterator[None]:
    """transformers' attention of that name during a pass.

    With gradients it stays: where layers are recomputed, the backward pass runs them again.
    """
    before = config._attn_implementation
    config._attn_implementation = name or before
    try:
        yield
    finally:
        if not torch.is_grad_enabled():
            config._attn_implementation = before
