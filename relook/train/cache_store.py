"""Layout and storage of a trunk cache: shards, their rows per example or image, their size in bytes, their files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from relook.console import status
from relook.data.encode import Example
from relook.data.images import ImageLoader
from relook.data.packing import assign_rows, common_root_length, kept_positions
from relook.files import atomic_file, file_hash, process_is_alive
from relook.forward.packed_attention import packs_rows
from relook.forward.policy import Policy
from relook.model.families import vision_feature_count
from relook.model.modeling_relook import vision_width

# ----------------------------------------------------------------------------------------------------

SHARD_BYTES = 256 << 20
# Positions per batch of the trunk pass, with one row per tree or with all trees packed into one row. Only trunk_pass,
# which is part of the key, decides between them, so nothing else changes the stored bits. The packed row always has
# this length, so that layers are compiled once. Trees of LLaVA's usual lengths leave 1-2 % of its positions empty.
BATCH_POSITIONS, PACKED_POSITIONS = 4096, 32768
STATES, FEATURES, REFERENCE = "states", "features", "reference"  # the parts


def fits_half_of_memory(size: int) -> bool:
    """Return True if `size` bytes fit in half of the free CPU memory, the criterion of `feature_cache auto`."""
    return bool(size <= psutil.virtual_memory().available // 2)


class Store(Protocol):
    """Mapping of names to tensors: a dict or a `ShardFolder`."""

    def __contains__(self, name: str, /) -> bool: ...
    def __getitem__(self, name: str, /) -> Tensor: ...
    def __setitem__(self, name: str, tensor: Tensor, /) -> None: ...


@dataclass(frozen=True)
class Shard:
    """Batches of example indices, with those of their images that no earlier shard has."""

    number: int
    batches: tuple[tuple[int, ...], ...]
    images: tuple[Path, ...]

    @property
    def examples(self) -> list[int]:
        return [i for batch in self.batches for i in batch]

    def name(self, part: str) -> str:
        return f"{part}-{self.number:05d}"


@dataclass(frozen=True)
class CachePlan:
    """Layout and size of a trunk cache, known before the first forward pass.

    Args:
        examples: the encoded examples.
        states: rows of STATES per example.
        targets: rows of REFERENCE per example.
        features: rows of FEATURES per distinct image.
        widths: values per row of each part.
        dtype: dtype of states and features; reference log-probs are float32.
        keep_all: True if the states of all positions are kept, not only those of the supervised ones.
        batch_positions: positions per batch of the trunk pass.
        root: number of leading tokens that all trees share; a batch holds them once.
    """

    examples: Sequence[Example]
    states: list[int]
    targets: list[int]
    features: dict[Path, int]
    widths: dict[str, int]
    dtype: torch.dtype
    keep_all: bool
    batch_positions: int
    root: int

    @staticmethod
    def of(policy: Policy, examples: Sequence[Example], images: ImageLoader) -> CachePlan:
        """Plan the cache from trees, image sizes and the policy's config alone."""
        trees = [example.tree for example in examples]
        return CachePlan(
            examples,
            [len(kept_positions(tree, policy.needs_all_states)) for tree in trees],
            [sum(sum(branch.supervised) for branch in tree.branches) for tree in trees],
            {
                path: vision_feature_count(policy.config, size, images.position_count(size))
                for path in dict.fromkeys(p for e in examples for p in e.images)
                for size in [images.size(path)]
            },
            {
                STATES: policy.config.text_config.hidden_size,
                FEATURES: vision_width(policy.config),
                REFERENCE: 1,
            },
            policy.dtype,
            policy.needs_all_states,
            PACKED_POSITIONS if packs_rows(policy.trunk_pass) else BATCH_POSITIONS,
            common_root_length(trees, policy.config.image_token_id) if trees else 0,
        )

    def row_bytes(self, part: str) -> int:
        return self.widths[part] * (4 if part == REFERENCE else self.dtype.itemsize)

    def size(self, parts: Sequence[str]) -> int:
        """Compute the bytes of all tensors of these parts, without the header of about 100 bytes per shard file."""
        rows = {STATES: sum(self.states), FEATURES: sum(self.features.values()), REFERENCE: sum(self.targets)}
        return sum(rows[part] * self.row_bytes(part) for part in parts)

    @cached_property
    def batches(self) -> list[list[int]]:
        """Group the examples, longest tree first, into batches of at most `batch_positions`, or of one example.

        Batches are filled before shards are cut, so that packed rows are full.
        """
        # Longest first: trees of similar length share a batch, which pads little.
        order = sorted(range(len(self.examples)), key=lambda i: -len(self.examples[i].tree))
        # The shared root counts once per batch, so it is taken off each tree and off the batch.
        lengths = [len(self.examples[i].tree) - self.root for i in order]
        filled = assign_rows(lengths, self.batch_positions - self.root)
        return [[order[position] for position in batch] for batch in filled]

    @cached_property
    def shards(self) -> list[Shard]:
        """Cut the batches into shards of at most SHARD_BYTES, with at least one whole batch each."""
        seen: set[Path] = set()
        groups: list[tuple[list[list[int]], list[Path]]] = []
        used = SHARD_BYTES  # as if full, so that the first batch opens a shard
        for batch in self.batches:
            # An image belongs to the first shard that shows it.
            new = [
                path for path in dict.fromkeys(p for i in batch for p in self.examples[i].images) if path not in seen
            ]
            # Reference log-probs do not count: 4 bytes per row, against thousands of a hidden state.
            size = sum(self.states[i] for i in batch) * self.row_bytes(STATES)
            size += sum(self.features[path] for path in new) * self.row_bytes(FEATURES)
            if used + size > SHARD_BYTES:
                groups.append(([], []))
                used = 0
            used += size
            seen.update(new)
            groups[-1][0].append(batch)
            groups[-1][1].extend(new)
        return [Shard(n, tuple(map(tuple, batches)), tuple(paths)) for n, (batches, paths) in enumerate(groups)]

    def rows(self, part: str, shard: Shard) -> list[int]:
        """Return the number of rows of each example (for FEATURES, of each image) in a shard's tensor."""
        if part == FEATURES:
            return [self.features[path] for path in shard.images]
        return [(self.states if part == STATES else self.targets)[i] for i in shard.examples]

    def shards_with(self, part: str) -> list[Shard]:
        """Return the shards that have a part; a shard without images of its own has no FEATURES."""
        return [shard for shard in self.shards if part != FEATURES or shard.images]

    def missing(self, store: Store, parts: Sequence[str], shard: Shard) -> list[str]:
        """Return those of the given parts of a shard that the store lacks."""
        return [p for p in parts if (p != FEATURES or shard.images) and shard.name(p) not in store]


# ----------------------------------------------------------------------------------------------------
# Tensors by name, as safetensors files in a folder: written atomically, checked by hash, memory-mapped.

SUFFIX = ".safetensors"
TENSOR_NAME = "data"  # the one tensor's name inside its file


class ShardFolder:
    """Folder of tensors, one safetensors file each, named by content hash so that a corrupt file is detected.

    `name in folder` reads and hashes the whole file, once per process. A corrupt file is removed, and the result is
    False. Tensors are views of the memory-mapped file: pages are read on first access, and processes share them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refresh()

    def refresh(self) -> None:
        """List the folder's files again, including those that other processes wrote."""
        # NAME-HASH.safetensors by NAME.
        self._files = {path.name.rpartition("-")[0]: path for path in self.folder.glob(f"*{SUFFIX}")}

    def has_file(self, name: str) -> bool:
        """Return True if there is a file of that name; its contents are not checked."""
        return name in self._files

    def __contains__(self, name: str, /) -> bool:
        path = self._files.get(name)
        if path is None:
            return False
        # The name ends in the hash of the content, so reading the file once shows whether it is intact.
        if path.name == _file_name(name, file_hash(path)):
            return True
        status(f"  {path} is corrupt: it will be recomputed", style="yellow")
        path.unlink()
        del self._files[name]
        return False

    def __getitem__(self, name: str, /) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(TENSOR_NAME)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor, /) -> None:
        # Serialised in memory, because the file's name holds the hash of its bytes.
        data = save({TENSOR_NAME: tensor.contiguous()})
        path = self.folder / _file_name(name, hashlib.sha256(data).hexdigest())
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
        self._files[name] = path

    def tidy(self) -> None:
        """Remove partial files that killed processes of this machine left."""
        for path in self.folder.glob(f".*{SUFFIX}.*.part"):
            if not process_is_alive(path.name.split(".")[-2]):
                path.unlink(missing_ok=True)


def _file_name(name: str, content: str) -> str:
    return f"{name}-{content[:16]}{SUFFIX}"
