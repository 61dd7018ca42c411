"""Policy that maps a batch of trees to the log-prob of every supervised token.

Data flow through the model: trunk -> post decoder -> lm_head -> log-probs. If the trunk is frozen, its part can be
computed beforehand (`TrunkStates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from relook.data.packing import PackedTrees, Targets, pin_memory, to_device
from relook.forward import activation_memory
from relook.forward.packed_attention import BUDGET, PackedTrunk, has_sparse_last_mlp, resolve_trunk_pass
from relook.model.families import connector, image_features, language_model, position_rows, vision_tower
from relook.model.modeling_relook import reads_tower, vision_features
from relook.model.post_decoder import FlatLayout, PostDecoder

# ----------------------------------------------------------------------------------------------------
# Log-probs from logits without a second copy of the logits, which are the largest tensors of a step.

ROWS_IN_FLOAT32 = 1024  # rows upcast at a time where operations are not fused


class GatherLogProbs(torch.autograd.Function):
    """Autograd function for log softmax(logits)[id] of each row, (N,) float32.

    The logits (N, vocabulary) may have any floating-point dtype.

    The backward pass needs only the original logits and one number per row. With plain operations, bf16 logits of
    16,000 targets and 32,000 tokens, 1 GB, would need two more float32 copies of 2 GB each.

    The gradient of log p_i by logit j is g * ([j = i] - p_j).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, compiled: bool) -> Tensor:
        # log softmax(z)_i = z_i - logsumexp(z). Only the logsumexp (N,) is new; the logits exist anyway.
        total = _map_rows(_logsumexp, compiled, logits)
        ctx.save_for_backward(logits, ids, total)
        ctx.compiled = compiled
        # Pick the logit of each row's id, (N, vocabulary) -> (N, 1) -> (N,), before anything is upcast.
        return upcast(logits.gather(-1, ids[:, None]).squeeze(-1)) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, total = ctx.saved_tensors
        # One gradient for each input of `forward`: ids and `compiled` have none.
        return _map_rows(_logit_gradients, ctx.compiled, logits, ids, total, gradient), None, None


def _map_rows(function: Callable[..., Tensor], compiled: bool, *tensors: Tensor) -> Tensor:
    """Apply `function` to tensors with equal numbers of rows: compiled in one pass over memory, or in row chunks."""
    if compiled:
        output: Tensor = torch.compile(function)(*tensors)
        return output
    # Eager operations write their float32 intermediates to memory, so limit them to a few rows at a time.
    parts = zip(*(tensor.split(ROWS_IN_FLOAT32) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def _logsumexp(logits: Tensor) -> Tensor:
    return upcast(logits).logsumexp(-1)


def _logit_gradients(logits: Tensor, ids: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
    # g * ([j = id] - softmax_j), with the softmax rebuilt from the saved logsumexp. All are (N, vocabulary).
    is_target = torch.arange(logits.shape[-1], device=logits.device) == ids[:, None]
    gradients = is_target.to(total.dtype) - (upcast(logits) - total[:, None]).exp()
    # The gradient has the logits' dtype, as autograd requires; it is rounded once, here.
    return (gradients * gradient[:, None]).to(logits.dtype)


def upcast(values: Tensor) -> Tensor:
    """Upcast to float32; float64 stays as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def gather_log_probs(logits: Tensor, ids: Tensor, compiled: bool = False) -> Tensor:
    """Compute log softmax(logits)[id] for each row, (N,) float32.

    Args:
        logits: (N, vocabulary), in any floating-point dtype.
        ids: token ids, (N,).
        compiled: fuse each pass into one kernel that reads the logits once; takes less than half the time on a GPU.
    """
    result: Tensor = GatherLogProbs.apply(logits, ids, compiled)
    return result


# ----------------------------------------------------------------------------------------------------

LOGITS_BYTES = 2**31  # of float32 logits at a time: about 16,000 targets with a vocabulary of 32,000


@dataclass(frozen=True)
class LiveBatch:
    """Packed trees and the model inputs for their images, in order of trees; `image_counts` has the images per tree."""

    packed: PackedTrees
    pixel_values: Tensor | None  # (I, 3, H, W), (I, tiles, 3, H, W), or flat patches of all images (patches, values)
    image_counts: list[int]
    image_inputs: dict[str, Tensor] = field(default_factory=dict)  # what the tower takes beside pixels: sizes or grids
    # Of each image, where the tower is not run (see `KeptImage`): its states (M, V), and what image positions get.
    tower: list[Tensor] | None = None
    projected: list[Tensor] | None = None
    image_rows: list[int] | None = None  # rows of pixels of each image: 1, its tiles or its patches

    def to(self, device: Any, non_blocking: bool = False) -> LiveBatch:
        return to_device(self, device)

    def pin_memory(self) -> LiveBatch:
        return pin_memory(self)


@dataclass(frozen=True)
class TrunkStates:
    """Trunk outputs for a batch of trees: everything that the post decoder and lm_head need."""

    states: Tensor  # (T, S, D) last hidden states at the kept positions
    features: list[Tensor] | None  # (M, V) vision features per image, if a post decoder reads them
    image_counts: list[int]
    targets: Targets

    def to(self, device: Any, non_blocking: bool = False) -> TrunkStates:
        return to_device(self, device)

    def pin_memory(self) -> TrunkStates:
        return pin_memory(self)


class Policy(nn.Module):
    """Model as training sees it: trees in, log-probs out.

    Args:
        model: a transformers model, possibly wrapped by peft; the wrapper itself is bypassed, its layers are not. For
            cached trunk states, a `HeadModel`.
        dtype: dtype of matrix products; trained tensors stay in float32.
        trunk_pass: how the language model reads packed trees; see `PackedTrunk`.
        sharded: True if FSDP or DeepSpeed will shard the model.
        activation_memory_budget: share of activations that compiled layers keep; see `PackedTrunk`.
        activation_offloading: share of layers that are offloaded; see `PackedTrunk`.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype = torch.float32,
        trunk_pass: str = "auto",
        sharded: bool = False,
        activation_memory_budget: float = BUDGET,
        activation_offloading: float = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.sharded = sharded
        device_type = self.device.type
        self.trunk_pass = resolve_trunk_pass(
            trunk_pass, device_type, sharded, activation_memory_budget, activation_offloading
        )
        self.activation_offloading = activation_offloading
        # Only torch.compile's partitioner reads the budget.
        self.activation_memory_budget = activation_memory_budget if self.trunk_pass == "compiled" else 1.0

    @cached_property  # built at the first step, when peft, FSDP or DeepSpeed have finished with the layers
    def _packed_trunk(self) -> PackedTrunk:
        model = language_model(self.core.model)
        return PackedTrunk(
            model, self.trunk_pass, self.activation_memory_budget, self.sharded, self.activation_offloading
        )

    def uses_sparse_last_mlp(self, kept_positions: int, positions: int) -> bool:
        """Return True if the trunk's last MLP runs at the kept positions only; both counts include padding."""
        at_kept = not self.sharded and has_sparse_last_mlp(language_model(self.core.model), self.trunk_pass)
        return at_kept and kept_positions < positions

    @property
    def core(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> Any:
        return self.core.config

    @property
    def device(self) -> torch.device:
        """Return the language model's device; the vision tower may be elsewhere (`offload_vision_tower`)."""
        device: torch.device = self.core.lm_head.weight.device
        return device

    def offload_vision_tower(self) -> None:
        """Move a vision tower that no step runs to the CPU, which frees its memory on the device."""
        vision_tower(self.core.model).to("cpu")

    @property
    def post_decoder(self) -> PostDecoder | None:
        return getattr(self.core.model, "post_decoder", None)

    @property
    def needs_all_states(self) -> bool:
        """Return True if the post decoder needs the hidden states of all positions, not only of predicting ones."""
        return self.post_decoder is not None and self.post_decoder.reads_all_positions

    @property
    def needs_vision_features(self) -> bool:
        """Return True if the post decoder reads the vision features."""
        return self.post_decoder is not None and self.post_decoder.align is not None

    @property
    def vision_width(self) -> int | None:
        """Return the width of the vision features that the post decoder reads, or None if it reads none."""
        align = self.post_decoder.align if self.post_decoder is not None else None  # "none" attention has none
        first: Any = align.linears[0] if align is not None else None
        return None if first is None else int(first.in_features)

    @property
    def _no_split_modules(self) -> list[str]:
        """Return the class names that FSDP wraps as units.

        The rest (embeddings, projector, post decoder, lm_head) belongs to the policy's own unit. Its parameters are
        gathered during the whole forward pass, since parts of it are called by name.
        """
        units = getattr(self.core, "_no_split_modules", ())  # a `HeadModel` has none
        return sorted({type(m).__name__ for m in self.core.modules()} & set(units))

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Enable recomputation of the trunk's layers in the backward pass; the Trainer calls this."""
        activation_memory.enable_checkpointing(self.core, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # the name before transformers 5.23

    def autocast(self, enabled: bool = True) -> torch.autocast:
        device = self.device.type
        return torch.autocast(device, dtype=self.dtype, enabled=enabled and self.dtype != torch.float32)

    def _has_mixed_dtypes(self, parameters: Iterable[tuple[str, Tensor]]) -> bool:
        """Return True if any floating-point weight has another dtype than the computation, as trained ones do."""
        # The post decoder runs after the trunk, under the autocast of `forward`.
        dtypes = {p.dtype for name, p in parameters if p.is_floating_point() and not name.startswith("post_decoder.")}
        return dtypes != {self.dtype}

    # Autocast casts weights of another dtype at every call, so it is enabled only where some have one.
    @cached_property
    def _mixed_trunk(self) -> bool:
        return self._has_mixed_dtypes(self.core.model.named_parameters())

    @cached_property
    def _mixed_vision(self) -> bool:
        base = self.core.model
        return any(self._has_mixed_dtypes(part.named_parameters()) for part in (vision_tower(base), connector(base)))

    def trunk(self, batch: LiveBatch) -> TrunkStates:
        """Run vision tower, projector and language model on packed trees."""
        packed = batch.packed
        with self.autocast(self._mixed_trunk):
            # 1. Embed the ids of all rows: (R, L) -> (R, L, D). Image positions hold placeholder ids.
            embeds = self.core.model.get_input_embeddings()(packed.ids)
            # 2. Encode the images; the projected features of all images form one (image positions, D).
            features, projected, deep = self._image_inputs(batch)
            # 3. Write them over the placeholders; images come in order of trees, and trees in order of rows.
            if projected is not None:
                placeholders = (packed.ids == self.config.image_token_id).unsqueeze(-1)  # (R, L, 1)
                embeds = embeds.masked_scatter(placeholders, projected.to(embeds.dtype))
            image = {"visual_pos_masks": placeholders[..., 0], "deepstack_visual_embeds": deep} if deep else {}
            # 4. Run the decoder layers and keep the positions that predict something: (R, L, D) -> (T, S, D).
            states = self._packed_trunk(embeds, packed, **image)
        return TrunkStates(states, features, batch.image_counts, packed.targets)

    def vision_features(
        self, pixel_values: Tensor, image_inputs: Mapping[str, Tensor] = MappingProxyType({})
    ) -> list[Tensor]:
        """Compute the vision features that `trunk` returns, (M, V) per image, without the language model."""
        image = self.encode_images(pixel_values, image_inputs)
        # A model with a post decoder has grouped them by image already.
        features: list[Tensor] | None = getattr(image, "vision_features", None)
        return vision_features(self.config, image, image_inputs) if features is None else features

    def encode_images(self, pixel_values: Tensor, image_inputs: Mapping[str, Tensor]) -> Any:
        """Run vision tower and projector; return the outputs of `get_image_features`."""
        base = self.core.model
        pixels = pixel_values.to(base.get_input_embeddings().weight.dtype)
        with self.autocast(self._mixed_vision):  # the language model's float32 adapters need no autocast here
            return base.get_image_features(pixel_values=pixels, **image_inputs, return_dict=True)

    def _image_inputs(self, batch: LiveBatch) -> tuple[list[Tensor] | None, Tensor | None, list[Tensor]]:
        """Return vision features per image, if the post decoder reads them, and what image positions get.

        These are their embeddings (image positions, D), and as much again for each of the first layers that adds some.
        """
        features: list[Tensor] | None = None
        if batch.pixel_values is not None:
            image = self.encode_images(batch.pixel_values, batch.image_inputs)
            rows = position_rows(image, batch.image_rows)
            if (features := getattr(image, "vision_features", None)) is not None:
                features = image_features(features, batch.image_rows)
        elif batch.projected is not None:
            rows = batch.projected
        elif batch.tower is not None:  # kept states skip the tower, but not the projector, which may train
            with self.autocast(self._mixed_vision):
                rows = list(connector(self.core.model)(torch.stack(batch.tower)))
        else:
            return None, None, []
        projected, *deep = torch.cat(rows).split(self.config.text_config.hidden_size, dim=-1)
        if batch.pixel_values is None:
            features = batch.tower if reads_tower(self.config) else list(projected.split(list(map(len, rows))))
        deep = deep if sum(batch.image_counts) else []  # not of a blank image, which has no position
        return features if self.needs_vision_features else None, projected, deep

    def forward(self, batch: LiveBatch | TrunkStates) -> Tensor:
        """Return the log-prob of each supervised token, (N,) float32."""
        with self.autocast():
            # Trunk states (T, S, D), computed now or read from the cache.
            trunk = batch if isinstance(batch, TrunkStates) else self.trunk(batch)
            # Post decoder, then only the states that predict a target: (N, D).
            states = prediction_states(self.post_decoder, trunk)
            # lm_head and log-softmax, without ever holding the logits of all positions.
            return token_log_probs(self.core.lm_head, states, trunk.targets.id, compiled=self.trunk_pass == "compiled")


def prediction_states(post_decoder: PostDecoder | None, trunk: TrunkStates) -> Tensor:
    """Return the hidden states after the post decoder from which lm_head predicts the targets, (N, D)."""
    states, targets = trunk.states, trunk.targets
    if post_decoder is None:
        return states[targets.tree, targets.slot]  # (T, S, D) -> (N, D)
    # Image keys and values of every block, once per image; branches of a tree share them.
    context = post_decoder.image_context(trunk.features, trunk.image_counts) if trunk.features is not None else None
    if post_decoder.reads_all_positions:
        # Self-attention needs all states (T, S, D) and the tree mask (T, 1, S, S); select the targets afterwards.
        decoded: Tensor = post_decoder(states, context, targets.self_attention_mask()[:, None])
        return decoded[targets.tree, targets.slot]
    # Without self-attention, only the predicting states (N, D) pass through the post decoder.
    layout = FlatLayout(targets.tree, targets.slot, (states.shape[0], states.shape[1]))
    predicting: Tensor = post_decoder(states[targets.tree, targets.slot], context, layout=layout)
    return predicting


def token_log_probs(head: nn.Linear, states_ND: Tensor, ids_N: Tensor, compiled: bool = False) -> Tensor:
    """Compute log p(id | state) under a language-model head, (N,) float32, whatever the dtype of the states.

    If the logits exceed LOGITS_BYTES, targets are processed in chunks. The backward pass recomputes the logits of each
    chunk instead of keeping them.
    """
    # A row of float32 logits takes 4 bytes per word of the vocabulary.
    rows = max(1, LOGITS_BYTES // (4 * head.out_features))
    if len(ids_N) <= rows:
        return gather_log_probs(head(states_ND), ids_N, compiled)
    parts = zip(states_ND.split(rows), ids_N.split(rows), strict=True)
    chunk = lambda states, ids: gather_log_probs(head(states), ids, compiled)  # noqa: E731
    # A chunk has no dropout, so the random state need not be saved and restored, which would sync with the device.
    recomputed = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([recomputed(states, ids) for states, ids in parts])
