"""The policy: from a batch of trees to the log-probability of every supervised token.

This is the way of the data through the model: trunk -> post decoder -> lm_head -> log-probs. The trunk's part can be
done beforehand (`TrunkStates`), when nothing in it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from relook.data.packing import PackedTrees, Targets, pinned, to_device
from relook.forward import activation_memory
from relook.forward.packed_attention import BUDGET, TreePass, last_mlp_at_kept, resolve
from relook.model.modeling_relook import selected_features
from relook.model.post_decoder import Layout, PostDecoder

# ----------------------------------------------------------------------------------------------------
# From logits to log-probabilities without a second copy of the logits: they are the largest tensors of a step.

ROWS = 1024  # that are in float32 at a time, where each operation has a result of its own


class LogProb(torch.autograd.Function):
    """log softmax(logits)[id] for each row: (N,) float32 of logits (N, vocabulary) in any floating-point type.

    Kept for the backward pass are the logits as they came and one number a row. In plain operations bf16 logits of
    16,000 targets at 32,000 words, 1 GB, grow by two float32 copies of 2 GB each.

    The gradient of log p_i by logit j is g * ([j = i] - p_j).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, compiled: bool) -> Tensor:
        total = _by_rows(_totals, compiled, logits)
        ctx.save_for_backward(logits, ids, total)
        ctx.compiled = compiled
        return wide(logits.gather(-1, ids[:, None]).squeeze(-1)) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, total = ctx.saved_tensors
        return _by_rows(_gradients, ctx.compiled, logits, ids, total, gradient), None, None


def _by_rows(work: Callable[..., Tensor], compiled: bool, *tensors: Tensor) -> Tensor:
    """`work` on tensors of as many rows each: compiled, in one pass over memory, or some rows at a time."""
    if compiled:
        made: Tensor = torch.compile(work)(*tensors)
        return made
    parts = zip(*(tensor.split(ROWS) for tensor in tensors), strict=True)
    return torch.cat([work(*part) for part in parts])


def _totals(logits: Tensor) -> Tensor:
    return wide(logits).logsumexp(-1)


def _gradients(logits: Tensor, ids: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
    said = torch.arange(logits.shape[-1], device=logits.device) == ids[:, None]
    found = said.to(total.dtype) - (wide(logits) - total[:, None]).exp()
    return (found * gradient[:, None]).to(logits.dtype)


def wide(values: Tensor) -> Tensor:
    """In float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_prob(logits: Tensor, ids: Tensor, compiled: bool = False) -> Tensor:
    """log softmax(logits)[id] for each row, (N,) float32.

    Args:
        compiled: each pass becomes one kernel, which reads the logits once: less than half the time on a GPU.
    """
    result: Tensor = LogProb.apply(logits, ids, compiled)
    return result


# ----------------------------------------------------------------------------------------------------

LOGITS_BYTES = 2**31  # of logits at a time, were they float32: about 16,000 targets at a vocabulary of 32,000


@dataclass(frozen=True)
class LiveBatch:
    """Packed trees and what the model takes for their images, in order of trees. `images` counts them per tree."""

    packed: PackedTrees
    pixel_values: Tensor | None  # (I, 3, H, W) or (I, tiles, 3, H, W)
    images: list[int]
    image_sizes: Tensor | None = None  # (I, 2) height and width, for models that cut images into tiles
    features: Tensor | None = None  # (I, M, V) vision features, where the tower has seen the images before

    def to(self, device: Any, non_blocking: bool = False) -> LiveBatch:
        return to_device(self, device)

    def pin_memory(self) -> LiveBatch:
        return pinned(self)


@dataclass(frozen=True)
class TrunkStates:
    """What the trunk has to say about a batch of trees: all that a post decoder or a head needs."""

    states: Tensor  # (T, S, D) last hidden states at the kept positions
    features: list[Tensor] | None  # (M, V) vision features of each image, where a post decoder reads them
    images: list[int]
    targets: Targets

    def to(self, device: Any, non_blocking: bool = False) -> TrunkStates:
        return to_device(self, device)

    def pin_memory(self) -> TrunkStates:
        return pinned(self)


class Policy(nn.Module):
    """A model as training sees it: trees in, log-probs out.

    Args:
        model: a transformers model, possibly wrapped by peft; the wrapper itself is bypassed, its layers are not. Or
            an `AboveTrunk`, for cached trunk states.
        dtype: what matrix products are computed in; what trains is kept in float32.
        trunk_pass: how the language model reads packed trees; see `TreePass`.
        sharded: whether FSDP or DeepSpeed will take the model apart.
        activation_memory_budget: of compiled layers; see `TreePass`.
        activation_offloading: see `TreePass`.
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
        place = self.device.type
        self.trunk_pass = resolve(trunk_pass, place, sharded, activation_memory_budget, activation_offloading)
        self.activation_offloading = activation_offloading
        self.activation_memory_budget = activation_memory_budget if self.trunk_pass == "compiled" else 1.0

    @cached_property
    def _tree_pass(self) -> TreePass:
        model = self.core.model.language_model
        budget, away = self.activation_memory_budget, self.activation_offloading
        return TreePass(model, self.trunk_pass, budget, self.sharded, away)

    def last_mlp_at_kept(self, kept: int, positions: int) -> bool:
        """Whether the trunk's last MLP runs at the kept positions only, of all that are read; both with padding."""
        at_kept = not self.sharded and last_mlp_at_kept(self.core.model.language_model, self.trunk_pass)
        return at_kept and kept < positions

    @property
    def core(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> Any:
        return self.core.config

    @property
    def device(self) -> torch.device:
        """Where the language model is; the vision tower may be elsewhere (`rest_tower`)."""
        found: torch.device = self.core.lm_head.weight.device
        return found

    def rest_tower(self) -> None:
        """Give the device's memory of a vision tower free that no step runs."""
        self.core.model.vision_tower.to("cpu")

    @property
    def post_decoder(self) -> PostDecoder | None:
        return getattr(self.core.model, "post_decoder", None)

    @property
    def keeps_everything(self) -> bool:
        """Whether the post decoder needs the states of all positions, not only of those that predict a target."""
        return self.post_decoder is not None and self.post_decoder.reads_all_positions

    @property
    def reads_image(self) -> bool:
        """Whether what comes after the trunk needs the vision features."""
        return self.post_decoder is not None and self.post_decoder.align is not None

    @property
    def vision_width(self) -> int | None:
        """Width of the vision features that the post decoder reads; None where it reads none."""
        align = self.post_decoder.align if self.post_decoder is not None else None
        first: Any = align.linears[0] if align is not None else None
        return None if first is None else int(first.in_features)

    @property
    def _no_split_modules(self) -> list[str]:
        """What FSDP makes units of, by class. The rest (embeddings, projector, post decoder, lm_head) belongs to the
        policy itself, whose parameters are whole during its forward pass: parts of it are called by name."""
        units = getattr(self.core, "_no_split_modules", ())  # nothing above a trunk is one
        return sorted({type(m).__name__ for m in self.core.modules()} & set(units))

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The Trainer's call: recompute the trunk's layers in the backward pass instead of keeping their inputs."""
        activation_memory.enable(self.core, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # what the Trainer calls before transformers 5.23

    def autocast(self, wanted: bool = True) -> torch.autocast:
        device = self.device.type
        return torch.autocast(device, dtype=self.dtype, enabled=wanted and self.dtype != torch.float32)

    def _mixed(self, named: Iterable[tuple[str, Tensor]]) -> bool:
        """Whether a part of the trunk holds other floating-point weights than it computes in, as where it trains."""
        held = {p.dtype for name, p in named if p.is_floating_point() and not name.startswith("post_decoder.")}
        return held != {self.dtype}

    @cached_property
    def _mixed_trunk(self) -> bool:
        return self._mixed(self.core.model.named_parameters())

    @cached_property
    def _mixed_sight(self) -> bool:
        base = self.core.model
        return any(self._mixed(part.named_parameters()) for part in (base.vision_tower, base.multi_modal_projector))

    def trunk(self, batch: LiveBatch) -> TrunkStates:
        """Vision tower, projector and language model over packed trees."""
        with self.autocast(self._mixed_trunk):
            return self._trunk(batch)

    def vision_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> list[Tensor]:
        """Without the language model: what `trunk` gives as features, (M, V) of each image.

        Where no post decoder puts tiles together, an image is one row of pixels.
        """
        image = self._images(pixel_values, image_sizes)
        found = getattr(image, "vision_features", None)
        return list(selected_features(self.config, image.hidden_states) if found is None else found)

    def _images(self, pixel_values: Tensor, image_sizes: Tensor | None) -> Any:
        base = self.core.model
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        pixels = pixel_values.to(base.get_input_embeddings().weight.dtype)
        with self.autocast(self._mixed_sight):  # adapters of the language model do not make the tower wider
            return base.get_image_features(pixel_values=pixels, **sizes, return_dict=True)

    def _seen(self, batch: LiveBatch) -> tuple[list[Tensor] | None, Tensor | None]:
        """Vision features of each image, where the post decoder reads them, and what stands at image positions."""
        if batch.features is not None:
            with self.autocast(self._mixed_sight):
                projected = self.core.model.multi_modal_projector(batch.features)
            return list(batch.features) if self.reads_image else None, projected.flatten(0, 1)
        if batch.pixel_values is None:
            return None, None
        image = self._images(batch.pixel_values, batch.image_sizes)
        return image.vision_features if self.reads_image else None, torch.cat(list(image.pooler_output))

    def _trunk(self, batch: LiveBatch) -> TrunkStates:
        packed = batch.packed
        embeds = self.core.model.get_input_embeddings()(packed.ids)
        features, projected = self._seen(batch)
        if projected is not None:
            where = (packed.ids == self.config.image_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(where, projected.to(embeds.dtype))
        return TrunkStates(self._tree_pass(embeds, packed), features, batch.images, packed.targets)

    def forward(self, batch: LiveBatch | TrunkStates) -> Tensor:
        """Log-probability of each supervised token, (N,) float32."""
        with self.autocast():
            return self._forward(batch)

    def _forward(self, batch: LiveBatch | TrunkStates) -> Tensor:
        trunk = batch if isinstance(batch, TrunkStates) else self.trunk(batch)
        states = predicting_states(self.post_decoder, trunk)
        return token_log_probs(self.core.lm_head, states, trunk.targets.id, compiled=self.trunk_pass == "compiled")


def predicting_states(post_decoder: PostDecoder | None, trunk: TrunkStates) -> Tensor:
    """The states that lm_head turns into predictions of the targets, after the post decoder: (N, D)."""
    states, targets = trunk.states, trunk.targets
    if post_decoder is None:
        return states[targets.tree, targets.slot]
    context = post_decoder.look(trunk.features, trunk.images) if trunk.features is not None else None
    if post_decoder.reads_all_positions:
        seen: Tensor = post_decoder(states, context, targets.kept_mask()[:, None])
        return seen[targets.tree, targets.slot]
    layout = Layout(targets.tree, targets.slot, (states.shape[0], states.shape[1]))
    chosen: Tensor = post_decoder(states[targets.tree, targets.slot], context, layout=layout)
    return chosen


def token_log_probs(head: nn.Linear, states_ND: Tensor, ids_N: Tensor, compiled: bool = False) -> Tensor:
    """log p(id | state) under a language-model head, (N,) float32, whatever the states' dtype.

    More targets than LOGITS_BYTES hold are taken in chunks, whose logits are computed again in the backward pass
    instead of being kept.
    """
    rows = max(1, LOGITS_BYTES // (4 * head.out_features))
    if len(ids_N) <= rows:
        return log_prob(head(states_ND), ids_N, compiled)
    parts = zip(states_ND.split(rows), ids_N.split(rows), strict=True)
    chunk = lambda states, ids: log_prob(head(states), ids, compiled)  # noqa: E731
    # No dropout in it, so no generator's state needs to be fetched from the device and put back.
    again = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(states, ids) for states, ids in parts])
