"""Toyworld's scenes: five settings, 24 objects that tend to come together, and exact boxes.

A model trained here on noisy texts claims objects that usually belong to a setting but are not in the picture: the
phenomenon that relook is about, small enough for two CPU cores.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

IMAGE_SIZE = 96
CELLS = 3  # objects stand in the cells of a 3 x 3 grid, so they never overlap
CELL = IMAGE_SIZE // CELLS
SIZES = (15, 27)  # smallest and largest side of an object, pixels
P_CORE, P_COMMON, P_OTHER = 0.65, 0.33, 0.025


@dataclass(frozen=True)
class Setting:
    """Where a scene plays, and which objects are usual there."""

    name: str
    core: tuple[str, ...]
    common: tuple[str, ...]

    def probability(self, name: str) -> float:
        """Prior probability that an object is present."""
        return P_CORE if name in self.core else P_COMMON if name in self.common else P_OTHER


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("kitchen", ("pot", "cup", "plate"), ("apple", "bottle", "chair", "clock")),
        Setting("street", ("car", "bus", "sign"), ("bicycle", "tree", "bird", "bench")),
        Setting("park", ("tree", "bench", "dog"), ("kite", "bird", "flower", "ball")),
        Setting("bedroom", ("bed", "lamp", "book"), ("chair", "clock", "cat", "flower")),
        Setting("beach", ("ball", "umbrella", "boat"), ("kite", "bird", "bottle", "dog")),
    )
}
OBJECTS = tuple(sorted({name for setting in SETTINGS.values() for name in (*setting.core, *setting.common)}))

SPLITS = {"train": 1, "pairs": 100_001, "dev": 200_001, "test": 300_001}
SPLIT_SIZE = 100_000
"""First image id of each split, and how many scenes (so ids) a split holds at most."""


@dataclass(frozen=True)
class PlacedObject:
    """An object and its box (x, y, width, height) in pixels."""

    name: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """One picture's content. `id` is unique over all splits of a world; `seed` fixes how it is drawn."""

    id: int
    setting: str
    objects: tuple[PlacedObject, ...]
    seed: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.objects)


def sample_scene(world_seed: int, split: str, index: int) -> Scene:
    """Draw scene `index` of a split: the same for the same arguments, whatever else is drawn.

    `split` is a key of `SPLITS`, and `index` counts from 0 to below `SPLIT_SIZE`: ids of two splits never meet.
    """
    assert 0 <= index < SPLIT_SIZE, f"{split} has no scene {index}"
    seed = f"{world_seed}/{split}/{index}"
    rng = random.Random(seed)
    setting = SETTINGS[rng.choice(list(SETTINGS))]
    names = [name for name in OBJECTS if rng.random() < setting.probability(name)] or [rng.choice(setting.core)]
    rng.shuffle(names)
    cells = rng.sample(range(CELLS * CELLS), min(len(names), CELLS * CELLS))
    placed = tuple(PlacedObject(name, _box(cell, rng)) for name, cell in zip(names, cells, strict=False))
    return Scene(SPLITS[split] + index, setting.name, placed, seed)


def sample_scenes(world_seed: int, split: str, count: int) -> Iterator[Scene]:
    return (sample_scene(world_seed, split, index) for index in range(count))


def _box(cell: int, rng: random.Random) -> tuple[int, int, int, int]:
    width, height = rng.randint(*SIZES), rng.randint(*SIZES)
    row, column = divmod(cell, CELLS)
    x = column * CELL + rng.randint(0, CELL - width)
    y = row * CELL + rng.randint(0, CELL - height)
    return x, y, width, height
