"""The memory that a run's parts take, as one process has them: sums over shapes. `ways` shares them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from relook.data.encode import Example
from relook.data.packing import arrange, common_root, kept_positions, whole_blocks
from relook.forward.activation_memory import staying
from relook.forward.collate import SHARING
from relook.forward.packed_attention import ADAPTER, ATTENTION_INPUTS, MLP_INPUTS, packs
from relook.forward.policy import LOGITS_BYTES, ROWS, Policy
from relook.model.families import feature_size
from relook.model.post_decoder import PostDecoder
from relook.recipe import Recipe
from relook.train.cache_store import SHARD_BYTES
from relook.train.feature_cache import IMAGES

# ----------------------------------------------------------------------------------------------------
# How many bytes a step keeps for its backward pass, from shapes alone: what `relook estimate` calls activations.
#
# Each term is a tensor that autograd saves; `tests/test_estimate.py` counts those of real steps. Letters: D hidden size,
# F width inside the MLP, A and K numbers in a position's queries and keys, H heads, V width of vision features.
#
# `low` is the size of a number in matrix products: 2 under bf16 and fp16, else 4. `mixed` says that what trains is held
# in float32 beside it: autocast then casts the input of each linear layer that trains, and every cast is a copy of its
# own. Where layers are compiled, torch's min-cut partitioner keeps one of equal copies, and computes again what is cheap.


@dataclass(frozen=True)
class Counts:
    """How large a batch is.

    Args:
        positions: of its rows, padding included, as the language model reads them.
        row: positions of one row.
        slots: kept states of its trees, padded to the longest.
        targets: of the loss.
        images, features: images, and rows of their vision features.
        padded_features: those rows with each tree padded to the most that one has.
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
    def of(examples: Sequence[Example], rows: Sequence[int], policy: Policy) -> Counts:
        """The batch that `Collator` makes of examples.

        Args:
            rows: vision features of each example's images together.
        """
        trees = [example.tree for example in examples]
        root = common_root(trees, policy.config.image_token_id)
        lengths = sorted((len(tree) - root for tree in trees), reverse=True)
        packed = packs(policy.trunk_pass)
        row = whole_blocks(root * -(-len(trees) // SHARING) + sum(lengths)) if packed else root + lengths[0]
        return Counts(
            positions=row if packed else row * len(arrange(lengths, lengths[0])),
            row=row,
            slots=len(trees) * max(len(kept_positions(tree, policy.keeps_everything)) for tree in trees),
            targets=sum(sum(branch.supervised) for tree in trees for branch in tree.branches),
            images=sum(len(example.images) for example in examples),
            features=sum(rows),
            padded_features=len(trees) * max(rows),
            trees=len(trees),
        )


@dataclass(frozen=True)
class Kept:
    """Bytes that a part of the model keeps.

    Args:
        each: for one position.
        fixed: whatever the number of positions.
        cheap: of `each`, what torch computes again first where a compiled layer may not keep everything.
        workspace: the most that the backward pass has beside them, for one position.
    """

    each: int
    fixed: int = 0
    cheap: int = 0
    workspace: int = 0

    def of(self, positions: int) -> int:
        """All of it."""
        return self.each * positions + self.fixed


def within(budget: float, given: int, *parts: tuple[Kept, int]) -> int:
    """Bytes that a layer keeps of its parts, each with its number of positions, under torch's
    `activation_memory_budget`, where it is compiled. `given` bytes are its input.

    Below 1, torch first does without all that is cheap, then chooses what fits a share of the rest.
    """
    everything = sum(part.of(positions) for part, positions in parts)
    if budget == 1:
        return everything
    expensive = sum((part.each - part.cheap) * positions for part, positions in parts)
    return min(expensive, round(given + budget * (everything - given)))


def decoder_layer(
    layer: nn.Module, text: Any, row: int, how: str, low: int, mixed: bool, dropout: float
) -> tuple[Kept, Kept]:
    """A decoder layer of the language model, with or without LoRA: its attention and its gated MLP, each with the norm
    before it.

    Args:
        layer: as training has it; its weights are not looked at.
        row: positions of one row, for the dense mask.
        how: `Policy.trunk_pass`.
        dropout: of LoRA.
    """
    D, F, H = text.hidden_size, text.intermediate_size, text.num_attention_heads
    size = getattr(text, "head_dim", None) or D // H
    A, K = H * size, text.num_key_value_heads * size
    adapters: dict[str, Any] = {
        name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, LoraLayer)
    }
    dora = any(module.lora_variant for module in adapters.values())
    trains = not adapters and any(parameter.requires_grad for parameter in layer.parameters())
    # Compiled, DoRA keeps what it keeps otherwise: its outputs are products of matrices, none of them cheap.
    dense, compiled = how == "dense", how == "compiled" and not dora
    stream = 4 if trains and mixed else low  # bytes of a number in the residual stream

    # Queries, keys, values, output, and the softmax's log-sum in float32. SDPA has its mask as numbers, and keys and
    # values once for each query head.
    attention = (2 * A + 2 * (A if dense else K)) * low + 4 * H + (row * low if dense else 0)
    # Gate, its activation (computed again where compiled), and up.
    mlp = (2 if compiled else 3) * F * low
    # RMSNorm: its input, in float32 unless a compiled layer casts it again (and adds up the second one from the
    # attention's output), and 1 / its root mean square.
    attention += D * (stream if compiled else 4) + 4
    mlp += D * (low if compiled else 4) + 4
    if trains and not compiled:  # the normalised states, for the gradient of the norms' weights
        attention += D * stream
        mlp += D * stream

    inputs = {**dict.fromkeys((*ATTENTION_INPUTS, *MLP_INPUTS), D), "o_proj": A, "down_proj": F}
    wanted = list(adapters) if adapters else list(inputs) if trains else []

    def part(each: int, names: Sequence[str], workspace: int = 0) -> Kept:
        """With what its linear layers are given, for the gradients of their weights."""
        here = [name for name in names if name in wanted]
        if adapters and dropout:  # each its own, and the mask in bytes
            given = sum(inputs[name] for name in here) * low
            each += sum(inputs[name] for name in here)
        elif mixed and not compiled:  # each its own cast; but without LoRA the attention's output needs none
            given = sum(inputs[name] for name in here if adapters or name != "o_proj") * low
        else:  # one side by side; the output projection's is the attention's output, which is there already
            groups = [group for group in (ATTENTION_INPUTS, MLP_INPUTS, ("down_proj",)) if set(group) & set(here)]
            given = sum(inputs[group[0]] for group in groups) * low
        for module in (adapters[name] for name in here if adapters):
            each += module.lora_A[ADAPTER].out_features * low  # between A and B
            each += 2 * module.out_features * low if dora else 0  # its scale multiplies the outputs of base and LoRA
        weights = (p for name, p in layer.named_parameters() if p.requires_grad and p.ndim > 1 and _of(name, names))
        fixed = sum(p.numel() for p in weights) * low if mixed else 0
        return Kept(each + given, fixed, given if compiled else 0, workspace)

    # Gradients of the MLP's three wide tensors and of the residual stream; peft's casts make one of them float32.
    workspace = 3 * F * low + 4 * D * stream + (F * 4 if adapters and mixed and not compiled else 0)
    return part(attention, (*ATTENTION_INPUTS, "o_proj")), part(mlp, (*MLP_INPUTS, "down_proj"), workspace)


def _of(parameter: str, modules: Sequence[str]) -> bool:
    return bool(set(parameter.split(".")) & set(modules))


def projector(config: Any, low: int, mixed: bool) -> Kept:
    """A projector that trains, for a row of vision features: two linear layers' inputs, and the first one's output."""
    D, V = config.text_config.hidden_size, feature_size(config)
    return Kept(int(V + 2 * D) * low, int(V * D + D * D) * low if mixed else 0)


def post_decoder(decoder: PostDecoder, counts: Counts, low: int, mixed: bool) -> tuple[int, int]:
    """Bytes that a post decoder keeps for a batch: of its text side, and of its image side, which goes back last.

    LayerNorm runs in float32 under CUDA's autocast: its input is kept so, with mean and deviation.
    """
    block: Any = decoder.blocks[0]
    D, F = int(block.mlp.gate_proj.in_features), int(block.mlp.gate_proj.out_features)
    depth = len(decoder.blocks)
    states = counts.slots if decoder.reads_all_positions else counts.targets
    norm = 4 * D + 8

    def given(layers: int) -> int:
        """The input of linear layers side by side."""
        return (layers if mixed else 1) * D * low

    each = norm + given(2) + 4 * F * low  # MLP: gate, its activation, up and their product
    padded = image = 0  # for a slot, and for a row of vision features
    if decoder.align is not None:
        linears: list[Any] = list(decoder.align.linears)
        # The inputs of each linear layer and activation, the norm, and each block's keys and values.
        image += linears[0].in_features * low + sum(2 * linear.in_features for linear in linears[1:]) * low + norm
        image += depth * 2 * D * low + (depth * given(2) if mixed else given(1))
        each += norm + 2 * D * low  # the inputs of queries and output projection
        padded += 2 * D * low + 4 * block.cross_attention.num_heads  # queries, output, the softmax's log-sum
    if decoder.reads_all_positions:
        each += norm + given(3) + 4 * D * low + 4 * block.self_attention.num_heads
        padded += counts.slots // counts.trees * low  # the mask as numbers
    fixed = sum(p.numel() for p in decoder.parameters() if p.ndim > 1) * low if mixed else 0
    return int(depth * (states * each + counts.slots * padded) + fixed), int(counts.padded_features * image)


def logits(vocabulary: int, targets: int, low: int, compiled: bool) -> tuple[int, int]:
    """Bytes of the logits and of their gradient, of one chunk (`policy.token_log_probs`); and of what is beside them.

    That is nothing where `log_probs` is compiled; else the parts that the gradient is put together from, or some rows
    of them in float32.
    """
    rows = min(targets, max(1, LOGITS_BYTES // (4 * vocabulary)))
    parts = 0 if compiled else max(rows * vocabulary * low, 3 * min(ROWS, rows) * vocabulary * 4)
    return 2 * rows * vocabulary * low, parts


# ----------------------------------------------------------------------------------------------------

LIBRARIES = 64 << 20  # cuBLAS and cuBLASLt take 32 MiB each on a Hopper GPU
# Bytes of an optimizer's state for each number that trains. Others are counted as AdamW's two moments.
ADAMW = 8
STATE = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "lion_32bit": 4, "paged_lion_32bit": 4, "ademamix": 12}
STATE |= dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2)
STATE |= dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1)


@dataclass(frozen=True)
class Job:
    """A recipe's run on paper.

    Args:
        policy: as training has it, without memory; `whole` is the same with its trunk.
        batch: the largest batch of a step.
        reading: a batch of what comes before: the pass over the trunk, or reference log-probs.
        cache: bytes of states and features on the GPU.
        keeps_features: whether the vision tower's features are computed before training; see `sight`.
        one_type: FSDP and DeepSpeed compute in copies of one type, so that nothing is cast; see `activations`.
    """

    recipe: Recipe
    policy: Policy
    whole: Policy
    batch: Counts
    reading: Counts
    cache: int
    keeps_features: bool
    one_type: bool

    @property
    def low(self) -> int:
        return self.policy.dtype.itemsize

    @property
    def mixed(self) -> bool:
        return self.low < 4 and not self.one_type

    @property
    def text(self) -> Any:
        return self.policy.config.text_config

    @property
    def width(self) -> int:
        return int(self.text.hidden_size)

    @cached_property
    def trained(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.policy.parameters() if p.requires_grad)

    @cached_property
    def frozen(self) -> int:
        """Bytes of the weights that do not train. The projector's are there beside cached states, too."""
        return _frozen(self.policy, self.recipe) + (
            _held(self.whole, "multi_modal_projector") if self.recipe.cached_trunk else 0
        )

    @property
    def layers(self) -> Any:
        return self.whole.core.model.language_model.layers

    @cached_property
    def layer(self) -> tuple[Kept, Kept]:
        """What a decoder layer keeps, where gradients flow through the trunk: its attention and its MLP."""
        return decoder_layer(
            self.layers[0],
            self.text,
            self.batch.row,
            self.policy.trunk_pass,
            self.low,
            self.mixed,
            self.recipe.lora_dropout,
        )

    @property
    def last_positions(self) -> int:
        """Positions of which the last layer's MLP and the last norm are computed; see `LastLayer`."""
        whole, chosen = self.batch.positions, self.batch.slots
        return chosen if self.policy.last_mlp_at_kept(chosen, whole) else whole

    @property
    def recomputed(self) -> int:
        """How many decoder layers are computed again in the backward pass."""
        said = self.recipe.training
        names = ("gradient_checkpointing", "activation_checkpointing")
        if self.recipe.frozen_trunk or not any(said.get(name) for name in names):
            return 0
        arguments = {key: value for name in names for key, value in (said.get(f"{name}_kwargs") or {}).items()}
        return -(-len(self.layers) // int(arguments.get("every_n_layers", 1)))

    @property
    def leaving(self) -> int:
        """How many decoder layers' activations are not on the GPU at the beginning of the backward pass."""
        return len(self.layers) - staying(len(self.layers), self.policy.activation_offloading)

    @property
    def tower(self) -> int:
        """Bytes of the vision tower."""
        return _held(self.whole, "vision_tower")

    @property
    def recomputed_share(self) -> float:
        return self.recomputed / len(self.layers)

    @cached_property
    def one_layer(self) -> int:
        """Bytes that one decoder layer keeps where nothing is computed again."""
        return 0 if self.recipe.frozen_trunk else sum(part.of(self.batch.positions) for part in self.layer)

    @property
    def one_kept(self) -> int:
        """Bytes that a decoder layer keeps, the last one aside."""
        return self.kept_layer(self.batch.positions)

    def kept_layer(self, positions: int) -> int:
        """Bytes that it keeps under the recipe's `activation_memory_budget`.

        Args:
            positions: that its MLP is computed of.
        """
        if self.recipe.frozen_trunk:
            return 0
        parts = zip(self.layer, (self.batch.positions, positions), strict=True)
        return within(self.policy.activation_memory_budget, self.layer_input, *parts)

    @property
    def again(self) -> int:
        """Bytes that the backward pass of a decoder layer computes again before it begins."""
        return self.one_layer - (0 if self.recomputed else self.one_kept)

    @property
    def layer_input(self) -> int:
        stream = 4 if self.recipe.full and self.mixed else self.low
        return self.batch.positions * self.width * stream

    @cached_property
    def kept_below(self) -> int:
        """Bytes that the trunk and the projector keep for the backward pass."""
        low, batch, total = self.low, self.batch, 0
        if not self.recipe.frozen_trunk:
            whole = len(self.layers) - self.recomputed - self.leaving
            if whole:
                total += (whole - 1) * self.one_kept + self.kept_layer(self.last_positions)
            total += self.recomputed * self.layer_input
            total += self.last_positions * (4 * self.width + 4)  # the last norm
        if self.recipe.tune_mm_mlp_adapter or self.recipe.full:
            projector = projector(self.policy.config, low, self.mixed)
            total += projector.each * batch.features + projector.fixed
        return total

    @cached_property
    def kept_above(self) -> tuple[int, int]:
        """The same of what stands above the trunk, logits aside: of the text, and of the images."""
        head, decoder = self.policy.core.lm_head.weight, self.policy.post_decoder
        flows = self.recipe.tune_post_decoder or not self.recipe.frozen_trunk
        text = images = 0
        if decoder is not None and flows:
            text, images = post_decoder(decoder, self.batch, self.low, self.mixed)
        if head.requires_grad:
            text += self.batch.targets * self.width * self.low
            text += head.numel() * self.low if flows and self.mixed else 0  # cast for the gradient of its input
        return text, images

    @property
    def kept(self) -> int:
        """All bytes kept at the beginning of the backward pass, without logits."""
        return self.kept_below + sum(self.kept_above)

    @cached_property
    def waiting(self) -> int:
        """Bytes of the batch, and of the next one, which accelerate has ready on the GPU."""
        batch, side = self.batch, int(self.policy.config.vision_config.image_size)
        width = feature_size(self.policy.config)
        if self.recipe.cached_trunk:
            states = 2 * batch.slots * self.width
            looked_at = batch.padded_features * width if self.policy.reads_image else 0
            return (states + looked_at) * self.low
        return 2 * (
            batch.features * width * self.low if self.keeps_features else self.pictures(batch) * 3 * side**2 * 4
        )

    def pictures(self, counts: Counts) -> int:
        """Images, or the tiles that they are cut into."""
        vision = self.whole.config.vision_config
        return counts.features // int(vision.image_size // vision.patch_size) ** 2

    @cached_property
    def backward(self) -> int:
        """The most bytes that the backward pass of a decoder layer has beside what is kept."""
        if self.recipe.frozen_trunk:
            return 0
        largest: int = max(p.numel() for name, p in self.layers[0].named_parameters() if "lora_" not in name)
        # A quantised weight is unpacked whole; the gradient of one that trains exists in both types.
        matrix = largest * (self.low if self.recipe.bits != 16 else self.low + 4 if self.recipe.full else 0)
        if self.recipe.use_dora:  # peft sends an identity matrix through LoRA, for the norms of base and LoRA together
            matrix += (int(self.text.intermediate_size) ** 2 + 2 * largest) * self.low
        return self.layer[1].workspace * self.batch.positions + matrix

    @cached_property
    def before(self) -> int:
        """Bytes of what comes before training: the whole model reads a batch without gradients."""
        total = LIBRARIES + _frozen(self.whole, self.recipe)
        total += 4 * sum(p.numel() for p in self.whole.parameters() if p.requires_grad)
        if self.recipe.cached_trunk:  # what trains is loaded already, and two shards wait to be stored
            total += self.frozen + 4 * self.trained + 2 * SHARD_BYTES
        counts, vision, D, F = self.reading, self.whole.config.vision_config, self.width, self.text.intermediate_size
        # The tower gives the states of all its layers.
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        seeing = patches * vision.hidden_size * (vision.num_hidden_layers + 1) * self.low
        moments = [seeing * IMAGES if self.keeps_features else 0]
        if self.recipe.cached_trunk or self.recipe.needs_reference:
            cast = 4 if self.recipe.lora_enable and self.mixed and self.policy.trunk_pass != "compiled" else 0
            # Some states of the residual stream, and the MLP's three wide ones.
            reading = counts.positions * ((3 * self.low + cast) * F + 6 * self.low * D)
            moments.append(reading + (0 if self.keeps_features else seeing * self.pictures(counts)))
        return total + int(max(moments))

    @property
    def state(self) -> int:
        """Bytes of the optimizer's state for each number that trains."""
        name = str(self.recipe.training.get("optim", "adamw_torch_fused"))
        if name == "sgd" and "momentum" in str(self.recipe.training.get("optim_args", "")):
            return 4
        return STATE.get(name, ADAMW)

    @property
    def accumulates(self) -> bool:
        return int(self.recipe.training.get("gradient_accumulation_steps", 1)) > 1


def _held(whole: Policy, part: str) -> int:
    """Bytes of the weights of a part of the base model."""
    return sum(p.nbytes for p in getattr(whole.core.model, part).parameters())


def _frozen(policy: Policy, recipe: Recipe) -> int:
    """Bytes of the weights that do not train, the language model's linear layers in the recipe's bits."""
    total = 0.0
    for name, parameter in policy.core.named_parameters():
        if not parameter.requires_grad:
            quantised = recipe.bits != 16 and "language_model.layers." in name and parameter.ndim == 2
            total += parameter.numel() * (_quantised(recipe) if quantised else parameter.element_size())
    return round(total)


def _quantised(recipe: Recipe) -> float:
    """Bytes of a number under bitsandbytes: 8 bits and a scale for each row, which is little; 4 bits and a scale for
    64 of them, in float32 or, with double_quant, in 8 bits with a float32 for 256 (arXiv:2305.14314, section 3)."""
    if recipe.bits == 8:
        return 1.0
    return 0.5 + ((1 + 4 / 256) / 64 if recipe.double_quant else 4 / 64)


# ----------------------------------------------------------------------------------------------------
# The ways in which GPUs share a run, and what each GPU holds then, by part: one GPU or DDP, FSDP2, DeepSpeed.
#
# A step's peak is at one of a few moments; see `_moments`. What DeepSpeed and FSDP2 share out and keep follows their own
# rules (ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054), with the settings that ship with relook.

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "cache", "workspace")
CONTEXT = 512 << 20  # what CUDA itself takes of a GPU, and torch's counters do not see
BUCKET, LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's defaults: numbers of a reduce bucket; live ones under ZeRO-3
DEEPSPEED = {
    "zero2": "ZeRO-2",
    "zero2_offload": "ZeRO-2, offload",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offload",
}


@dataclass(frozen=True)
class Way:
    """What one GPU holds, in bytes.

    Args:
        parts: at the peak of a step.
        largest: the most of each part, at whatever moment.
        before: before training.
        processor: a process's memory outside the GPU, for what is offloaded.
    """

    name: str
    parts: dict[str, int]
    largest: dict[str, int]
    before: int
    processor: int = 0

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def fits(self, memory: float) -> bool:
        """Whether a GPU of so many bytes has room for it, CUDA's own part aside."""
        return max(self.peak, self.before) + CONTEXT <= memory


def ways(job: Job, apart: Job, gpus: int) -> list[Way]:
    """A run on some GPUs, in each way that they can share it; the recipe's own one first.

    Args:
        job: as one GPU, or DDP, has it; `apart` as FSDP and DeepSpeed have it.
    """
    frozen, trained = job.frozen, 4 * job.trained
    optimizer, N = job.state * job.trained, gpus
    if N == 1 and job.keeps_features:
        frozen -= job.tower  # `Policy.rest_tower`
    name, buckets, away = "DDP" if N > 1 else "one GPU", trained if N > 1 else 0, job.leaving * job.one_kept
    found = [_way(name, job, frozen + trained, trained, optimizer, buckets, away)]
    if job.recipe.bits == 16:  # quantised weights are not taken apart
        found += [_fsdp(apart, N)] if N > 1 else []
        found += [_deepspeed(name, apart, N) for name in DEEPSPEED if N > 1 or name.endswith("offload")]
    said = job.recipe.training
    own = "FSDP2" if said.get("fsdp") else DEEPSPEED.get(Path(str(said.get("deepspeed"))).stem, found[0].name)
    return sorted(found, key=lambda way: way.name != own)


def _fsdp(job: Job, N: int) -> Way:
    """FSDP2 as `sharding.prepare_fsdp` sets it up: what trains in float32, gathered in the type of the products."""
    # Whole at a time: what stands around the layers, one layer, and the next one on its way.
    core = job.policy.core
    layer = sum(p.numel() for p in job.layers[0].parameters()) if not job.recipe.cached_trunk else 0
    blocks = [m for m in core.modules() if type(m).__name__ in job.policy._no_split_modules]
    inside = {id(p) for block in blocks for p in block.parameters()}
    around = sum(p.numel() for p in core.parameters() if id(p) not in inside)
    weights = (job.frozen + 4 * job.trained) // N
    gathered = (around + 2 * layer) * job.low
    return _way("FSDP2", job, weights, 4 * job.trained // N, job.state * job.trained // N, gathered)


def _deepspeed(name: str, job: Job, N: int) -> Way:
    """DeepSpeed: all weights in the type of the products, and a float32 copy of what trains with its optimizer."""
    stage, offload = int(name[4]), name.endswith("offload")
    everything = job.frozen + job.low * job.trained
    copy = (4 + job.state) * job.trained // N
    gradients = job.low * job.trained // N
    buckets = (2 if stage == 2 else 1) * BUCKET * job.low  # with overlap_comm stage 2 fills one while another is sent
    weights = everything if stage == 2 else everything // N
    live = 0 if stage == 2 else min(LIVE * job.low, everything)
    processor = 0
    if offload:
        processor = copy + 4 * job.trained // N + (weights if stage == 3 else 0)
        copy, gradients, weights = 0, 0 if stage == 2 else gradients, 0 if stage == 3 else weights
    else:
        gradients += 4 * job.trained // N  # in float32 for the step
    return _way(DEEPSPEED[name], job, weights, gradients, copy, buckets + live, processor)


def _way(name: str, job: Job, weights: int, gradients: int, optimizer: int, workspace: int, processor: int = 0) -> Way:
    """Everything at the moment of a step when there is most."""
    always = {"weights": weights, "optimizer": optimizer, "cache": job.cache}
    base = workspace + LIBRARIES + job.waiting
    moments = [{**always, **moment, "workspace": base + moment["workspace"]} for moment in _moments(job, gradients)]
    most = max(moments, key=lambda parts: sum(parts.values()))
    largest = {part: max(moment.get(part, 0) for moment in moments) for part in PARTS}
    return Way(name, {part: most.get(part, 0) for part in PARTS}, largest, job.before, processor)


def _moments(job: Job, gradients: int) -> Sequence[dict[str, int]]:
    """The moments of a step that may be its peak.

    The gradient of the logits is made; that of lm_head is; the post decoder's image side, or the last decoder layer,
    goes back, when nothing before it has; the last one of those whose activations left has come back; the first decoder
    layer goes back, when all gradients are there; the optimizer steps.
    """
    compiled = job.policy.trunk_pass == "compiled"
    logits, rows = logits(job.text.vocab_size, job.batch.targets, job.low, compiled)
    held = gradients if job.accumulates else 0  # from the micro-batches before
    head, above = _share(job, job.policy.core.lm_head), _share(job, job.policy.post_decoder)
    images = job.kept_above[1]
    looking = job.batch.padded_features * job.width * 2 * (4 + job.low) if images else 0  # gradients of keys and values
    layer = job.kept_below + job.again
    casts = round(head * job.trained) * job.low  # of lm_head's gradient, before it is float32
    # As layers go back others return: until the last has, there are as many as may be, beside gradients of the rest.
    there, gone = len(job.layers) - job.leaving, head + above + (1 - head - above) * job.leaving / len(job.layers)
    returned = {
        "activations": there * job.one_kept + job.again,
        "gradients": max(held, round(gone * gradients)),
        "workspace": job.backward,
    }
    after_head = max(held, round(head * gradients))
    after_all = max(held, round((head + above) * gradients))
    return [
        {"activations": job.kept, "logits": logits, "gradients": held, "workspace": rows},
        {"activations": job.kept, "logits": logits // 2, "gradients": after_head, "workspace": casts},
        {"activations": job.kept_below + images, "gradients": after_all, "workspace": looking},
        {"activations": layer, "gradients": after_all, "workspace": job.backward},
        *([returned] if job.leaving else []),
        {"activations": job.one_layer, "gradients": gradients, "workspace": job.backward},
        {"gradients": gradients, "workspace": 0},
    ]


def _share(job: Job, module: nn.Module | None) -> float:
    """Of all that trains."""
    parameters = [] if module is None else list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad) / job.trained
