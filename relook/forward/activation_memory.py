"""Activation offloading: activations wait in CPU memory between a decoder layer's forward and backward pass.

A GPU copies while it computes: 55 GB/s on an H200, which slows its matrix products by 1 %. The first layers'
activations wait longest, so their GPU memory is lent to later layers. Nothing is recomputed (as in torchtune's and
TRL's `activation_offloading`). The number of layers with activations on the GPU is fixed, whatever the copy speed:
computation waits for copies where it must.
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

MIN_BYTES = 2**20  # bytes; smaller tensors stay on the device
MIN_LAYERS = 2  # layers on the device: one computing, one being copied


def layers_on_device(layers: int, share: float) -> int:
    """Return how many layers keep activations on the device at a time if `share` of the layers is offloaded."""
    return min(layers, max(MIN_LAYERS, layers - math.ceil(share * layers)))


@dataclass(eq=False)
class OffloadedTensor:
    """Saved activation that is off the device until its layer's backward pass.

    Args:
        on_device: the original until it is copied out, later the prefetched tensor until it is used; else None.
        on_host: the copy in CPU memory.
        uses: number of operations that have saved the tensor and not unpacked it yet.
    """

    on_device: Tensor | None
    on_host: Tensor
    uses: int = 0


class CopyStream:
    """CUDA stream for copies that overlap with computation; a no-op on a CPU, where copies are synchronous."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_compute(self) -> AbstractContextManager[Any]:
        """Run the enclosed work on the copy stream, after all computation launched so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def record(self) -> torch.cuda.Event | None:
        return None if self.stream is None else self.stream.record_event()

    def wait_for(self, mark: torch.cuda.Event | None) -> None:
        """Make later computation wait until the copy stream has passed the event `mark`."""
        if self.stream is not None and mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)


class ActivationOffload:
    """Offloading schedule of one forward and backward pass: saved activations go to CPU memory and come back.

    The first `layers - layers_on_device` layers are offloaded. When a later layer starts, the oldest layer still on the
    device has been copied out. When a layer's backward pass starts, the layer after it is done, and one more layer is
    prefetched.

    Args:
        layers: number of decoder layers.
        layers_on_device: most layers with activations on the device at a time; see the function `layers_on_device`.
        resident: addresses of storages that stay, mainly weights; keyword arguments common to all layers stay, too.
        copy_stream: the stream that copies run on.
    """

    def __init__(self, layers: int, layers_on_device: int, resident: frozenset[int], copy_stream: CopyStream) -> None:
        self.kept, self.resident, self.lane = layers_on_device, resident, copy_stream
        self.saved: list[dict[Any, OffloadedTensor]] = [{} for _ in range(layers - layers_on_device)]
        self.copied_out: list[Any] = []  # events on the copy stream, one per layer
        self.copied_back: dict[int, Any] = {}
        self.backward_layer = layers  # the layer that the backward pass has reached
        copy_stream.wait_for(copy_stream.record())  # an earlier pass may have been interrupted with copies in flight

    def forward(self, number: int, layer: Callable[..., Tensor], *given: Any, **more: Any) -> Tensor:
        """Run a layer's forward pass and offload what it saves; `number` counts from 0."""
        if number == 0:
            self.resident |= _addresses(more.values())
        if number >= self.kept:  # the device is full: free the oldest layer once its copy is complete
            self.lane.wait_for(self.copied_out[number - self.kept])
            self._release(number - self.kept)
        if number < len(self.saved):
            # torch compiles the same code with and without these hooks.
            with saved_tensors_hooks(partial(self._pack, self.saved[number]), self._unpack):
                made = layer(*given, **more)
            self._copy_out(self.saved[number].values())
        else:
            made = layer(*given, **more)
        # Prefetch from CPU memory as soon as the backward pass reaches this layer.
        if made.grad_fn is not None:
            made.grad_fn.register_prehook(lambda _: self._prefetch_for(number))
        return made

    def _pack(self, held: dict[Any, OffloadedTensor], tensor: Tensor) -> OffloadedTensor | Tensor:
        if not self._is_offloadable(tensor):
            return tensor
        # Several operations may save the same activation: copy it once and count its uses.
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if same not in held:
            held[same] = OffloadedTensor(tensor, torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda))
        held[same].uses += 1
        return held[same]

    def _is_offloadable(self, tensor: Tensor) -> bool:
        """Return True if the tensor is a large activation whose strides survive the round trip."""
        if type(tensor) is not Tensor or tensor.nbytes < MIN_BYTES:
            return False
        if tensor.untyped_storage().data_ptr() in self.resident:
            return False
        return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()

    @torch.no_grad()
    def _copy_out(self, saved: Iterable[OffloadedTensor]) -> None:
        with self.lane.after_compute():
            for each in saved:
                assert each.on_device is not None
                each.on_host.copy_(each.on_device, non_blocking=True)
        self.copied_out.append(self.lane.record())

    def _release(self, layer: int) -> None:
        for saved in self.saved[layer].values():
            saved.on_device = None

    def _unpack(self, held: OffloadedTensor | Tensor) -> Tensor:
        if not isinstance(held, OffloadedTensor):
            return held
        if held.on_device is None:  # already freed: unpacked more often than it was saved
            self.lane.wait_for(self._copy_back([held]))
        tensor, held.uses = held.on_device, held.uses - 1
        assert tensor is not None
        if held.uses < 1:
            held.on_device = None
        return tensor

    def _prefetch_for(self, layer: int) -> None:
        """Prefetch as many activations as the freed memory holds when a layer's backward pass begins."""
        while self.backward_layer > layer:
            # The layer above is done: free it, start one more copy, then wait for the copies of the current layer.
            if self.backward_layer < len(self.saved):
                self._release(self.backward_layer)
            self.backward_layer -= 1
            coming = self.backward_layer - self.kept + 1
            if 0 <= coming < len(self.saved):
                self.copied_back[coming] = self._copy_back(self.saved[coming].values())
            self.lane.wait_for(self.copied_back.get(self.backward_layer))

    @torch.no_grad()
    def _copy_back(self, wanted: Collection[OffloadedTensor]) -> Any:
        """Start copying tensors back to the device; return the event that marks the end of the copies."""
        for saved in wanted:  # allocate on the compute stream, which also frees the memory
            saved.on_device = torch.empty_like(saved.on_host, device=self.lane.device)
        with self.lane.after_compute():
            for saved in wanted:
                assert saved.on_device is not None
                saved.on_device.copy_(saved.on_host, non_blocking=True)
        return self.lane.record()


def _addresses(given: Iterable[Any]) -> frozenset[int]:
    """Return the storage addresses of tensors, including tensors in tuples."""
    flat = [tensor for each in given for tensor in (each if isinstance(each, tuple) else (each,))]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in flat if isinstance(tensor, Tensor))


class OffloadedLayer(nn.Module):
    """Decoder layer whose forward pass goes through the current `ActivationOffload`, if there is one."""

    def __init__(self, layer: nn.Module, number: int, current_offload: Callable[[], ActivationOffload | None]) -> None:
        super().__init__()
        self.layer, self.number, self.watching = layer, number, current_offload

    def forward(self, hidden_states: Tensor, **more: Any) -> Tensor:
        offload = self.watching()
        if offload is not None:
            return offload.forward(self.number, self.layer, hidden_states, **more)
        made: Tensor = self.layer(hidden_states, **more)
        return made


# ----------------------------------------------------------------------------------------------------
# Activation checkpointing (recomputing layers in the backward pass), under the installed transformers' name for it.
#
# Recipes say `gradient_checkpointing`, the usual name in the field. transformers 5.23 calls it
# `activation_checkpointing` and warns about the old name, which is the only one that earlier versions know.

OLD, NEW = "gradient_checkpointing", "activation_checkpointing"
NAME = NEW if hasattr(PreTrainedModel, f"{NEW}_enable") else OLD


def rename_checkpointing_keys(training: Mapping[str, Any]) -> dict[str, Any]:
    """Rename checkpointing keys of TrainingArguments to the names that transformers does not warn about."""
    return {key.replace(OLD, NAME): value for key, value in training.items()}


def enable_checkpointing(model: PreTrainedModel, **kwargs: Any) -> None:
    """Enable recomputation of a model's layers; keyword arguments are those of the Trainer's call."""
    getattr(model, f"{NAME}_enable")(**kwargs)
    if not (kwargs.get(f"{NAME}_kwargs") or {}).get("use_reentrant"):
        # For reentrant checkpointing, transformers makes embeddings require gradients, even in the frozen vision tower.
        # Its layers would then be saved and recomputed for nothing.
        model.disable_input_require_grads()
