"""From examples to batches: what the Trainer's data loader yields, live or from cached trunk states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from relook.data.encode import Example, differing
from relook.data.images import ImageLoader
from relook.errors import DataError, some
from relook.train.policy import LiveBatch, Policy, TrunkStates
from relook.tree import pack, targets_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """One example and what was computed about it before training.

    `reference` holds the reference model's log-probs of the targets (N,), `weight` which targets the preference loss
    counts (N,), `states` the trunk's kept states (S, D).
    """

    example: Example
    reference: Tensor | None = None
    weight: Tensor | None = None
    states: Tensor | None = None


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
        longest = max(map(len, trees))
        packed = pack(trees, self.pad_id, self.policy.keeps_everything, row_length=longest)
        counts = [len(item.example.images) for item in items]
        return LiveBatch(packed, inputs.get("pixel_values"), counts, inputs.get("image_sizes"))

    def cached(self, items: Sequence[Item]) -> TrunkStates:
        targets = targets_of([item.example.tree for item in items], self.policy.keeps_everything)
        T, S = targets.kept_branch.shape
        first = items[0].states
        assert first is not None
        states = first.new_zeros(T, S, first.shape[-1])
        for t, item in enumerate(items):
            assert item.states is not None
            states[t, : len(item.states)] = item.states
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
    for path in dict.fromkeys(path for example in examples for path in example.images):
        try:
            images(path)
        except DataError as error:
            faults[path] = str(error)
    bad = [example for example in examples if faults.keys() & set(example.images)]
    if bad and on_bad == "error":
        raise DataError(f"{len(bad)} samples have unusable images: {some(list(faults.values()), 3)}")
    kept = [example for example in examples if not faults.keys() & set(example.images)]
    return kept, list(faults.values())


def chunks(items: Sequence[Item], size: int) -> Iterator[list[int]]:
    """Indices of items in batches of similar length, so that little is padding."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].example.tree))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@dataclass
class TrunkCache:
    """Trunk states of one set of examples, in memory; `key` names everything that determines them.

    The last one is kept for the process: regimes trained one after the other on one base and data share the pass.
    """

    key: str
    states: list[Tensor]
    features: dict[Path, Tensor]

    last: ClassVar[TrunkCache | None] = None

    def fits(self, key: str, policy: Policy) -> bool:
        return self.key == key and (bool(self.features) or not policy.reads_image)


def cache_key(base: str, policy: Policy, examples: Sequence[Example], images: ImageLoader) -> str:
    """A hash of the base's weights, the preprocessing, every token, and every image file's name, size and time."""
    digest = hashlib.sha256(f"{base} {policy.dtype} {policy.keeps_everything} {images.aspect_ratio}".encode())
    digest.update(repr(images.image_processor).encode())
    for example in examples:
        digest.update(repr(example.tree).encode())
    for path in dict.fromkeys(path for example in examples for path in example.images):
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


@torch.no_grad()
def cache_trunk(policy: Policy, items: Sequence[Item], collator: Collator, size: int, progress: Progress) -> list[Item]:
    """Run the frozen trunk once over all items; keeps states per item and vision features per distinct image."""
    policy.eval()
    device = policy.core.device
    result = list(items)
    collator.features = {}
    done = 0
    for indices in chunks(items, size):
        indices.sort(key=lambda i: -len(items[i].example.tree))  # long trees first: short ones share rows
        batch = [items[i] for i in indices]
        trunk = policy.trunk(collator.live(batch).to(device))
        lengths = (trunk.targets.kept_branch >= 0).sum(1).tolist()
        for i, states, length in zip(indices, trunk.states.cpu(), lengths, strict=True):
            result[i] = replace(items[i], states=states[:length].clone())
        if trunk.features is not None:
            paths = [path for item in batch for path in item.example.images]
            collator.features.update(zip(paths, (kept.cpu().clone() for kept in trunk.features), strict=True))
        done += len(indices)
        progress(done, len(items))
    return result


@torch.no_grad()
def add_reference(
    policy: Policy, items: Sequence[Item], collator: Collator, size: int, dpo_tokens: str, progress: Progress
) -> list[Item]:
    """Reference log-probs, once: the policy before its first step is the reference, so no second model exists."""
    policy.eval()
    device = policy.core.device
    result = list(items)
    done = 0
    for indices in chunks(items, size):
        indices.sort(key=lambda i: -len(items[i].example.tree))  # the collator's order
        batch = collator([items[i] for i in indices])["batch"]
        log_probs = policy(batch.to(device)).cpu()
        counts = [sum(sum(b.supervised) for b in items[i].example.tree.branches) for i in indices]
        for i, reference in zip(indices, log_probs.split(counts), strict=True):
            flags = differing(items[i].example.tree) if dpo_tokens == "differing" else [True] * len(reference)
            result[i] = replace(items[i], reference=reference.clone(), weight=torch.tensor(flags, dtype=torch.float32))
        done += len(indices)
        progress(done, len(items))
    return result
