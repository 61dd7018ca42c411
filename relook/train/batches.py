"""From examples to batches: what the Trainer's data loader yields, live or from cached trunk states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from relook.data.ahead import ahead
from relook.data.encode import Example, differing
from relook.data.images import ImageLoader
from relook.errors import DataError, RecipeError, some
from relook.train.policy import LiveBatch, Policy, TrunkStates
from relook.train.tree_pass import packs
from relook.tree import TreeTargets, bucket, join_targets, pack

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """One example and what was computed about it before training.

    `reference` holds the reference model's log-probs of the targets (N,), `weight` which targets the preference loss
    counts (N,), `states` the trunk's kept states (S, D), and `targets` where the targets are among those.
    """

    example: Example
    reference: Tensor | None = None
    weight: Tensor | None = None
    states: Tensor | None = None
    targets: TreeTargets | None = None


@dataclass
class Collator:
    """Builds a batch from items: trunk states where they are cached, packed trees and pixels where not."""

    policy: Policy
    images: ImageLoader
    pad_id: int
    features: dict[Path, Tensor] | None = None  # vision features by image, for cached items

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        items = sorted(items, key=lambda item: -len(item.example.tree))  # long trees first: short ones share rows
        batch: dict[str, Any] = {"batch": self.cached(items) if items[0].states is not None else self.live(items)}
        for name in ("reference", "weight"):
            values = [getattr(item, name) for item in items]
            if values[0] is not None:
                batch[name] = torch.cat(values)
        return batch

    def live(self, items: Sequence[Item]) -> LiveBatch:
        trees = [item.example.tree for item in items]
        paths = [path for item in items for path in item.example.images]
        inputs = self.images.batch(paths) if paths else {}
        everything = self.policy.keeps_everything
        if packs(self.policy.trunk_pass):
            packed = pack(trees, self.pad_id, everything, row_length=sum(map(len, trees)), round_up=bucket)
        else:
            packed = pack(trees, self.pad_id, everything, row_length=max(map(len, trees)))
        counts = [len(item.example.images) for item in items]
        return LiveBatch(packed, inputs.get("pixel_values"), counts, inputs.get("image_sizes"))

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
    if bad and on_bad == "error":
        raise DataError(f"{len(bad)} samples have unusable images: {some(list(faults.values()), 3)}")
    kept = [example for example in examples if not faults.keys() & set(example.images)]
    return kept, list(faults.values())


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
        log_probs = policy(batch.to(policy.core.device)).cpu()
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
