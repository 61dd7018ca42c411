"""Activations that wait in the processor's memory between a decoder layer's forward and its backward pass.

A GPU copies beside its products: on an H200 55 GB/s, while they slow down by 1 %. So the first layers, whose
activations wait longest, lend their memory to the later ones, and nothing is computed again (as in torchtune's and
TRL's `activation_offloading`). How many layers' activations are on the GPU at a time is fixed, whatever the copies'
speed: products wait for them where they must.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

# ----------------------------------------------------------------------------------------------------

LEAST = 2**20  # bytes: what is smaller stays
AT_LEAST = 2  # layers on the device: one at work, one on its way


def staying(layers: int, share: float) -> int:
    """Of so many layers, how many have their activations on the device at a time if a share of them is to leave."""
    return min(layers, max(AT_LEAST, layers - math.ceil(share * layers)))


@dataclass(eq=False)
class Saved:
    """A tensor that its layer's backward pass needs and that leaves the device until then.

    Args:
        here: itself, until its copy is made; and what has come back, until it is used.
        host: its copy.
        uses: how many operations have saved it and not asked for it yet.
    """

    here: Tensor | None
    host: Tensor
    uses: int = 0


class Lane:
    """A stream for copies beside a device's products; nothing on a CPU, where copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follows(self) -> AbstractContextManager[Any]:
        """Inside, work on the lane begins when all that the device was given until now is done."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def mark(self) -> torch.cuda.Event | None:
        return None if self.stream is None else self.stream.record_event()

    def await_(self, mark: torch.cuda.Event | None) -> None:
        """What the device is given from now on begins when the lane has passed a mark."""
        if self.stream is not None and mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)


class Offload:
    """What one forward pass through the layers saves, and its way to the processor's memory and back.

    Of `layers - kept` first ones what is saved leaves. When a later layer begins, the oldest one that is still on the
    device has left; when a layer's backward pass begins, the layer after it needs nothing any more, and one more layer
    comes back.

    Args:
        kept: the most layers whose activations are on the device at a time, see `staying`.
        resident: addresses of storages that stay, weights above all; what all layers are given by name stays, too.
    """

    def __init__(self, layers: int, kept: int, resident: frozenset[int], lane: Lane) -> None:
        self.kept, self.resident, self.lane = kept, resident, lane
        self.leaving: list[dict[Any, Saved]] = [{} for _ in range(layers - kept)]
        self.left: list[Any] = []  # marks on the lane, of each layer
        self.back: dict[int, Any] = {}
        self.turn = layers  # of the backward pass
        lane.await_(lane.mark())  # a pass before this one may have ended early, with copies on their way

    def forward(self, number: int, layer: Callable[..., Tensor], *given: Any, **more: Any) -> Tensor:
        """A layer's forward pass; `number` counts from 0."""
        if number == 0:
            self.resident |= _addresses(more.values())
        if number >= self.kept:
            self.lane.await_(self.left[number - self.kept])
            self._forget(number - self.kept)
        if number < len(self.leaving):
            # torch compiles the same code with and without such hooks.
            with saved_tensors_hooks(partial(self._pack, self.leaving[number]), self._unpack):
                made = layer(*given, **more)
            self._leave(self.leaving[number].values())
        else:
            made = layer(*given, **more)
        if made.grad_fn is not None:
            made.grad_fn.register_prehook(lambda _: self._back_to(number))
        return made

    def _pack(self, held: dict[Any, Saved], tensor: Tensor) -> Saved | Tensor:
        if not self._leaves(tensor):
            return tensor
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if same not in held:
            held[same] = Saved(tensor, torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda))
        held[same].uses += 1
        return held[same]

    def _leaves(self, tensor: Tensor) -> bool:
        """Whether it is an activation, large, and will come back with the strides that it has."""
        if type(tensor) is not Tensor or tensor.nbytes < LEAST:
            return False
        if tensor.untyped_storage().data_ptr() in self.resident:
            return False
        return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()

    @torch.no_grad()
    def _leave(self, saved: Iterable[Saved]) -> None:
        with self.lane.follows():
            for each in saved:
                assert each.here is not None
                each.host.copy_(each.here, non_blocking=True)
        self.left.append(self.lane.mark())

    def _forget(self, layer: int) -> None:
        for saved in self.leaving[layer].values():
            saved.here = None

    def _unpack(self, held: Saved | Tensor) -> Tensor:
        if not isinstance(held, Saved):
            return held
        if held.here is None:  # asked for once more than it was saved
            self.lane.await_(self._fetch([held]))
        tensor, held.uses = held.here, held.uses - 1
        assert tensor is not None
        if held.uses < 1:
            held.here = None
        return tensor

    def _back_to(self, layer: int) -> None:
        """The backward pass of a layer begins: fetch what the freed memory takes."""
        while self.turn > layer:
            if self.turn < len(self.leaving):
                self._forget(self.turn)
            self.turn -= 1
            coming = self.turn - self.kept + 1
            if 0 <= coming < len(self.leaving):
                self.back[coming] = self._fetch(self.leaving[coming].values())
            self.lane.await_(self.back.get(self.turn))

    @torch.no_grad()
    def _fetch(self, wanted: Collection[Saved]) -> Any:
        """Begin to bring some back; returns a mark behind them."""
        for saved in wanted:  # of the memory of the device's own stream, which will give it free
            saved.here = torch.empty_like(saved.host, device=self.lane.device)
        with self.lane.follows():
            for saved in wanted:
                assert saved.here is not None
                saved.here.copy_(saved.host, non_blocking=True)
        return self.lane.mark()


def _addresses(given: Iterable[Any]) -> frozenset[int]:
    """Of the storages of tensors, also of those in tuples."""
    flat = [tensor for each in given for tensor in (each if isinstance(each, tuple) else (each,))]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in flat if isinstance(tensor, Tensor))


class Numbered(nn.Module):
    """A decoder layer of a stack whose pass may be watched by an `Offload`."""

    def __init__(self, layer: nn.Module, number: int, watching: Callable[[], Offload | None]) -> None:
        super().__init__()
        self.layer, self.number, self.watching = layer, number, watching

    def forward(self, hidden_states: Tensor, **more: Any) -> Tensor:
        offload = self.watching()
        if offload is not None:
            return offload.forward(self.number, self.layer, hidden_states, **more)
        made: Tensor = self.layer(hidden_states, **more)
        return made


# ----------------------------------------------------------------------------------------------------
# Recomputing a trunk's layers in the backward pass, under the name that the installed transformers has for it.
#
# Recipes say `gradient_checkpointing`, as every program of the field does. transformers 5.23 calls the same thing
# `activation_checkpointing` and warns of the old name, which versions before it alone know.

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
