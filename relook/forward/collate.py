"""Collation of examples into the batches of the Trainer's data loader, live or from cached trunk states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from relook.data.encode import Example, differing_tokens
from relook.data.images import GRID, ImageLoader, ImageSource, RandomCrop, prefetch_map, row_count, stack
from relook.data.packing import (
    PADDING,
    Tree,
    TreeTargets,
    common_root_length,
    concatenate_targets,
    pack,
    round_up_to_blocks,
)
from relook.errors import DataError, RecipeError, count_of, preview
from relook.forward.packed_attention import packs_rows
from relook.forward.policy import LiveBatch, Policy, TrunkStates
from relook.forward.positions import tree_positions
from relook.model.families import family_of, patches_per_feature, sees_ahead, tower_state_count
from relook.model.modeling_relook import reads_tower


@dataclass(frozen=True)
class BatchStats:
    """Amount of work in a batch, from which speeds are computed.

    Args:
        pairs: preference pairs, or conversations for SFT.
        tokens: positions that the trunk reads, images included. Positions shared by branches or trees count once;
            padding does not count.
        last_mlp: positions that the trunk's last MLP reads.
        features: rows of vision features, over all images.
        projected: rows that the projector computes.
        encoded: rows that the vision tower computes.
        states: positions that the post decoder processes.
        targets: positions that lm_head reads.
        live: True if the trunk runs, False if its hidden states are cached.
    """

    pairs: int
    tokens: int
    last_mlp: int
    features: int
    projected: int
    encoded: int
    states: int
    targets: int
    live: bool


Progress = Callable[[int, int], None]
# Trees of a packed row that share a root. In FlexAttention's backward pass, one thread block handles all queries that
# see a block of keys, so a root seen by very many queries delays the layer. On an H200, for 8 pairs at 7B, a layer
# takes 1.11 ms with one root and 0.94 ms with two. The pass that fills the trunk cache has no gradients, so it uses one
# root per row.
TREES_PER_ROOT = 4


@dataclass(frozen=True)
class Item:
    """Training example with what was precomputed for it.

    `reference` holds the reference model's log-probs of the targets (N,), and `weight` marks the targets that the
    preference loss counts (N,). `states` holds the trunk's kept hidden states (S, D), and `targets` locates the targets
    among them. With `crop`, a seed, the images are random crops of the example's images. `corrupted` is the chosen
    answer alone, on such crops.
    """

    example: Example
    reference: Tensor | None = None
    weight: Tensor | None = None
    states: Tensor | None = None
    targets: TreeTargets | None = None
    crop: str = ""
    corrupted: Item | None = None

    @property
    def image_sources(self) -> list[ImageSource]:
        images = self.example.images
        return [RandomCrop(path, self.crop) for path in images] if self.crop else list(images)


@dataclass(frozen=True)
class KeptImage:
    """What a frozen vision tower gives of an image, kept so that no step runs it.

    Args:
        tower: its states (M, V), where the projector trains or the post decoder reads them.
        projected: what the image's positions get (`position_rows`), where the projector is frozen; else each step
            projects `tower`.
        inputs: model inputs of the image beside its pixels.
    """

    tower: Tensor | None
    projected: Tensor | None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tower, self.projected) if tensor is not None)


def corrupt(item: Item, seed: int) -> Item:
    """Return a pair's chosen answer on a corrupted image; the crop does not depend on the pair's place in the data."""
    tree = item.example.tree
    return Item(replace(item.example, tree=Tree(tree.prefix, tree.branches[:1])), crop=f"{seed} {item.example.id}")


@dataclass
class Collator:
    """Collator that batches items: trunk states where they are cached, else packed trees and pixels."""

    policy: Policy
    images: ImageLoader
    pad_id: int
    features: Mapping[Path, Tensor] | None = None  # vision features by image path, beside cached trunk states
    # By image path, where the trunk trains and its tower does not.
    vision_features: Mapping[Path, KeptImage] | None = None

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        items = sorted(items, key=lambda item: -len(item.example.tree))  # long trees first: short ones share rows
        pairs = len(items)
        # Corrupted copies follow the pairs, so that the loss finds both by counting.
        items += [item.corrupted for item in items if item.corrupted is not None]
        inputs = self.cached_batch(items) if items[0].states is not None else self.live_batch(items)
        work = self.stats(items, inputs, pairs)  # before a blank image is added, which is no work of the data
        batch: dict[str, Any] = {
            "batch": inputs if any(inputs.image_counts) else self.with_blank_image(inputs),
            "work": work,
        }
        # What the loss needs for each target, (N,) in the order of the policy's log-probs.
        for name in ("reference", "weight"):
            values = [getattr(item, name) for item in items]
            if values[0] is not None:
                batch[name] = torch.cat(values)
        if items[0].example.desirable is not None:
            batch["desirable"] = torch.tensor([item.example.desirable for item in items])
        return batch

    def with_blank_image(self, batch: LiveBatch | TrunkStates) -> LiveBatch | TrunkStates:
        """Add an image that no position sees to a batch without images.

        Trained image-side modules then get zero gradients, and every process calls its sharded modules, whatever the
        batches of the other processes hold. Without it, processes would deadlock waiting for each other's parameters
        or gradients.
        """
        if isinstance(batch, TrunkStates):
            width = self.policy.vision_width
            # One row of zeros (1, V); `pad_images` masks it everywhere.
            return batch if width is None else replace(batch, features=[batch.states.new_zeros(1, width)])
        if self.vision_features:  # no batch calls the tower
            unseen = next(iter(self.vision_features.values()))
            blank = [None if t is None else [torch.zeros_like(t)] for t in (unseen.tower, unseen.projected)]
            return replace(batch, tower=blank[0], projected=blank[1])
        # Else the tower runs on a black picture; no position holds its placeholder.
        inputs = self.images.batch([Image.new("RGB", (32, 32))])
        pixels = inputs.pop("pixel_values")
        return replace(batch, pixel_values=pixels, image_inputs=inputs, image_rows=[row_count(pixels)])

    def live_batch(self, items: Sequence[Item], row_length: int = 0) -> LiveBatch:
        """Build a batch of packed trees with pixels or kept vision features; see `build_live_batch`."""
        shown = [(item.example.tree, item.image_sources) for item in items]
        return build_live_batch(self.policy, self.images, self.pad_id, shown, row_length, self.vision_features)

    def cached_batch(self, items: Sequence[Item]) -> TrunkStates:
        """Build a batch of cached trunk states, padded to (T, S, D)."""
        targets = concatenate_targets([item.targets for item in items if item.targets is not None])
        T, S = targets.kept_branch.shape
        first = items[0].states
        assert first is not None
        # Copy each tree's kept states (s, D) into its row and zero the rest; the mapped files are read here.
        states = first.new_empty(T, S, first.shape[-1])
        for t, item in enumerate(items):
            assert item.states is not None
            states[t, : len(item.states)] = item.states
            states[t, len(item.states) :] = 0
        paths = [path for item in items for path in item.example.images]
        features = [self.features[path] for path in paths] if self.features and paths else None
        return TrunkStates(states, features, [len(item.example.images) for item in items], targets)

    def _image_rows(self, batch: LiveBatch) -> tuple[int, int, int]:
        """Count rows over all images of a batch: vision features, those that the projector and that the tower give."""
        config = self.policy.config
        positions = int((batch.packed.ids == config.image_token_id).sum())
        if GRID in batch.image_inputs:  # a merger makes one row of several patches
            states, projected = int(batch.image_inputs[GRID].prod(-1).sum()), positions
        elif family_of(config).positions is None:
            states, projected = positions * patches_per_feature(config), positions
        else:
            # Only models that tile images need their sizes; elsewhere every image has the same number of features.
            sizes = batch.image_inputs.get("image_sizes", torch.zeros(sum(batch.image_counts), 2)).tolist()
            states = projected = sum(tower_state_count(config, (height, width), 0) for height, width in sizes)
        features = states if reads_tower(config) else positions
        return features, projected, 0 if batch.pixel_values is None else states

    def stats(self, items: Sequence[Item], batch: LiveBatch | TrunkStates, pairs: int) -> BatchStats:
        """Compute the work in a batch; the first `pairs` items are not corrupted copies."""
        trees = [item.example.tree for item in items]
        positions, answers = sum(map(len, trees)), sum(len(tree.branches) for tree in trees)
        # Each tree counts in full here; packed rows may share a root, so that the trunk reads fewer positions.
        tokens, last_mlp, projected, encoded = positions, 0, 0, 0
        if isinstance(batch, TrunkStates):
            targets, features = batch.targets, sum(len(image_features) for image_features in batch.features or [])
        else:
            packed, targets = batch.packed, batch.packed.targets
            features, projected, encoded = self._image_rows(batch)
            tokens = last_mlp = int((packed.tree_index != PADDING).sum())
            if self.policy.uses_sparse_last_mlp(packed.keep.numel(), packed.ids.numel()):
                last_mlp = int((targets.kept_branch != PADDING).sum())
        return BatchStats(
            pairs=pairs if items[0].weight is not None else answers,
            tokens=tokens,
            last_mlp=last_mlp,
            features=features,
            projected=projected,
            encoded=encoded,
            states=positions if self.policy.needs_all_states else len(targets.id),
            targets=len(targets.id),
            live=isinstance(batch, LiveBatch),
        )


def build_live_batch(
    policy: Policy,
    images: ImageLoader,
    pad_id: int,
    items: Sequence[tuple[Tree, Sequence[ImageSource]]],
    row_length: int = 0,
    vision_features: Mapping[Path, KeptImage] | None = None,
) -> LiveBatch:
    """Build a live batch: trees packed as the policy reads them, with the inputs for their images.

    Args:
        policy: the model that reads the batch.
        images: loads and preprocesses pictures.
        pad_id: token id at padding positions.
        items: trees, long ones first, each with the pictures of its prefix.
        row_length: minimum length of a row of many trees; nonzero only where no gradients follow.
        vision_features: kept ones by image path; they replace the pixels if they cover all pictures.
    """
    trees = [tree for tree, _ in items]
    pictures = [picture for _, shown in items for picture in shown]
    known = vision_features or {}
    available = [known[picture] for picture in pictures if isinstance(picture, Path) and picture in known]
    # Kept features are used for all pictures of a batch or for none.
    live = len(available) < len(pictures)
    processed = [images.inputs(picture) for picture in pictures] if live else [image.inputs for image in available]
    inputs, image_rows = stack(processed), [row_count(image["pixel_values"]) for image in processed] if live else None
    counts = [len(shown) for _, shown in items]
    numbers = tree_positions(policy.config, trees, counts, inputs.get("image_grid_thw"))
    both_ways = policy.config.image_token_id if sees_ahead(policy.config) else None
    keep_all, root = policy.needs_all_states, common_root_length(trees, policy.config.image_token_id)
    if packs_rows(policy.trunk_pass):
        at_least = lambda needed: round_up_to_blocks(max(needed, row_length))  # noqa: E731
        sharing = None if row_length else TREES_PER_ROOT
        # One row as long as all trees together, rounded up to whole blocks of FlexAttention's mask.
        packed = pack(trees, pad_id, keep_all, sum(map(len, trees)), at_least, root, sharing, numbers, both_ways)
    else:
        # Rows as long as the longest tree; short trees share a row where they fit.
        packed = pack(
            trees, pad_id, keep_all, max(map(len, trees)), root_length=root, positions=numbers, image_token_id=both_ways
        )
    parts = ([getattr(image, name) for image in available] for name in ("tower", "projected"))
    tower, projected = (None if live or not part or part[0] is None else part for part in parts)
    return LiveBatch(packed, inputs.pop("pixel_values", None), counts, inputs, tower, projected, image_rows)


class ItemDataset(Dataset[Item]):
    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def check_images(examples: Sequence[Example], images: ImageLoader, on_bad: str) -> tuple[list[Example], list[str]]:
    """Decode every image once before training; return the usable examples and the faults of the others.

    Raises:
        DataError: an image is unusable and `on_bad` is "error".
    """
    faults: dict[Path, str] = {}
    paths = list(dict.fromkeys(path for example in examples for path in example.images))
    for path, fault in zip(paths, prefetch_map(partial(_decode_error, images), paths), strict=True):
        if fault:
            faults[path] = fault
    # One bad image spoils every sample that shows it.
    bad = [example for example in examples if faults.keys() & set(example.images)]
    # A description pair is there twice, under one id.
    lost = {path: dict.fromkeys(example.id for example in bad if path in example.images) for path in faults}
    messages = [f"{fault} Its samples: {', '.join(lost[path])}." for path, fault in faults.items()]
    if bad and on_bad == "error":
        message = f"{count_of(len(bad), 'sample')} with unusable images: {preview(messages, 3)}"
        raise DataError(message, "Repair them (relook data fix), or set on_bad drop to go on without.")
    return [example for example in examples if not faults.keys() & set(example.images)], messages


def _decode_error(images: ImageLoader, path: Path) -> str:
    try:
        images(path)
    except DataError as error:
        return str(error)
    return ""


def split_held_out(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Split items by image into a training set and a held-out set, whose images training never sees.

    The split is the same in every run on the same data, whatever its seed.

    Raises:
        RecipeError: a positive `fraction` leaves one of the two sets empty.
    """
    # Distinct images in order of the data, so that the same data gives the same split.
    images = list(dict.fromkeys(path for item in items for path in item.example.images))
    held_out = set(random.Random(0).sample(images, round(fraction * len(images))))
    held_out_items = [item for item in items if held_out & set(item.example.images)]
    training_items = [item for item in items if not held_out & set(item.example.images)]
    if fraction and not (held_out_items and training_items):
        raise RecipeError(
            f"eval_fraction {fraction} of {len(images)} images: {len(training_items)} samples to train on, "
            f"{len(held_out_items)} to test.",
            "Choose another one.",
        )
    return training_items, held_out_items


def length_sorted_batches(items: Sequence[Item], size: int) -> Iterator[list[int]]:
    """Yield batches of item indices with similar lengths, to limit padding; long ones first, as within a batch."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i].example.tree))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def reference_log_probs(
    policy: Policy, items: Sequence[Item], collator: Collator, size: int, report: Progress = lambda done, total: None
) -> list[Tensor]:
    """Compute the reference log-probs of each item's targets before the first step.

    The policy is still the reference then, so no second model is needed.
    """
    policy.eval()  # without dropout, for the reference; the Trainer sets the mode before each step
    by_item: dict[int, Tensor] = {}
    for indices in length_sorted_batches(items, size):
        batch = collator([items[i] for i in indices])["batch"]
        log_probs = policy(batch.to(policy.device)).cpu()
        # The policy returns the targets of all items in one (N,): cut it by each item's number of targets.
        counts = [sum(sum(b.supervised) for b in items[i].example.tree.branches) for i in indices]
        by_item.update(zip(indices, log_probs.split(counts), strict=True))
        report(len(by_item), len(items))
    return [by_item[i] for i in range(len(items))]


def preference_weights(
    example: Example, dpo_tokens: str = "all", unchanged_weight: float = 0.0, ld_alpha: float = 1.0
) -> Tensor:
    """Return the weight of each target of a pair in the preference loss, (N,) float.

    Args:
        dpo_tokens: "differing" gives tokens in which the responses do not differ `unchanged_weight`; "all" gives 1.
        unchanged_weight: 1 / gamma of DDPO (Yu et al. 2024, arXiv:2312.00849), whose value of a response is
            (sum of unchanged log p + gamma * sum of changed log p) / (unchanged + gamma * changed), as the mean over
            these weights is.
        ld_alpha: LD-DPO's alpha (Liu et al. 2024, arXiv:2409.06411): the factor of tokens beyond the length of the
            pair's shorter response; 1 is DPO.
    """
    lengths = [sum(branch.supervised) for branch in example.tree.branches]
    # Index of each target in its own response.
    index = torch.cat([torch.arange(length) for length in lengths])
    weights = torch.where(index < min(lengths), 1.0, ld_alpha)
    if dpo_tokens == "differing":
        weights = weights * torch.where(torch.tensor(differing_tokens(example.tree)), 1.0, unchanged_weight)
    return weights
