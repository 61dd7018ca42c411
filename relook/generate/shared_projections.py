"""Projections that read the same hidden states as one product: queries, keys and values; gate and up.

Each is a narrow product by itself, which at a few rows does not reach the memory's bandwidth. Their weights become
views of one matrix, so nothing is stored twice, and every other use of the layers, saving included, stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Group:
    """The linear layers of a group. While a decoder layer is traced, the first that is called computes for all."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        with torch.no_grad():
            weight = _joint_weight(layers)
            if weight is None:
                weight = torch.cat([layer.weight for layer in layers])
                for layer, part in zip(layers, weight.split(self.sizes), strict=True):
                    layer.weight.data = part
        self.weight = weight
        self.states: Tensor | None = None
        self.pending: dict[int, Tensor] = {}

    def product(self, states: Tensor, index: int) -> Tensor:
        """Return one layer's part of the joint product, without its bias."""
        if self.states is not states or index not in self.pending:
            parts = linear(states, self.weight).split(self.sizes, -1)
            self.states, self.pending = states, dict(enumerate(parts))
        part = self.pending.pop(index)
        if not self.pending:
            self.states = None
        return part


class SharedLinear(nn.Linear):
    """A linear layer of a group; it computes by itself wherever nothing is compiled."""

    group: Any
    index: int

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        product: Tensor = self.group.product(x, self.index)
        return product if self.bias is None else product + self.bias


def share_projections(layers: nn.Module) -> None:
    """Let plain linear layers that read the same states share one product where they are compiled, in place.

    Layers that share already stay as they are, unless their weights were replaced meanwhile.
    """
    for module in list(layers.modules()):
        for names in GROUPS:
            group: list[Any] = [getattr(module, name, None) for name in names]
            if not all(type(layer) in (nn.Linear, SharedLinear) for layer in group):
                continue  # quantised, or wrapped by an adapter
            if len({layer.weight.dtype for layer in group}) > 1 or _is_shared(group):
                continue
            shared = _Group(group)
            for index, layer in enumerate(group):
                layer.__class__, layer.group, layer.index = SharedLinear, shared, index


def _is_shared(layers: Sequence[Any]) -> bool:
    joint = _joint_weight(layers)
    return (
        joint is not None
        and all(type(layer) is SharedLinear and layer.group is layers[0].group for layer in layers)
        and joint.data_ptr() == layers[0].group.weight.data_ptr()
    )


def _joint_weight(layers: Sequence[nn.Linear]) -> Tensor | None:
    """Return one matrix over weights that lie one behind the other in memory; None where they do not.

    They do where the layers, or those of another model that shares its tensors, were in a group before.
    """
    first, end = layers[0].weight, layers[0].weight.data_ptr()
    for layer in layers:
        weight = layer.weight
        same_storage = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same_storage or not weight.is_contiguous() or weight.data_ptr() != end:
            return None
        end += weight.nbytes
    rows = sum(layer.out_features for layer in layers)
    return first.data.as_strided((rows, first.shape[1]), (first.shape[1], 1))
