"""LoRA's products where layers are compiled: fewer and narrower than peft's, for the same numbers.

peft adds s B A x to each linear layer's output by itself (Hu et al. 2021, section 4.1; s = alpha / r). It multiplies by
s what is as wide as the output and, going back, the gradient of that, which is written once more for it. Here s stands
between A and B, on r numbers a position. And the A of layers that read the same states (queries, keys and values; gate
and up) are one matrix: one product instead of three, and two going back instead of six; but not where layers run again
in the backward pass, nor in passes that are not compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

ATTENTION_INPUTS, MLP_INPUTS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # each reads the same states
ADAPTER = "default"  # peft's name for the one that there is


class Beside:
    """The A of linear layers that read the same states, of one decoder layer.

    What is made for the others waits here while the decoder layer is traced; the code that comes of it has no state.
    """

    def __init__(self, layers: Sequence[nn.Module], decoder_layer: nn.Module) -> None:
        self.layers: list[Any] = list(layers)
        self.decoder_layer: Any = decoder_layer
        self.read: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}  # what was made of it, by the place of the layer that it is for

    @property
    def traced(self) -> bool:
        """Whether something can wait: not in a layer that runs again in the backward pass, for which dynamo takes no
        such notes."""
        again = self.decoder_layer.training and getattr(self.decoder_layer, "gradient_checkpointing", False)
        return torch.compiler.is_compiling() and not again

    def product(self, states: Tensor, place: int) -> Tensor:
        """A x for the layer in that place, (..., r). The first one that asks has it made for all."""
        if self.read is not states or place not in self.waiting:
            weights = [layer.lora_A[ADAPTER].weight for layer in self.layers]
            made = linear(states.to(weights[0].dtype), torch.cat(weights))
            self.read, self.waiting = states, dict(enumerate(made.split([len(weight) for weight in weights], -1)))
        mine = self.waiting.pop(place)
        if not self.waiting:
            self.read = None
        return mine


class NarrowLinear(Linear):
    """peft's linear layer with LoRA; how it computes is all that differs."""

    beside: Beside | None  # None where it reads its states alone
    place: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = self.active_adapters == [ADAPTER] and not (self.disable_adapters or self.merged or args or kwargs)
        if not plain:
            made: Tensor = super().forward(x, *args, **kwargs)
            return made
        result: Tensor = self.base_layer(x)
        if self.beside is not None and self.beside.traced:
            narrow = self.beside.product(x, self.place)
        else:
            A = self.lora_A[ADAPTER]
            narrow = A(self.lora_dropout[ADAPTER](x.to(A.weight.dtype)))
        wide: Tensor = self.lora_B[ADAPTER](narrow * self.scaling[ADAPTER])
        return (result + wide).to(result.dtype)


def narrow(layers: nn.Module) -> None:
    """Have peft's linear layers inside decoder layers compute so, in place; not quantised ones, nor variants as DoRA.

    With dropout each has a view of its own of what it reads, and none are side by side.
    """
    for layer in layers.children():
        for module in layer.modules():
            found: dict[str, Any] = {name: child for name, child in module.named_children() if _plain(child)}
            for child in found.values():
                child.__class__, child.beside = NarrowLinear, None
            for names in (ATTENTION_INPUTS, MLP_INPUTS):
                group = [found[name] for name in names if name in found]
                if len(group) > 1 and all(isinstance(child.lora_dropout[ADAPTER], nn.Identity) for child in group):
                    beside = Beside(group, layer)
                    for place, child in enumerate(group):
                        child.beside, child.place = beside, place


def _plain(module: Any) -> bool:
    one = type(module) is Linear and list(module.lora_A) == [ADAPTER] and not module.lora_variant
    return one and module.lora_B[ADAPTER].bias is None  # which peft scales, too
