"""From examples to batches: what the Trainer's data loader yields, live or from cached trunk states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from relook.data.encode import Example, differing
from relook.data.images import Crop, ImageLoader, Picture, ahead
from relook.data.packing import PADDING, Tree, TreeTargets, common_root, join_targets, pack, whole_blocks
from relook.errors import DataError, RecipeError, some
from relook.forward.packed_attention import packs
from relook.forward.policy import LiveBatch, Policy, TrunkStates
from relook.model.families import feature_rows


@dataclass(frozen=True)
class Work:
    """How much there is in a batch: what speeds are counted in.

    Args:
        pairs: preference pairs, or conversations for SFT.
        tokens: positions that the trunk reads, images included; what branches, or trees, share counts once, padding not
            at all.
        last_mlp: positions that its last layer's MLP reads.
        features: rows of vision features, over all images.
        encoded: of these, those that the tower computes.
        states: positions that the post decoder changes.
        targets: positions that lm_head reads.
        live: whether the trunk runs, or its states are cached.
    """

    pairs: int
    tokens: int
    last_mlp: int
    features: int
    encoded: int
    states: int
    targets: int
    live: bool


Progress = Callable[[int, int], None]
# Trees of a packed row that share a root. The backward pass of FlexAttention goes through all that see a block in one
# piece, and a piece for very many is what a layer ends up waiting for: on an H200, for 8 pairs at 7B, 1.11 ms a layer
# with one root, 0.94 with two. The pass that fills the trunk cache, where no gradients follow, has one a row.
SHARING = 4


@dataclass(frozen=True)
class Item:
    """One example and what was computed about it before training.

    `reference` holds the reference model's log-probs of the targets (N,), `weight` which targets the preference loss
    counts (N,), `states` the trunk's kept states (S, D), and `targets` where the targets are among those. With `crop`,
    a seed, the images are random parts of the example's. `corrupted` is the chosen answer alone on such images.
    """

    example: Example
    reference: Tensor | None = None
    weight: Tensor | None = None
    states: Tensor | None = None
    targets: TreeTargets | None = None
    crop: str = ""
    corrupted: Item | None = None

    @property
    def pictures(self) -> list[Picture]:
        images = self.example.images
        return [Crop(path, self.crop) for path in images] if self.crop else list(images)


def corrupted(item: Item, seed: int) -> Item:
    """The chosen answer of a pair on a corrupted image. The crop is the same wherever the pair stands in the data."""
    tree = item.example.tree
    return Item(replace(item.example, tree=Tree(tree.prefix, tree.branches[:1])), crop=f"{seed} {item.example.id}")


@dataclass
class Collator:
    """Builds a batch from items: trunk states where they are cached, packed trees and pixels where not."""

    policy: Policy
    images: ImageLoader
    pad_id: int
    features: Mapping[Path, Tensor] | None = None  # vision features by image, where they are computed once

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        items = sorted(items, key=lambda item: -len(item.example.tree))  # long trees first: short ones share rows
        pairs = len(items)
        items += [item.corrupted for item in items if item.corrupted is not None]
        made = self.cached(items) if items[0].states is not None else self.live(items, features=self.features)
        work = self.work(items, made, pairs)
        batch: dict[str, Any] = {"batch": made if any(made.images) else self.with_blank(made), "work": work}
        for name in ("reference", "weight"):
            values = [getattr(item, name) for item in items]
            if values[0] is not None:
                batch[name] = torch.cat(values)
        return batch

    def with_blank(self, batch: LiveBatch | TrunkStates) -> LiveBatch | TrunkStates:
        """A batch without images, given one that no position sees.

        What trains on the image side then has gradients of zero, and what is sharded is called, in every process,
        whatever the others' batches hold. Without it they would wait for each other's parameters, or for gradients,
        for ever.
        """
        if isinstance(batch, TrunkStates):
            width = self.policy.vision_width
            return batch if width is None else replace(batch, features=[batch.states.new_zeros(1, width)])
        if self.features:  # the tower is not called for other batches, nor for this one
            unseen = torch.zeros_like(next(iter(self.features.values())))
            return replace(batch, features=unseen[None])
        blank = self.images.batch([Image.new("RGB", (32, 32))])
        return replace(batch, pixel_values=blank["pixel_values"], image_sizes=blank.get("image_sizes"))

    def live(
        self, items: Sequence[Item], row_length: int = 0, features: Mapping[Path, Tensor] | None = None
    ) -> LiveBatch:
        """Packed trees and pixels, or what the tower made of them; see `live_batch`."""
        shown = [(item.example.tree, item.pictures) for item in items]
        return live_batch(self.policy, self.images, self.pad_id, shown, row_length, features)

    def cached(self, items: Sequence[Item]) -> TrunkStates:
        targets = join_targets([item.targets for item in items if item.targets is not None])
        T, S = targets.kept_branch.shape
        first = items[0].states
        assert first is not None
        states = first.new_empty(T, S, first.shape[-1])
        for t, item in enumerate(items):
            assert item.states is not None
            states[t, : len(item.states)] = item.states
            states[t, len(item.states) :] = 0
        paths = [path for item in items for path in item.example.images]
        features = [self.features[path] for path in paths] if self.features and paths else None
        return TrunkStates(states, features, [len(item.example.images) for item in items], targets)

    def work(self, items: Sequence[Item], made: LiveBatch | TrunkStates, pairs: int) -> Work:
        """How much there is to do; `pairs` of the items are not a corrupted half."""
        trees = [item.example.tree for item in items]
        everything, answers = sum(map(len, trees)), sum(len(tree.branches) for tree in trees)
        tokens, last_mlp, encoded = everything, 0, 0
        if isinstance(made, TrunkStates):
            targets, features = made.targets, sum(len(one) for one in made.features or [])
        else:
            packed, targets = made.packed, made.packed.targets
            sizes = made.image_sizes.tolist() if made.image_sizes is not None else [(0, 0)] * sum(made.images)
            features = sum(feature_rows(self.policy.config, (height, width)) for height, width in sizes)
            encoded = features if made.features is None else 0
            tokens = last_mlp = int((packed.tree != PADDING).sum())
            if self.policy.last_mlp_at_kept(packed.keep.numel(), packed.ids.numel()):
                last_mlp = int((targets.kept_branch != PADDING).sum())
        return Work(
            pairs=pairs if items[0].weight is not None else answers,
            tokens=tokens,
            last_mlp=last_mlp,
            features=features,
            encoded=encoded,
            states=everything if self.policy.keeps_everything else len(targets.id),
            targets=len(targets.id),
            live=isinstance(made, LiveBatch),
        )


def live_batch(
    policy: Policy,
    images: ImageLoader,
    pad_id: int,
    items: Sequence[tuple[Tree, Sequence[Picture]]],
    row_length: int = 0,
    features: Mapping[Path, Tensor] | None = None,
) -> LiveBatch:
    """Trees, long ones first, each with the pictures of its prefix: packed as the policy reads them, and pixels.

    Args:
        row_length: that a row of many trees has at least; given where no gradients follow.
        features: of images by path; taken instead of pixels where they are those of all pictures.
    """
    trees = [tree for tree, _ in items]
    pictures = [picture for _, shown in items for picture in shown]
    known = [features.get(picture) for picture in pictures if isinstance(picture, Path)] if features else []
    seen = [one for one in known if one is not None]
    inputs = images.batch(pictures) if len(seen) < len(pictures) else {}
    everything, root = policy.keeps_everything, common_root(trees, policy.config.image_token_id)
    if packs(policy.trunk_pass):
        at_least = lambda needed: whole_blocks(max(needed, row_length))  # noqa: E731
        sharing = None if row_length else SHARING
        packed = pack(trees, pad_id, everything, sum(map(len, trees)), at_least, root, sharing)
    else:
        packed = pack(trees, pad_id, everything, max(map(len, trees)), root=root)
    counts = [len(shown) for _, shown in items]
    # A copy: what a worker sends would take all that its storage holds along.
    stored = torch.stack(seen) if pictures and not inputs else None
    return LiveBatch(packed, inputs.get("pixel_values"), counts, inputs.get("image_sizes"), stored)


class Items(Dataset[Item]):
    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def check_images(examples: Sequence[Example], images: ImageLoader, on_bad: str) -> tuple[list[Example], list[str]]:
    """Decode every image once before training; returns the usable examples and what is wrong with the others."""
    faults: dict[Path, str] = {}
    paths = list(dict.fromkeys(path for example in examples for path in example.images))
    for path, fault in zip(paths, ahead(partial(_fault, images), paths), strict=True):
        if fault:
            faults[path] = fault
    bad = [example for example in examples if faults.keys() & set(example.images)]
    lost = {path: [example.id for example in bad if path in example.images] for path in faults}
    named = [f"{fault} Its samples: {', '.join(lost[path])}." for path, fault in faults.items()]
    if bad and on_bad == "error":
        what = f"{len(bad)} samples have unusable images: {some(named, 3)}"
        raise DataError(what, "Repair them (relook data fix), or set on_bad drop to go on without.")
    return [example for example in examples if not faults.keys() & set(example.images)], named


def _fault(images: ImageLoader, path: Path) -> str:
    try:
        images(path)
    except DataError as error:
        return str(error)
    return ""


def hold_out(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Items to train on, and those on a share of the images, which training never sees. The choice is the same in
    every run on the same data, whatever its seed."""
    images = list(dict.fromkeys(path for item in items for path in item.example.images))
    held = set(random.Random(0).sample(images, round(fraction * len(images))))
    out = [item for item in items if held & set(item.example.images)]
    kept = [item for item in items if not held & set(item.example.images)]
    if fraction and not (out and kept):
        raise RecipeError(
            f"eval_fraction {fraction} of {len(images)} images: {len(kept)} samples to train on, {len(out)} to test.",
            "Choose another one.",
        )
    return kept, out


def chunks(items: Sequence[Item], size: int) -> Iterator[list[int]]:
    """Indices of items in batches of similar length, so that little is padding; long ones first, as in a batch."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i].example.tree))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def reference_log_probs(
    policy: Policy, items: Sequence[Item], collator: Collator, size: int, report: Progress = lambda done, total: None
) -> list[Tensor]:
    """Log-probs of each item's targets, before the first step: the policy then is the reference, and no second model
    exists."""
    policy.eval()
    found: dict[int, Tensor] = {}
    for indices in chunks(items, size):
        batch = collator([items[i] for i in indices])["batch"]
        log_probs = policy(batch.to(policy.device)).cpu()
        counts = [sum(sum(b.supervised) for b in items[i].example.tree.branches) for i in indices]
        found.update(zip(indices, log_probs.split(counts), strict=True))
        report(len(found), len(items))
    return [found[i] for i in range(len(items))]


def preference_weight(example: Example, dpo_tokens: str) -> Tensor:
    """1 for each target (N,) of a pair that the preference loss counts, else 0."""
    count = sum(sum(branch.supervised) for branch in example.tree.branches)
    return (
        torch.tensor(differing(example.tree), dtype=torch.float32) if dpo_tokens == "differing" else torch.ones(count)
    )
