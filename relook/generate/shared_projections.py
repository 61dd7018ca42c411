"""Projections that read the same states as one product: queries, keys and values; gate and up.

Each is a narrow product by itself, which at a few rows does not reach the memory's speed. Their weights become views
of one matrix, so nothing is stored twice, and every other use of the layers stays as it was.
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
            self.weight = torch.cat([layer.weight for layer in layers])
            for layer, part in zip(layers, self.weight.split(self.sizes), strict=True):
                layer.weight.data = part
        self.states: Tensor | None = None
        self.pending: dict[int, Tensor] = {}

    def product(self, states: Tensor, index: int) -> Tensor:
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
    """Let plain linear layers that read the same states share one product where they are compiled, in place."""
    for module in list(layers.modules()):
        for names in GROUPS:
            group: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in group) and len({layer.weight.dtype for layer in group}) == 1:
                shared = _Group(group)
                for index, layer in enumerate(group):
                    layer.__class__, layer.group, layer.index = SharedLinear, shared, index
