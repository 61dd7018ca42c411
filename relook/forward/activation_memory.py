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

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """Make later computation wait until the copy stream has passed this event."""
        if self.stream is not None and event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


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
        self.layers_on_device, self.resident, self.copy_stream = layers_on_device, resident, copy_stream
        # By offloaded layer, its saved tensors by address, dtype and strides.
        self.saved: list[dict[Any, OffloadedTensor]] = [{} for _ in range(layers - layers_on_device)]
        self.copied_out: list[Any] = []  # events on the copy stream, one per layer
        self.copied_back: dict[int, Any] = {}
        self.backward_layer = layers  # the layer that the backward pass has reached
        copy_stream.wait_for(copy_stream.record())  # an earlier pass may have been interrupted with copies in flight

    def forward(self, number: int, layer: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run a layer's forward pass and offload what it saves; `number` counts from 0."""
        if number == 0:
            self.resident |= _addresses(kwargs.values())
        if number >= self.layers_on_device:  # the device is full: free the oldest layer once its copy is complete
            self.copy_stream.wait_for(self.copied_out[number - self.layers_on_device])
            self._release(number - self.layers_on_device)
        if number < len(self.saved):
            # torch compiles the same code with and without these hooks.
            with saved_tensors_hooks(partial(self._pack, self.saved[number]), self._unpack):
                output = layer(*args, **kwargs)
            self._copy_out(self.saved[number].values())
        else:
            output = layer(*args, **kwargs)
        # Prefetch from CPU memory as soon as the backward pass reaches this layer.
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: self._prefetch_for(number))
        return output

    def _pack(self, activations: dict[Any, OffloadedTensor], tensor: Tensor) -> OffloadedTensor | Tensor:
        if not self._is_offloadable(tensor):
            return tensor
        # Several operations may save the same activation: copy it once and count its uses.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in activations:
            # Only from and to pinned memory can a GPU copy while it computes.
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            activations[key] = OffloadedTensor(tensor, host)
        activations[key].uses += 1
        return activations[key]

    def _is_offloadable(self, tensor: Tensor) -> bool:
        """Return True if the tensor is a large activation whose strides survive the round trip."""
        # Parameters and tensor subclasses stay, and so do small tensors, whose copies would cost more than they free.
        if type(tensor) is not Tensor or tensor.nbytes < MIN_BYTES:
            return False
        # Views of weights or of a common mask hold memory that is needed anyway.
        if tensor.untyped_storage().data_ptr() in self.resident:
            return False
        return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()

    @torch.no_grad()
    def _copy_out(self, activations: Iterable[OffloadedTensor]) -> None:
        # `on_device` still holds the original: it is dropped by `_release` once the event below has passed.
        with self.copy_stream.after_compute():
            for activation in activations:
                assert activation.on_device is not None
                activation.on_host.copy_(activation.on_device, non_blocking=True)
        self.copied_out.append(self.copy_stream.record())

    def _release(self, layer: int) -> None:
        for activation in self.saved[layer].values():
            activation.on_device = None

    def _unpack(self, saved: OffloadedTensor | Tensor) -> Tensor:
        if not isinstance(saved, OffloadedTensor):
            return saved
        if saved.on_device is None:  # already freed: unpacked more often than it was saved
            self.copy_stream.wait_for(self._copy_back([saved]))
        # The last operation that saved it gets the only reference, so that its memory is freed right afterwards.
        tensor, saved.uses = saved.on_device, saved.uses - 1
        assert tensor is not None
        if saved.uses < 1:
            saved.on_device = None
        return tensor

    def _prefetch_for(self, layer: int) -> None:
        """Prefetch as many activations as the freed memory holds when a layer's backward pass begins."""
        while self.backward_layer > layer:
            # The layer above is done: free it, start one more copy, then wait for the copies of the current layer.
            if self.backward_layer < len(self.saved):
                self._release(self.backward_layer)
            self.backward_layer -= 1
            next_layer = self.backward_layer - self.layers_on_device + 1
            if 0 <= next_layer < len(self.saved):
                self.copied_back[next_layer] = self._copy_back(self.saved[next_layer].values())
            self.copy_stream.wait_for(self.copied_back.get(self.backward_layer))

    @torch.no_grad()
    def _copy_back(self, activations: Collection[OffloadedTensor]) -> Any:
        """Start copying tensors back to the device; return the event that marks the end of the copies."""
        for activation in activations:  # allocate on the compute stream, which also frees the memory
            activation.on_device = torch.empty_like(activation.on_host, device=self.copy_stream.device)
        with self.copy_stream.after_compute():
            for activation in activations:
                assert activation.on_device is not None
                activation.on_device.copy_(activation.on_host, non_blocking=True)
        return self.copy_stream.record()


def _addresses(values: Iterable[Any]) -> frozenset[int]:
    """Return the storage addresses of tensors, including tensors in tuples."""
    flat = [tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,))]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in flat if isinstance(tensor, Tensor))


class OffloadedLayer(nn.Module):
    """Decoder layer whose forward pass goes through the current `ActivationOffload`, if there is one."""

    def __init__(self, layer: nn.Module, number: int, current_offload: Callable[[], ActivationOffload | None]) -> None:
        super().__init__()
        self.layer, self.number, self.current_offload = layer, number, current_offload

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        offload = self.current_offload()
        if offload is not None:
            return offload.forward(self.number, self.layer, hidden_states, **kwargs)
        output: Tensor = self.layer(hidden_states, **kwargs)
        return output


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
