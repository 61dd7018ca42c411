"""COCO instance annotations: which objects are on which image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from relook.errors import DataError
from relook.files import read_json

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotations:
    """What an annotation file says, by image file name.

    `images` and `categories` keep the file's order; `boxes` are (x, y, width, height) in pixels; `synonyms` are other
    words for a category, where the file names some (an addition of relook's to COCO's layout).
    """

    images: tuple[str, ...]
    categories: tuple[str, ...]
    objects: Mapping[str, frozenset[str]]
    boxes: Mapping[str, tuple[tuple[str, Box], ...]]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_coco(path: Path) -> Annotations:
    """Read an `instances_*.json` file.

    Raises:
        DataError: a part is missing, or an annotation names an unknown image or category.
    """
    data = read_json(path)
    missing = [key for key in ("images", "categories", "annotations") if key not in data]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}.", "Give a COCO instances file.")
    names = {image["id"]: str(image["file_name"]) for image in data["images"]}
    categories = {category["id"]: str(category["name"]) for category in data["categories"]}
    boxes: dict[str, list[tuple[str, Box]]] = {name: [] for name in names.values()}
    for annotation in data["annotations"]:
        try:
            image, category = names[annotation["image_id"]], categories[annotation["category_id"]]
        except KeyError as error:
            raise DataError(f"{path}: annotation {annotation.get('id')} names an unknown id ({error}).") from None
        x, y, width, height = annotation["bbox"]
        boxes[image].append((category, (x, y, width, height)))
    return Annotations(
        tuple(names.values()),
        tuple(categories.values()),
        {image: frozenset(name for name, _ in found) for image, found in boxes.items()},
        {image: tuple(found) for image, found in boxes.items()},
        {str(c["name"]): tuple(c["synonyms"]) for c in data["categories"] if c.get("synonyms")},
    )
