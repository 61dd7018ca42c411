"""The memory that a run's parts take, as one process has them: sums over shapes. `ways` shares them out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from relook.model.trunks import feature_size
from relook.recipe import Recipe
from relook.train import activations
from relook.train.activations import Counts, Kept
from relook.train.offload import staying
from relook.train.plan import SHARD_BYTES
from relook.train.policy import Policy
from relook.train.sight import IMAGES

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

    @cached_property
    def trained_whole(self) -> int:
        return sum(p.numel() for p in self.whole.parameters() if p.requires_grad)

    @cached_property
    def frozen_whole(self) -> int:
        return _frozen(self.whole, self.recipe)

    @cached_property
    def around(self) -> int:
        """Numbers of what stands around the units that FSDP gathers one by one."""
        core, units = self.policy.core, self.policy._no_split_modules
        blocks = [m for m in core.modules() if type(m).__name__ in units]
        inside = {id(p) for block in blocks for p in block.parameters()}
        return sum(p.numel() for p in core.parameters() if id(p) not in inside)

    def resized(self, recipe: Recipe, batch: Counts, reading: Counts) -> Job:
        """The same model by another batch, or in other bits. Sums over its tensors, which take longest, are kept."""
        job = replace(self, recipe=recipe, batch=batch, reading=reading)
        kept = {"trained", "trained_whole", "around", "tower"}
        kept |= {"frozen", "frozen_whole"} if recipe.bits == self.recipe.bits else set()
        vars(job).update({name: value for name, value in vars(self).items() if name in kept})
        return job

    @property
    def layers(self) -> Any:
        return self.whole.core.model.language_model.layers

    @cached_property
    def layer(self) -> tuple[Kept, Kept]:
        """What a decoder layer keeps, where gradients flow through the trunk: its attention and its MLP."""
        return activations.decoder_layer(
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

    @cached_property
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
        return activations.within(self.policy.activation_memory_budget, self.layer_input, *parts)

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
            projector = activations.projector(self.policy.config, low, self.mixed)
            total += projector.each * batch.features + projector.fixed
        return total

    @cached_property
    def kept_above(self) -> tuple[int, int]:
        """The same of what stands above the trunk, logits aside: of the text, and of the images."""
        head, decoder = self.policy.core.lm_head.weight, self.policy.post_decoder
        flows = self.recipe.tune_post_decoder or not self.recipe.frozen_trunk
        text = images = 0
        if decoder is not None and flows:
            text, images = activations.post_decoder(decoder, self.batch, self.low, self.mixed)
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
        total = LIBRARIES + self.frozen_whole + 4 * self.trained_whole
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
