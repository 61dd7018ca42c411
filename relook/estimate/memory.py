"""GPU memory of a training run in bytes, summed over shapes: of one process, and of a GPU under each strategy.

`Job` has the bytes of one process; `strategies` spreads them over GPUs by DDP, FSDP2 or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from relook.data.encode import Example
from relook.data.packing import assign_rows, common_root_length, kept_positions, round_up_to_blocks
from relook.forward.activation_memory import layers_on_device
from relook.forward.collate import TREES_PER_ROOT
from relook.forward.packed_attention import ADAPTER, ATTENTION_INPUTS, MLP_INPUTS, packs_rows
from relook.forward.policy import LOGITS_BYTES, ROWS_IN_FLOAT32, Policy
from relook.model.families import (
    LANGUAGE_MODELS,
    connector,
    family_of,
    language_model,
    patches_per_feature,
    vision_tower,
)
from relook.model.modeling_relook import reads_tower, tower_width, vision_width
from relook.model.post_decoder import PostDecoder
from relook.recipe import Recipe
from relook.train.cache_store import SHARD_BYTES
from relook.train.feature_cache import IMAGE_BATCH

# ----------------------------------------------------------------------------------------------------
# Bytes that a step saves for its backward pass, from shapes alone: what `relook estimate` calls activations.
#
# Each term is a tensor that autograd saves; `tests/test_estimate.py` counts those of real steps. Letters: D hidden
# size, F width inside the MLP, A and K values in a position's queries and keys, H heads, V width of vision features.
#
# `compute_bytes` is the size of a value in matrix products: 2 under bf16 and fp16, else 4. `mixed_precision` is True if
# trained parameters are float32 beside it. Autocast then casts the input of each linear layer that trains, and every
# cast is a copy of its own. In compiled layers, torch's min-cut partitioner keeps one of equal copies, and recomputes
# what is cheap.


@dataclass(frozen=True)
class BatchCounts:
    """Sizes of a batch; `relook estimate --json` shows them under these names.

    Args:
        positions: positions of all rows that the language model reads, padding included.
        row: positions of one row.
        slots: kept hidden states of its trees, each tree padded to the longest.
        targets: positions that the loss reads.
        images: images.
        features: rows of vision features, over all images.
        padded_features: those rows, with each tree padded to the tree with the most.
        trees: trees.
    """

    positions: int
    row: int
    slots: int
    targets: int
    images: int
    features: int
    padded_features: int
    trees: int

    @staticmethod
    def of(examples: Sequence[Example], rows: Sequence[int], policy: Policy) -> BatchCounts:
        """Count the batch that `Collator` builds from examples.

        Args:
            rows: rows of vision features of each example, over its images.
        """
        trees = [example.tree for example in examples]
        distinct = {id(tree): tree for tree in trees}.values()  # assumed lengths: all examples share one tree
        root = common_root_length(trees, policy.config.image_token_id)
        lengths = sorted((len(tree) - root for tree in trees), reverse=True)
        packed = packs_rows(policy.trunk_pass)
        # Packed: all trees in one row, with one copy of the root per TREES_PER_ROOT trees. Else rows of the longest.
        row = (
            round_up_to_blocks(root * -(-len(trees) // TREES_PER_ROOT) + sum(lengths)) if packed else root + lengths[0]
        )
        return BatchCounts(
            positions=row if packed else row * len(assign_rows(lengths, lengths[0])),
            row=row,
            slots=len(trees) * max(len(kept_positions(tree, policy.needs_all_states)) for tree in distinct),
            targets=sum(sum(branch.supervised) for tree in trees for branch in tree.branches),
            images=sum(len(example.images) for example in examples),
            features=sum(rows),
            padded_features=len(trees) * max(rows),
            trees=len(trees),
        )


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that a part of the model saves for its backward pass.

    Args:
        per_position: bytes per position.
        fixed: bytes that do not depend on the number of positions.
        cheap: the share of `per_position` that torch recomputes first if a compiled layer may not keep everything.
        workspace: peak bytes per position that the backward pass allocates besides.
    """

    per_position: int
    fixed: int = 0
    cheap: int = 0
    workspace: int = 0

    def of(self, positions: int) -> int:
        """Return the bytes for a number of positions."""
        return self.per_position * positions + self.fixed


def saved_within_budget(budget: float, input_bytes: int, *parts: tuple[SavedBytes, int]) -> int:
    """Return the bytes that a compiled layer saves under torch's `activation_memory_budget`.

    Args:
        budget: from 0 to 1; 1 saves everything. Below 1, torch first drops all that is cheap to recompute, and then
            keeps what fits in this share of the rest (`torch._functorch.partitioners.choose_saved_values_set`).
        input_bytes: the layer's input, which is saved in any case.
        parts: the layer's parts, each with its number of positions.
    """
    everything = sum(part.of(positions) for part, positions in parts)
    if budget == 1:
        return everything
    expensive = sum((part.per_position - part.cheap) * positions for part, positions in parts)
    return min(expensive, round(input_bytes + budget * (everything - input_bytes)))


def decoder_layer_bytes(
    layer: nn.Module,
    text: Any,
    row: int,
    trunk_pass: str,
    compute_bytes: int,
    mixed_precision: bool,
    dropout: float,
) -> tuple[SavedBytes, SavedBytes]:
    """Return what a decoder layer saves in its attention and in its gated MLP, each with the norm before it.

    Args:
        layer: decoder layer as training has it, with or without LoRA; only its shapes are read.
        text: config of the language model.
        row: positions of one row, for the dense mask.
        trunk_pass: `Policy.trunk_pass`.
        compute_bytes: bytes of a value in matrix products.
        mixed_precision: True if trained parameters are float32 under a lower type.
        dropout: LoRA's dropout rate.
    """
    D, F, H = text.hidden_size, text.intermediate_size, text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or D // H
    A, K = H * head_size, text.num_key_value_heads * head_size
    adapters: dict[str, Any] = {
        name.rpartition(".")[2]: module for name, module in layer.named_modules() if isinstance(module, LoraLayer)
    }
    dora = any(module.lora_variant for module in adapters.values())
    trains = not adapters and any(parameter.requires_grad for parameter in layer.parameters())
    # Compiled, DoRA saves what it saves otherwise: its outputs are products of matrices, none of them cheap.
    dense, compiled = trunk_pass == "dense", trunk_pass == "compiled" and not dora
    stream = 4 if trains and mixed_precision else compute_bytes  # bytes of a value in the residual stream

    # All sums are bytes per position. Attention saves queries, keys, values and output, and the softmax's log-sum in
    # float32. SDPA also has its mask as numbers, and keys and values once per query head.
    attention = (2 * A + 2 * (A if dense else K)) * compute_bytes + 4 * H + (row * compute_bytes if dense else 0)
    # The MLP saves gate, its activation (recomputed if compiled), and up.
    mlp = (2 if compiled else 3) * F * compute_bytes
    # Each RMSNorm saves its input and 1 / root mean square. The input is float32, unless a compiled layer casts it
    # again (and recomputes the second norm's input from the attention's output).
    attention += D * (stream if compiled else 4) + 4
    mlp += D * (compute_bytes if compiled else 4) + 4
    if trains and not compiled:  # the normalised states, for the gradient of the norms' weights
        attention += D * stream
        mlp += D * stream

    input_width = {**dict.fromkeys((*ATTENTION_INPUTS, *MLP_INPUTS), D), "o_proj": A, "down_proj": F}
    trained_linears = list(adapters) if adapters else list(input_width) if trains else []

    def with_linear_inputs(per_position: int, names: Sequence[str], workspace: int = 0) -> SavedBytes:
        """Add the inputs of the linear layers that train, which the gradients of their weights need."""
        linears = [name for name in names if name in trained_linears]
        if adapters and dropout:  # each layer has its own dropped-out input, and its mask in bytes
            inputs = sum(input_width[name] for name in linears) * compute_bytes
            per_position += sum(input_width[name] for name in linears)
        elif mixed_precision and not compiled:  # each has its own cast; only LoRA's casts the attention's output
            inputs = sum(input_width[name] for name in linears if adapters or name != "o_proj") * compute_bytes
        else:  # layers side by side share theirs; that of o_proj is the attention's output, which is saved already
            groups = [group for group in (ATTENTION_INPUTS, MLP_INPUTS, ("down_proj",)) if set(group) & set(linears)]
            inputs = sum(input_width[group[0]] for group in groups) * compute_bytes
        for module in (adapters[name] for name in linears if adapters):
            per_position += module.lora_A[ADAPTER].out_features * compute_bytes  # rank-sized, between A and B
            # DoRA's scale multiplies the outputs of base and LoRA.
            per_position += 2 * module.out_features * compute_bytes if dora else 0
        weights = (p for name, p in layer.named_parameters() if p.requires_grad and p.ndim > 1 and _is_in(name, names))
        fixed = sum(p.numel() for p in weights) * compute_bytes if mixed_precision else 0  # autocast's copies
        return SavedBytes(per_position + inputs, fixed, inputs if compiled else 0, workspace)

    # Gradients of the MLP's three wide tensors and of the residual stream; peft's casts make one of them float32.
    workspace = 3 * F * compute_bytes + 4 * D * stream
    workspace += F * 4 if adapters and mixed_precision and not compiled else 0
    return (
        with_linear_inputs(attention, (*ATTENTION_INPUTS, "o_proj")),
        with_linear_inputs(mlp, (*MLP_INPUTS, "down_proj"), workspace),
    )


def _is_in(parameter: str, modules: Sequence[str]) -> bool:
    return bool(set(parameter.split(".")) & set(modules))


def projector_bytes(config: Any, compute_bytes: int, mixed_precision: bool) -> SavedBytes:
    """Return what a trained projector saves, with rows of vision features as positions."""
    D, V = config.text_config.hidden_size, tower_width(config)
    # The inputs of both linear layers (V and D), the first one's output (D), and autocast's copies of both weights.
    return SavedBytes(int(V + 2 * D) * compute_bytes, int(V * D + D * D) * compute_bytes if mixed_precision else 0)


def tower_layer_bytes(vision: Any, compute_bytes: int, mixed_precision: bool, trains: bool) -> SavedBytes:
    """Return what a layer of a CLIP tower saves, with patches and class token as positions.

    Args:
        vision: config of the tower.
        trains: False for the layers behind the last selected one, through which no gradient will flow.
    """
    V, F, H = vision.hidden_size, vision.intermediate_size, vision.num_attention_heads
    # Two LayerNorms with mean and standard deviation; queries, keys, values, the attention's output and its log-sum.
    per_position = 2 * ((4 if mixed_precision else compute_bytes) * V + 8) + 4 * V * compute_bytes + 4 * H
    # The activation's input; quick_gelu saves its sigmoid, too.
    per_position += (2 if vision.hidden_act == "quick_gelu" else 1) * F * compute_bytes
    if trains:  # the inputs of linear layers: of the norms' outputs autocast makes a copy for each layer
        per_position += ((4 if mixed_precision else 2) * V + F) * compute_bytes
    fixed = (4 * V * V + 2 * V * F) * compute_bytes if mixed_precision else 0  # autocast's copies of the weights
    return SavedBytes(per_position, fixed)


def post_decoder_bytes(
    decoder: PostDecoder, counts: BatchCounts, compute_bytes: int, mixed_precision: bool
) -> tuple[int, int]:
    """Return the bytes that a post decoder saves for a batch, on its text side and on its image side.

    The image side, the aligned features with each block's keys and values, is last in the backward pass.
    """
    block: Any = decoder.blocks[0]
    D, F = int(block.mlp.gate_proj.in_features), int(block.mlp.gate_proj.out_features)
    depth = len(decoder.blocks)
    states = counts.slots if decoder.reads_all_positions else counts.targets
    # LayerNorm runs in float32 under CUDA's autocast, and saves its input with mean and standard deviation.
    norm = 4 * D + 8

    def inputs_of(layers: int) -> int:
        """Return the bytes of the input of linear layers side by side; under autocast each has a cast of its own."""
        return (layers if mixed_precision else 1) * D * compute_bytes

    # Three sums: per state, per slot (states padded to the longest tree), and per row of vision features.
    per_state = norm + inputs_of(2) + 4 * F * compute_bytes  # MLP: gate, its activation, up and their product
    per_slot = per_feature = 0
    if decoder.align is not None:
        linears: list[Any] = list(decoder.align.linears)
        # Alignment: the inputs of each linear layer and activation, and the norm.
        widths = linears[0].in_features + sum(2 * linear.in_features for linear in linears[1:])
        per_feature += widths * compute_bytes + norm
        # Each block's keys and values, and the inputs of the layers that compute them.
        per_feature += depth * 2 * D * compute_bytes + (depth * inputs_of(2) if mixed_precision else inputs_of(1))
        per_state += norm + 2 * D * compute_bytes  # the inputs of queries and output projection
        # Queries, output, and the softmax's log-sum in float32.
        per_slot += 2 * D * compute_bytes + 4 * block.cross_attention.num_heads
    if decoder.reads_all_positions:  # self-attention: queries, keys, values, output, and the log-sum
        per_state += norm + inputs_of(3) + 4 * D * compute_bytes + 4 * block.self_attention.num_heads
        per_slot += counts.slots // counts.trees * compute_bytes  # the mask as numbers
    weights = sum(p.numel() for p in decoder.parameters() if p.ndim > 1)
    fixed = weights * compute_bytes if mixed_precision else 0  # autocast's copies
    text = depth * (states * per_state + counts.slots * per_slot) + fixed
    return int(text), int(counts.padded_features * per_feature)


def logits_bytes(vocabulary: int, targets: int, compute_bytes: int, compiled: bool) -> tuple[int, int]:
    """Return the bytes of logits and their gradient, and of the workspace beside them, for one chunk of targets.

    See `policy.token_log_probs`. Without compilation the workspace holds the parts that the gradient is put together
    from, or some rows of them in float32; compiled log-probs need none.
    """
    rows = min(targets, max(1, LOGITS_BYTES // (4 * vocabulary)))
    float32_rows = 3 * min(ROWS_IN_FLOAT32, rows) * vocabulary * 4
    workspace = 0 if compiled else max(rows * vocabulary * compute_bytes, float32_rows)
    return 2 * rows * vocabulary * compute_bytes, workspace


# ----------------------------------------------------------------------------------------------------

CUBLAS_BYTES = 64 << 20  # workspaces of cuBLAS and cuBLASLt, 32 MiB each on a Hopper GPU
# Bytes of an optimizer's state per trained parameter. Optimizers that are not listed count as AdamW: two float32
# moments.
ADAMW_STATE_BYTES = 8
OPTIMIZER_STATE_BYTES = {
    "sgd": 0,
    "adafactor": 0,
    "rmsprop": 4,
    "adagrad": 4,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
    "ademamix": 12,
}
OPTIMIZER_STATE_BYTES |= dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2)
OPTIMIZER_STATE_BYTES |= dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1)


@dataclass(frozen=True)
class Job:
    """Memory of a recipe's run in one process. Names that end in `bytes` are bytes; parameters are counted.

    Args:
        recipe: the run's recipe.
        policy: the policy as it trains, on the meta device; without its trunk if trunk states are cached.
        trunk_policy: the same policy with its trunk.
        batch: the largest batch of a step.
        trunk_batch: a batch of the pass before training: the trunk cache's, or reference log-probs.
        cache_bytes: bytes of cached states and features on the GPU.
        features_cached: True if the vision tower runs before training only (`feature_cache.cache_vision_features`).
        single_dtype: True under FSDP and DeepSpeed, which compute in copies of one dtype, so that nothing is cast.
    """

    recipe: Recipe
    policy: Policy
    trunk_policy: Policy
    batch: BatchCounts
    trunk_batch: BatchCounts
    cache_bytes: int
    features_cached: bool
    single_dtype: bool

    @property
    def compute_bytes(self) -> int:
        """Return the bytes of a value in matrix products."""
        return self.policy.dtype.itemsize

    @property
    def mixed_precision(self) -> bool:
        """Return True if autocast casts float32 parameters that train down to the compute dtype."""
        return self.compute_bytes < 4 and not self.single_dtype

    @property
    def text(self) -> Any:
        return self.policy.config.text_config

    @property
    def width(self) -> int:
        return int(self.text.hidden_size)

    @property
    def trained_parameters(self) -> int:
        """Count the parameters that train."""
        return _trained_parameters(self.policy)

    @cached_property
    def frozen_bytes(self) -> int:
        """Return the bytes of frozen weights on the GPU; with cached states the projector's are loaded too."""
        return _frozen_bytes(self.policy, self.recipe.bits, self.recipe.double_quant) + (
            _weight_bytes(connector(self.trunk_policy.core.model)) if self.recipe.cached_trunk else 0
        )

    @property
    def trained_with_trunk(self) -> int:
        """Count the parameters that train in the policy with its trunk, which the pass before training holds."""
        return _trained_parameters(self.trunk_policy)

    @property
    def frozen_bytes_with_trunk(self) -> int:
        return _frozen_bytes(self.trunk_policy, self.recipe.bits, self.recipe.double_quant)

    @property
    def layers(self) -> Any:
        return language_model(self.trunk_policy.core.model).layers

    @cached_property
    def layer_parts(self) -> tuple[SavedBytes, SavedBytes]:
        """Return what a decoder layer saves where gradients flow through it: in its attention and in its MLP."""
        return decoder_layer_bytes(
            self.layers[0],
            self.text,
            self.batch.row,
            self.policy.trunk_pass,
            self.compute_bytes,
            self.mixed_precision,
            self.recipe.lora_dropout,
        )

    @cached_property
    def saved_in_tower(self) -> int:
        """Return the bytes that a vision tower saves that trains."""
        if not self.recipe.trains_vision_tower:
            return 0
        config = self.trunk_policy.config
        vision, selected = config.vision_config, config.vision_feature_layer
        of_tile, low = (vision.image_size // vision.patch_size) ** 2, self.compute_bytes
        tiles = self.batch.features // of_tile
        states = tiles * (of_tile + 1)
        # Selected is the output of so many layers. What those behind the last one save is freed with Python's cycles.
        depth = [i % (vision.num_hidden_layers + 1) for i in (selected if isinstance(selected, list) else [selected])]
        used, unused = max(depth), vision.num_hidden_layers - max(depth)
        layers = [tower_layer_bytes(vision, low, self.mixed_precision, trains).of(states) for trains in (True, False)]
        # The pixels, the first norm, and the activation of a projector that does not train itself.
        first = tiles * 3 * vision.image_size**2 * low + states * (4 * vision.hidden_size + 8)
        projector = 0 if self.recipe.trains_projector else self.batch.features * self.width * low
        return int(used * layers[0] + unused * layers[1] + first + projector)

    @property
    def last_mlp_positions(self) -> int:
        """Return the positions at which the last MLP and the last norm are computed; see `SparseLastLayer`."""
        everything, kept_states = self.batch.positions, self.batch.slots
        return kept_states if self.policy.uses_sparse_last_mlp(kept_states, everything) else everything

    @property
    def recomputed_layers(self) -> int:
        """Count the decoder layers that are recomputed in the backward pass."""
        training = self.recipe.training
        names = ("gradient_checkpointing", "activation_checkpointing")
        if self.recipe.frozen_trunk or not any(training.get(name) for name in names):
            return 0
        options = {key: value for name in names for key, value in (training.get(f"{name}_kwargs") or {}).items()}
        return -(-len(self.layers) // int(options.get("every_n_layers", 1)))

    @property
    def offloaded_layers(self) -> int:
        """Count the decoder layers whose activations are on the CPU when the backward pass begins."""
        return len(self.layers) - layers_on_device(len(self.layers), self.policy.activation_offloading)

    @cached_property
    def vision_tower_bytes(self) -> int:
        """Return the bytes of the vision tower's weights."""
        return _weight_bytes(vision_tower(self.trunk_policy.core.model))

    @property
    def recomputed_share(self) -> float:
        return self.recomputed_layers / len(self.layers)

    @cached_property
    def layer_saved_bytes(self) -> int:
        """Return the bytes that one decoder layer saves if nothing is recomputed."""
        return 0 if self.recipe.frozen_trunk else sum(part.of(self.batch.positions) for part in self.layer_parts)

    @property
    def layer_budgeted_bytes(self) -> int:
        """Return the bytes that each decoder layer but the last saves under the recipe's budget."""
        return self.layer_bytes_at(self.batch.positions)

    def layer_bytes_at(self, mlp_positions: int) -> int:
        """Return the bytes that a decoder layer saves under the recipe's `activation_memory_budget`.

        Args:
            mlp_positions: positions at which its MLP is computed.
        """
        if self.recipe.frozen_trunk:
            return 0
        parts = zip(self.layer_parts, (self.batch.positions, mlp_positions), strict=True)
        return saved_within_budget(self.policy.activation_memory_budget, self.layer_input_bytes, *parts)

    @property
    def recompute_bytes(self) -> int:
        """Return the bytes that a decoder layer recomputes at the beginning of its backward pass."""
        return self.layer_saved_bytes - (0 if self.recomputed_layers else self.layer_budgeted_bytes)

    @property
    def layer_input_bytes(self) -> int:
        """Return the bytes of a decoder layer's input: one hidden state per position."""
        stream = 4 if self.recipe.full and self.mixed_precision else self.compute_bytes
        return self.batch.positions * self.width * stream

    @cached_property
    def saved_in_trunk(self) -> int:
        """Return the bytes that the trunk's layers, the projector and the vision tower save."""
        total = self.saved_in_tower
        if not self.recipe.frozen_trunk:
            # Layers either save everything on the GPU (the last one at fewer positions), or only their input.
            resident = len(self.layers) - self.recomputed_layers - self.offloaded_layers
            if resident:
                total += (resident - 1) * self.layer_budgeted_bytes + self.layer_bytes_at(self.last_mlp_positions)
            total += self.recomputed_layers * self.layer_input_bytes
            total += self.last_mlp_positions * (4 * self.width + 4)  # the last norm, in float32
        if self.recipe.tune_mm_mlp_adapter or self.recipe.full:
            total += projector_bytes(self.policy.config, self.compute_bytes, self.mixed_precision).of(
                self.batch.features
            )
        return total

    @cached_property
    def saved_above_trunk(self) -> tuple[int, int]:
        """Return the bytes that post decoder and lm_head save, without logits: on the text and on the image side."""
        head, decoder = self.policy.core.lm_head.weight, self.policy.post_decoder
        flows = self.recipe.tune_post_decoder or not self.recipe.frozen_trunk
        text = images = 0
        if decoder is not None and flows:
            text, images = post_decoder_bytes(decoder, self.batch, self.compute_bytes, self.mixed_precision)
        if head.requires_grad:
            text += self.batch.targets * self.width * self.compute_bytes
            # Autocast's copy of lm_head's weight, which the gradient of its input needs.
            text += head.numel() * self.compute_bytes if flows and self.mixed_precision else 0
        return text, images

    @property
    def saved_bytes(self) -> int:
        """Return all bytes of activations at the beginning of the backward pass, without logits."""
        return self.saved_in_trunk + sum(self.saved_above_trunk)

    @cached_property
    def prefetch_bytes(self) -> int:
        """Return the bytes of the batch and of the next one, which accelerate prefetches to the GPU."""
        batch = self.batch
        if self.recipe.cached_trunk:
            states = 2 * batch.slots * self.width
            features = (
                batch.padded_features * vision_width(self.policy.config) if self.policy.needs_vision_features else 0
            )
            return (states + features) * self.compute_bytes
        # Two batches of kept vision features, or of float32 pixels with three channels.
        return 2 * (
            batch.features * self.kept_width * self.compute_bytes
            if self.features_cached
            else self.patch_count(batch) * 3 * self.patch_size**2 * 4
        )

    @property
    def patch_size(self) -> int:
        size = self.trunk_policy.config.vision_config.patch_size
        return int(size if isinstance(size, int) else size[0])

    def patch_count(self, counts: BatchCounts) -> int:
        """Count the patches that the vision tower reads, without class tokens; Qwen's have two frames each."""
        config = self.trunk_policy.config
        if reads_tower(config):
            of_tile = int(config.vision_config.image_size // self.patch_size) ** 2
            return counts.features // of_tile * of_tile
        frames = getattr(config.vision_config, "temporal_patch_size", 1)
        return counts.features * patches_per_feature(config) * int(frames)

    def tower_bytes(self, counts: BatchCounts) -> tuple[int, int]:
        """Return the bytes of what the vision tower returns for a batch, and of what it takes while it runs."""
        config = self.trunk_policy.config
        vision = config.vision_config
        if reads_tower(config):  # the hidden states of all its layers, at all patches and the class token
            of_tile = int(vision.image_size // self.patch_size) ** 2
            tiles = counts.features // of_tile
            states = tiles * (of_tile + 1) * vision.hidden_size * (vision.num_hidden_layers + 1) * self.compute_bytes
            return states, states
        # One layer at a time: six states of the tower's width, and the MLP's three wide ones.
        blocks = [module for module in vision_tower(self.trunk_policy.core.model).modules() if hasattr(module, "mlp")]
        linears = [m for block in blocks[:1] for m in block.modules() if isinstance(m, nn.Linear)]
        width = min((m.in_features for m in linears), default=0)
        wide = max((m.out_features for m in linears), default=0)
        rows = counts.features * patches_per_feature(config)
        return counts.features * self.width * self.compute_bytes, rows * (6 * width + 3 * wide) * self.compute_bytes

    @property
    def kept_width(self) -> int:
        """Return how many values are kept of a row of vision features (`KeptImage`)."""
        config = self.policy.config
        if family_of(config).projects_rows:
            return tower_width(config)
        return self.width + tower_width(config) * (self.policy.needs_vision_features and reads_tower(config))

    @cached_property
    def layer_workspace_bytes(self) -> int:
        """Return the peak bytes that a decoder layer's backward pass allocates beside saved activations."""
        if self.recipe.frozen_trunk:
            return 0
        largest: int = max(p.numel() for name, p in self.layers[0].named_parameters() if "lora_" not in name)
        # A quantised weight is unpacked whole; the gradient of one that trains exists in both dtypes.
        matrix = largest * (
            self.compute_bytes if self.recipe.bits != 16 else self.compute_bytes + 4 if self.recipe.full else 0
        )
        if self.recipe.use_dora:  # peft sends an identity matrix through LoRA, for the norms of base and LoRA together
            matrix += (int(self.text.intermediate_size) ** 2 + 2 * largest) * self.compute_bytes
        return self.layer_parts[1].workspace * self.batch.positions + matrix

    @cached_property
    def bytes_before_training(self) -> int:
        """Return the peak bytes before training, when the whole model reads a batch without gradients."""
        # Trained parameters are float32 already.
        total = CUBLAS_BYTES + self.frozen_bytes_with_trunk + 4 * self.trained_with_trunk
        if self.recipe.cached_trunk:  # what trains is loaded already, and two shards wait to be stored
            total += self.frozen_bytes + 4 * self.trained_parameters + 2 * SHARD_BYTES
        counts, D, F = self.trunk_batch, self.width, self.text.intermediate_size
        returned, inside = self.tower_bytes(counts)
        moments = [inside // max(1, counts.images) * IMAGE_BATCH if self.features_cached else inside]
        if self.recipe.cached_trunk or self.recipe.needs_reference:
            cast = 4 if self.recipe.lora_enable and self.mixed_precision and self.policy.trunk_pass != "compiled" else 0
            # One decoder layer at a time: six states of width D (counted), and the MLP's three wide ones.
            layer = counts.positions * ((3 * self.compute_bytes + cast) * F + 6 * self.compute_bytes * D)
            moments.append(layer + (0 if self.features_cached else returned))
        return total + int(max(moments))

    @property
    def optimizer_bytes_per_parameter(self) -> int:
        """Return the bytes of the optimizer's state per trained parameter."""
        name = str(self.recipe.training.get("optim", "adamw_torch_fused"))
        if name == "sgd" and "momentum" in str(self.recipe.training.get("optim_args", "")):
            return 4  # one float32 buffer
        return OPTIMIZER_STATE_BYTES.get(name, ADAMW_STATE_BYTES)

    @property
    def accumulates(self) -> bool:
        return int(self.recipe.training.get("gradient_accumulation_steps", 1)) > 1


# Sums over a model's tensors. They take longest, and the jobs that a search compares share their policies.


@lru_cache(maxsize=8)
def _weight_bytes(part: nn.Module) -> int:
    return sum(p.nbytes for p in part.parameters())


@lru_cache(maxsize=8)
def _trained_parameters(policy: Policy) -> int:
    return sum(p.numel() for p in policy.parameters() if p.requires_grad)


@lru_cache(maxsize=8)
def _parameters_outside_units(policy: Policy) -> int:
    """Count the parameters outside the units that FSDP gathers one by one, which it gathers as one more unit."""
    unit_classes = policy._no_split_modules
    units = [module for module in policy.core.modules() if type(module).__name__ in unit_classes]
    inside = {id(p) for unit in units for p in unit.parameters()}
    return sum(p.numel() for p in policy.core.parameters() if id(p) not in inside)


@lru_cache(maxsize=8)
def _frozen_bytes(policy: Policy, bits: int, double_quant: bool) -> int:
    """Return the bytes of the frozen weights, with the language model's linear layers in 4, 8 or 16 bits."""
    total = 0.0
    for name, parameter in policy.core.named_parameters():
        if not parameter.requires_grad:
            in_layers = any(f"{part}.layers." in name for part in LANGUAGE_MODELS)
            quantised = bits != 16 and in_layers and parameter.ndim == 2
            total += parameter.numel() * (
                _quantised_weight_bytes(bits, double_quant) if quantised else parameter.element_size()
            )
    return round(total)


def _quantised_weight_bytes(bits: int, double_quant: bool) -> float:
    """Return the bytes of one weight that bitsandbytes quantised, with its share of the scales.

    With 8 bits, one scale per row is negligible. With 4 bits, 64 weights share a scale: a float32, or with double_quant
    8 bits and a float32 per 256 scales (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3).
    """
    if bits == 8:
        return 1.0
    return 0.5 + ((1 + 4 / 256) / 64 if double_quant else 4 / 64)


# ----------------------------------------------------------------------------------------------------
# Per-GPU memory by part under each strategy: one GPU, DDP, FSDP2, DeepSpeed.
#
# A step's peak is at one of a few moments; see `_moments`. What DeepSpeed and FSDP2 shard follows the stages of ZeRO
# (Rajbhandari et al. 2019, arXiv:1910.02054), with the settings that ship with relook.

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "cache", "workspace")
CUDA_CONTEXT_BYTES = 512 << 20  # the CUDA context, which torch's counters do not see
# DeepSpeed's defaults: `reduce_bucket_size`, and `stage3_max_live_parameters` of ZeRO-3.
BUCKET_PARAMETERS, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
DEEPSPEED = {
    "zero2": "ZeRO-2",
    "zero2_offload": "ZeRO-2, offload",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offload",
}

# What each strategy adds to the command; and the strategies, fastest first, as benchmarks/RESULTS.md measured them.
FLAGS = {"one GPU": "", "DDP": "", "FSDP2": "--fsdp true"}
FLAGS |= {name: f"--deepspeed {file}" for file, name in DEEPSPEED.items()}
FASTEST = ("one GPU", "DDP", "ZeRO-2", "FSDP2", "ZeRO-2, offload", "ZeRO-3", "ZeRO-3, offload")


@dataclass(frozen=True)
class Strategy:
    """Memory of one GPU under a strategy, in bytes; `relook estimate --json` shows it under these names.

    Args:
        name: name of the strategy, a key of FLAGS.
        parts: bytes of each part at the peak of a step.
        largest: the most bytes of each part, at whatever moment.
        before: peak before training.
        processor: CPU memory of one process for what is offloaded.
    """

    name: str
    parts: dict[str, int]
    largest: dict[str, int]
    before: int
    processor: int = 0

    @property
    def flag(self) -> str:
        return FLAGS[self.name]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def decides(self) -> str:
        """Return which peak is higher: "before" training, or in "training"."""
        return "before" if self.before > self.peak else "training"

    def fits(self, memory: float) -> bool:
        """Return True if it fits a GPU of `memory` bytes beside the CUDA context."""
        return max(self.peak, self.before) + CUDA_CONTEXT_BYTES <= memory


def strategies(job: Job, sharded_job: Job, gpus: int) -> list[Strategy]:
    """Return the memory of one GPU under each strategy for `gpus` GPUs; the recipe's own strategy comes first.

    Args:
        job: the run as one GPU or DDP computes it.
        sharded_job: the run as FSDP and DeepSpeed compute it.
        gpus: number of GPUs.
    """
    frozen, trained = job.frozen_bytes, 4 * job.trained_parameters
    optimizer, N = job.optimizer_bytes_per_parameter * job.trained_parameters, gpus
    if N == 1 and job.features_cached:
        frozen -= job.vision_tower_bytes  # `Policy.offload_vision_tower`
    # DDP's buckets hold one more copy of all gradients.
    name, buckets = ("DDP", trained) if N > 1 else ("one GPU", 0)
    offloaded = job.offloaded_layers * job.layer_budgeted_bytes
    rows = [_build_strategy(name, job, frozen + trained, trained, optimizer, buckets, offloaded)]
    if job.recipe.bits == 16:  # quantised weights are not sharded
        rows += [_fsdp(sharded_job, N)] if N > 1 else []
        rows += [_deepspeed(file, sharded_job, N) for file in DEEPSPEED if N > 1 or file.endswith("offload")]
    training = job.recipe.training
    recipe_strategy = (
        "FSDP2" if training.get("fsdp") else DEEPSPEED.get(Path(str(training.get("deepspeed"))).stem, name)
    )
    return sorted(rows, key=lambda strategy: strategy.name != recipe_strategy)


def _fsdp(job: Job, N: int) -> Strategy:
    """Compute FSDP2's memory as `distributed.prepare_fsdp` sets it up.

    Weights, float32 gradients and optimizer state are sharded over N GPUs, and gathered in the compute dtype.
    """
    # Gathered at a time: what is outside the layers, one layer, and the next one, which is prefetched.
    layer = sum(p.numel() for p in job.layers[0].parameters()) if not job.recipe.cached_trunk else 0
    weights = (job.frozen_bytes + 4 * job.trained_parameters) // N
    gathered = (_parameters_outside_units(job.policy) + 2 * layer) * job.compute_bytes
    return _build_strategy(
        "FSDP2",
        job,
        weights,
        4 * job.trained_parameters // N,
        job.optimizer_bytes_per_parameter * job.trained_parameters // N,
        gathered,
    )


def _deepspeed(file: str, job: Job, N: int) -> Strategy:
    """Compute DeepSpeed's memory under one of relook's own settings files, a key of DEEPSPEED."""
    stage, offload = int(file[4]), file.endswith("offload")
    # All weights in the compute dtype; float32 copies of trained ones with the optimizer's state, sharded over N.
    everything = job.frozen_bytes + job.compute_bytes * job.trained_parameters
    copy = (4 + job.optimizer_bytes_per_parameter) * job.trained_parameters // N
    gradients = job.compute_bytes * job.trained_parameters // N
    # With overlap_comm, stage 2 fills one bucket while another is sent.
    buckets = (2 if stage == 2 else 1) * BUCKET_PARAMETERS * job.compute_bytes
    # Stage 3 shards the weights too, and gathers up to LIVE_PARAMETERS of them.
    weights = everything if stage == 2 else everything // N
    live = 0 if stage == 2 else min(LIVE_PARAMETERS * job.compute_bytes, everything)
    processor = 0
    if offload:  # the copies, their gradients and, under stage 3, the weights are on the CPU
        processor = copy + 4 * job.trained_parameters // N + (weights if stage == 3 else 0)
        copy, gradients, weights = 0, 0 if stage == 2 else gradients, 0 if stage == 3 else weights
    else:
        gradients += 4 * job.trained_parameters // N  # in float32 for the step
    return _build_strategy(DEEPSPEED[file], job, weights, gradients, copy, buckets + live, processor)


def _build_strategy(
    name: str, job: Job, weights: int, gradients: int, optimizer: int, workspace: int, processor: int = 0
) -> Strategy:
    """Build a strategy's row from the moment of a step at which most memory is in use."""
    always = {"weights": weights, "optimizer": optimizer, "cache": job.cache_bytes}
    base = workspace + CUBLAS_BYTES + job.prefetch_bytes
    moments = [{**always, **moment, "workspace": base + moment["workspace"]} for moment in _moments(job, gradients)]
    peak = max(moments, key=lambda parts: sum(parts.values()))
    largest = {part: max(moment.get(part, 0) for moment in moments) for part in PARTS}
    return Strategy(name, {part: peak.get(part, 0) for part in PARTS}, largest, job.bytes_before_training, processor)


def _moments(job: Job, gradients: int) -> Sequence[dict[str, int]]:
    """Return the parts, in bytes, at the moments of a step that may be its peak, in the order of the backward pass.

    Args:
        gradients: bytes of the gradients of all trained parameters on one GPU.
    """
    compiled = job.policy.trunk_pass == "compiled"
    logits, rows = logits_bytes(job.text.vocab_size, job.batch.targets, job.compute_bytes, compiled)
    accumulated = gradients if job.accumulates else 0  # gradients of the micro-batches before
    # Shares of all gradients.
    head, above = _trained_share(job, job.policy.core.lm_head), _trained_share(job, job.policy.post_decoder)
    images = job.saved_above_trunk[1]
    # Gradients of the image side's keys and values, in float32 and in the compute dtype.
    image_side = job.batch.padded_features * job.width * 2 * (4 + job.compute_bytes) if images else 0
    layer = job.saved_in_trunk + job.recompute_bytes
    casts = round(head * job.trained_parameters) * job.compute_bytes  # of lm_head's gradient, before it is float32
    # With offloading, each layer's backward pass fetches one more layer, so the number of layers on the GPU is constant
    # until the last one has been fetched. By then as many layers have gradients as were offloaded.
    resident = len(job.layers) - job.offloaded_layers
    done = head + above + (1 - head - above) * job.offloaded_layers / len(job.layers)
    all_fetched = {
        "activations": resident * job.layer_budgeted_bytes + job.recompute_bytes + job.saved_in_tower,
        "gradients": max(accumulated, round(done * gradients)),
        "workspace": job.layer_workspace_bytes,
    }
    after_head = max(accumulated, round(head * gradients))
    after_post_decoder = max(accumulated, round((head + above) * gradients))
    return [
        # The gradient of the logits has been computed, then that of lm_head.
        {"activations": job.saved_bytes, "logits": logits, "gradients": accumulated, "workspace": rows},
        {"activations": job.saved_bytes, "logits": logits // 2, "gradients": after_head, "workspace": casts},
        # The backward pass of the post decoder's image side, then of the last decoder layer.
        {"activations": job.saved_in_trunk + images, "gradients": after_post_decoder, "workspace": image_side},
        {"activations": layer, "gradients": after_post_decoder, "workspace": job.layer_workspace_bytes},
        *([all_fetched] if job.offloaded_layers else []),
        # The backward pass of the first decoder layer, when all gradients are there; then the optimizer's step.
        {
            "activations": job.layer_saved_bytes + job.saved_in_tower,
            "gradients": gradients,
            "workspace": job.layer_workspace_bytes,
        },
        {"gradients": gradients, "workspace": 0},
    ]


def _trained_share(job: Job, module: nn.Module | None) -> float:
    """Return the share of the trained parameters that a module holds."""
    parameters = [] if module is None else list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad) / job.trained_parameters
