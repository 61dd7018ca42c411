"""COCO annotations (Lin et al. 2014, arXiv:1405.0312): which objects are on which image, and what people said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from relook.data.rules import as_id
from relook.errors import DataError
from relook.files import read_json, state_of

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotations:
    """What an instances file says, by image file name.

    Args:
        images: file names, in the file's order.
        categories: names, in the file's order.
        objects: the categories on each image; empty for images without an annotation.
        boxes: (category, (x, y, width, height) in pixels) of each annotation, in the file's order; None for a box that
            the file does not have.
        ids: COCO's number of each image, as `as_id` writes it, to its file name.
        synonyms: other words for a category, where it has a key `synonyms` (an addition of relook's to COCO's layout).
    """

    images: tuple[str, ...]
    categories: tuple[str, ...]
    objects: Mapping[str, frozenset[str]]
    boxes: Mapping[str, tuple[tuple[str, Box | None], ...]]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)


def read_coco(path: str | Path) -> Annotations:
    """Read an `instances_*.json` file; one that has not changed since is read once in a process.

    Raises:
        DataError: a part or a field is missing, or an annotation names an unknown image or category.
    """
    path = Path(path)
    return _read_coco(path, *(state_of(path) if path.exists() else ()))


@lru_cache(1)  # COCO's own has 150 MB
def _read_coco(path: Path, *_: int) -> Annotations:
    data = _parts(path, "images", "categories", "annotations")
    try:
        names = {as_id(image["id"]): str(image["file_name"]) for image in data["images"]}
        categories = {as_id(category["id"]): str(category["name"]) for category in data["categories"]}
        synonyms = {str(c["name"]): tuple(c["synonyms"]) for c in data["categories"] if c.get("synonyms")}
        boxes: dict[str, list[tuple[str, Box | None]]] = {name: [] for name in names.values()}
        for annotation in data["annotations"]:
            category = categories[as_id(annotation["category_id"])]
            boxes[names[as_id(annotation["image_id"])]].append((category, _box(annotation.get("bbox"))))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _odd(path, error) from None
    return Annotations(
        images=tuple(names.values()),
        categories=tuple(categories.values()),
        objects={image: frozenset(name for name, _ in found) for image, found in boxes.items()},
        boxes={image: tuple(found) for image, found in boxes.items()},
        synonyms=synonyms,
        ids=names,
    )


def _box(numbers: Sequence[float] | None) -> Box | None:
    if not numbers:
        return None
    x, y, width, height = numbers
    return x, y, width, height


def read_captions(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read a `captions_*.json` file: what people said, by image file name (CHAIR's truth needs it).

    One that has not changed since is read once in a process.

    Raises:
        DataError: a part or a field is missing, or a caption names an unknown image.
    """
    path = Path(path)
    return _read_captions(path, *(state_of(path) if path.exists() else ()))


@lru_cache(1)  # COCO's own has 200,000 of them
def _read_captions(path: Path, *_: int) -> dict[str, tuple[str, ...]]:
    data = _parts(path, "images", "annotations")
    try:
        names = {as_id(image["id"]): str(image["file_name"]) for image in data["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in data["annotations"]:
            captions[names[as_id(annotation["image_id"])]].append(str(annotation["caption"]))
    except (KeyError, TypeError) as error:
        raise _odd(path, error) from None
    return {image: tuple(said) for image, said in captions.items()}


def _parts(path: Path, *keys: str) -> dict[str, Any]:
    data = read_json(path)
    missing = [key for key in keys if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if missing:
        raise DataError(f"{path} has no list {', '.join(missing)}.", "Give one of COCO's annotation files.")
    return dict(data)


def _odd(path: Path, error: Exception) -> DataError:
    what = f"an entry lacks or names the unknown {error.args[0]}" if isinstance(error, KeyError) else str(error)
    return DataError(f"{path} is not in COCO's layout: {what}.", "Give one of COCO's annotation files.")
