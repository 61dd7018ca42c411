"""The plan of a trunk cache: which rows of which shard belong to which example or image, and how many bytes that is."""

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

from relook.console import say
from relook.data.encode import Example
from relook.data.images import ImageLoader
from relook.data.packing import arrange, common_root, kept_positions
from relook.errors import RelookError
from relook.files import file_hash, runs, whole_file
from relook.forward.packed_attention import packs
from relook.forward.policy import Policy
from relook.model.families import feature_rows, feature_size

# ----------------------------------------------------------------------------------------------------

SHARD_BYTES = 256 << 20
# Of the trunk's pass, with a row for each tree or all in one. Only trunk_pass, which is part of the key, decides
# between them: nothing else changes the bits of what is stored. The one row is always that long, so that layers are
# compiled once; trees of LLaVA's usual lengths leave one or two in a hundred of its positions empty.
BATCH_POSITIONS, PACKED_POSITIONS = 4096, 32768
STATES, FEATURES, REFERENCE = "states", "features", "reference"  # the parts


def half_of_memory_takes(size: int) -> bool:
    """Whether so many bytes fit half of the memory that is free now: what `feature_cache auto` goes by."""
    return bool(size <= psutil.virtual_memory().available // 2)


class Store(Protocol):
    """Tensors by name: a dict, or a folder."""

    def __contains__(self, name: str, /) -> bool: ...
    def __getitem__(self, name: str, /) -> Tensor: ...
    def __setitem__(self, name: str, tensor: Tensor, /) -> None: ...


@dataclass(frozen=True)
class Shard:
    """Some batches of examples, by index, and those of their images that no earlier shard has."""

    number: int
    batches: tuple[tuple[int, ...], ...]
    images: tuple[Path, ...]

    @property
    def examples(self) -> list[int]:
        return [i for batch in self.batches for i in batch]

    def name(self, part: str) -> str:
        return f"{part}-{self.number:05d}"


@dataclass(frozen=True)
class Plan:
    """What will be computed, and how large it is: known before a single forward pass.

    Args:
        states, targets: rows of STATES and of REFERENCE that each example has.
        features: rows of FEATURES that each distinct image has.
        widths: numbers in a row of each part.
        dtype: of states and features; reference log-probs are float32.
        everything: whether the states of all positions are kept.
        batch_positions: of the trunk's pass.
        root: first tokens that all trees share, and a batch has once.
    """

    examples: Sequence[Example]
    states: list[int]
    targets: list[int]
    features: dict[Path, int]
    widths: dict[str, int]
    dtype: torch.dtype
    everything: bool
    batch_positions: int
    root: int

    @staticmethod
    def of(policy: Policy, examples: Sequence[Example], images: ImageLoader) -> Plan:
        trees = [example.tree for example in examples]
        return Plan(
            examples,
            [len(kept_positions(tree, policy.keeps_everything)) for tree in trees],
            [sum(sum(branch.supervised) for branch in tree.branches) for tree in trees],
            {
                path: feature_rows(policy.config, images.size(path))
                for path in dict.fromkeys(p for e in examples for p in e.images)
            },
            {STATES: policy.config.text_config.hidden_size, FEATURES: feature_size(policy.config), REFERENCE: 1},
            policy.dtype,
            policy.keeps_everything,
            PACKED_POSITIONS if packs(policy.trunk_pass) else BATCH_POSITIONS,
            common_root(trees, policy.config.image_token_id) if trees else 0,
        )

    def row_bytes(self, part: str) -> int:
        return self.widths[part] * (4 if part == REFERENCE else self.dtype.itemsize)

    def size(self, parts: Sequence[str]) -> int:
        """Bytes of all tensors of these parts; as files, each shard has a header of some 100 bytes besides."""
        rows = {STATES: sum(self.states), FEATURES: sum(self.features.values()), REFERENCE: sum(self.targets)}
        return sum(rows[part] * self.row_bytes(part) for part in parts)

    @cached_property
    def batches(self) -> list[list[int]]:
        """The examples, longest tree first, in batches of at most `batch_positions`, or of one example.

        They are filled before shards are cut, so that packed rows are full.
        """
        order = sorted(range(len(self.examples)), key=lambda i: -len(self.examples[i].tree))
        lengths = [len(self.examples[i].tree) - self.root for i in order]
        filled = arrange(lengths, self.batch_positions - self.root)
        return [[order[place] for place in batch] for batch in filled]

    @cached_property
    def shards(self) -> list[Shard]:
        """Whole batches, as many as SHARD_BYTES take, and one at least."""
        seen: set[Path] = set()
        groups: list[tuple[list[list[int]], list[Path]]] = []
        used = SHARD_BYTES
        for batch in self.batches:
            new = [
                path for path in dict.fromkeys(p for i in batch for p in self.examples[i].images) if path not in seen
            ]
            size = sum(self.states[i] for i in batch) * self.row_bytes(STATES)
            size += sum(self.features[path] for path in new) * self.row_bytes(FEATURES)
            if used + size > SHARD_BYTES:
                groups.append(([], []))
                used = 0
            used += size
            seen.update(new)
            groups[-1][0].append(batch)
            groups[-1][1].extend(new)
        groups = [group for group in groups if group[0]]
        return [Shard(n, tuple(map(tuple, batches)), tuple(paths)) for n, (batches, paths) in enumerate(groups)]

    def rows(self, part: str, shard: Shard) -> list[int]:
        """How the rows of a shard's tensor divide among its examples, or its images."""
        if part == FEATURES:
            return [self.features[path] for path in shard.images]
        return [(self.states if part == STATES else self.targets)[i] for i in shard.examples]

    def having(self, part: str) -> list[Shard]:
        """The shards that have a part: one without images of its own has no features."""
        return [shard for shard in self.shards if part != FEATURES or shard.images]

    def missing(self, store: Store, parts: Sequence[str], shard: Shard) -> list[str]:
        """Of these parts of a shard, those that a store does not have."""
        return [p for p in parts if (p != FEATURES or shard.images) and shard.name(p) not in store]


# ----------------------------------------------------------------------------------------------------
# Tensors by name as safetensors files in a folder: written whole or not at all, checked by content, mapped.

ENDING = ".safetensors"
DATA = "data"  # the one tensor's name inside its file


class ShardFolder:
    """A folder of tensors. A file's name ends in the hash of its bytes, so that a broken one is noticed.

    `name in folder` reads the whole file, once per process; a broken file is removed, and the answer is no. Tensors are
    views of the mapped file: pages are read when they are touched, and several processes share them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.look()

    def look(self) -> None:
        """Find out which files there are, also those of other processes."""
        self._files = {path.name.rpartition("-")[0]: path for path in self.folder.glob(f"*{ENDING}")}

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, whatever is in it."""
        return name in self._files

    def __contains__(self, name: str, /) -> bool:
        path = self._files.get(name)
        if path is None:
            return False
        if path.name == _file_name(name, file_hash(path)):
            return True
        say(f"  {path} is broken: it is computed again", style="yellow")
        path.unlink()
        del self._files[name]
        return False

    def __getitem__(self, name: str, /) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(DATA)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor, /) -> None:
        data = save({DATA: tensor.contiguous()})
        path = self.folder / _file_name(name, hashlib.sha256(data).hexdigest())
        try:
            with whole_file(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise RelookError(f"{path} cannot be written: {error.strerror}.", "Free some space there.") from None
        self._files[name] = path

    def tidy(self) -> None:
        """Remove what killed processes of this machine left half written."""
        for path in self.folder.glob(f".*{ENDING}.*.part"):
            if not runs(path.name.split(".")[-2]):
                path.unlink(missing_ok=True)


def _file_name(name: str, content: str) -> str:
    return f"{name}-{content[:16]}{ENDING}"
