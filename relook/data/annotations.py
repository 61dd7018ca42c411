"""COCO annotations (Lin et al. 2014, arXiv:1405.0312): which objects are on which image, and what people said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from relook.errors import DataError
from relook.files import read_json, read_text, state_of

# ----------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotations:
    """What an instances file says, by image file name.

    Args:
        images: file names, in the file's order.
        categories: names, in the file's order.
        objects: the categories on each image; empty for images without an annotation.
        boxes: (category, (x, y, width, height) in pixels) of each annotation, in the file's order.
        ids: COCO's number of each image to its file name.
        synonyms: other words for a category, where it has a key `synonyms` (an addition of relook's to COCO's layout).
    """

    images: tuple[str, ...]
    categories: tuple[str, ...]
    objects: Mapping[str, frozenset[str]]
    boxes: Mapping[str, tuple[tuple[str, Box], ...]]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ids: Mapping[Any, str] = field(default_factory=dict)


def read_coco(path: Path) -> Annotations:
    """Read an `instances_*.json` file; one that has not changed since is read once in a process.

    Raises:
        DataError: a part or a field is missing, or an annotation names an unknown image or category.
    """
    return _read_coco(path, *(state_of(path) if path.exists() else ()))


@lru_cache(1)  # COCO's own has 150 MB
def _read_coco(path: Path, *_: int) -> Annotations:
    data = _parts(path, "images", "categories", "annotations")
    try:
        names = {image["id"]: str(image["file_name"]) for image in data["images"]}
        categories = {category["id"]: str(category["name"]) for category in data["categories"]}
        synonyms = {str(c["name"]): tuple(c["synonyms"]) for c in data["categories"] if c.get("synonyms")}
        boxes: dict[str, list[tuple[str, Box]]] = {name: [] for name in names.values()}
        for annotation in data["annotations"]:
            x, y, width, height = annotation["bbox"]
            category = categories[annotation["category_id"]]
            boxes[names[annotation["image_id"]]].append((category, (x, y, width, height)))
    except (KeyError, TypeError, ValueError) as error:
        raise _odd(path, error) from None
    return Annotations(
        images=tuple(names.values()),
        categories=tuple(categories.values()),
        objects={image: frozenset(name for name, _ in found) for image, found in boxes.items()},
        boxes={image: tuple(found) for image, found in boxes.items()},
        synonyms=synonyms,
        ids=names,
    )


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a `captions_*.json` file: what people said, by image file name (CHAIR's truth needs it).

    One that has not changed since is read once in a process.

    Raises:
        DataError: a part or a field is missing, or a caption names an unknown image.
    """
    return _read_captions(path, *(state_of(path) if path.exists() else ()))


@lru_cache(1)  # COCO's own has 200,000 of them
def _read_captions(path: Path, *_: int) -> dict[str, tuple[str, ...]]:
    data = _parts(path, "images", "annotations")
    try:
        names = {image["id"]: str(image["file_name"]) for image in data["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in data["annotations"]:
            captions[names[annotation["image_id"]]].append(str(annotation["caption"]))
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
    what = f"an entry lacks or names the unknown {error}" if isinstance(error, KeyError) else str(error)
    return DataError(f"{path} is not in COCO's layout: {what}.", "Give one of COCO's annotation files.")


# ----------------------------------------------------------------------------------------------------
# Visual Genome (Krishna et al. 2017, arXiv:1602.07332): where the images are, and what is on them.
#
# Image ids are strings here, as in the keys of HA-DPO's `desc_data.json`; Visual Genome's own files hold integers.

T = TypeVar("T")


@dataclass(frozen=True)
class Region:
    """A phrase about a part of an image; `box` is (x, y, width, height) in pixels."""

    phrase: str
    box: Box


def read_image_paths(vg_path: Path) -> dict[str, Path]:
    """Image id to file, from the last two parts of each url in `image_data.json` (`VG_100K` or `VG_100K_2`, and name).

    Raises:
        DataError: the folder or its `image_data.json` is missing, or a record has no image id or url.
    """
    if not vg_path.is_dir():
        raise DataError(f"There is no Visual Genome folder {vg_path}.", "Check vg_path.")
    return _by_image(vg_path / "image_data.json", "image_id", lambda record: vg_path.joinpath(*_tail(record["url"])))


def read_sizes(vg_path: Path) -> dict[str, tuple[int, int]]:
    """Image id to (width, height) in pixels, from `image_data.json`.

    Raises:
        DataError: the file is missing, or a record has no image id or size.
    """
    return _by_image(
        vg_path / "image_data.json", "image_id", lambda record: (int(record["width"]), int(record["height"]))
    )


def read_image_records(vg_path: Path) -> dict[str, dict[str, Any]]:
    """Image id to the whole record of `image_data.json`. Raises DataError as `read_image_paths` does."""
    return _by_image(vg_path / "image_data.json", "image_id", lambda record: dict(record))


def read_objects(vg_path: Path) -> dict[str, frozenset[str]]:
    """Image id to the names of the objects on it, in lower case, from `objects.json`.

    Raises:
        DataError: the file is missing, or a record has no image id or objects.
    """
    return _by_image(
        vg_path / "objects.json",
        "image_id",
        lambda record: frozenset(str(n).strip().lower() for item in record["objects"] for n in item["names"]),
    )


def read_aliases(vg_path: Path) -> dict[str, str]:
    """Other words for an object, in lower case, to its name, from `object_alias.txt`; empty where it is not there.

    A line of the file is a name and its aliases, with commas between.
    """
    path = vg_path / "object_alias.txt"
    lines = read_text(path).splitlines() if path.exists() else []
    groups = [[word for part in line.split(",") if (word := part.strip().lower())] for line in lines]
    return {word: group[0] for group in groups for word in group[1:]}


def read_regions(vg_path: Path) -> dict[str, tuple[Region, ...]]:
    """Image id to its described regions, from `region_descriptions.json`.

    Raises:
        DataError: the file is missing, or a record has no id, phrase or box.
    """
    return _by_image(
        vg_path / "region_descriptions.json",
        "id",
        lambda record: tuple(
            Region(str(r["phrase"]), (r["x"], r["y"], r["width"], r["height"])) for r in record["regions"]
        ),
    )


def _tail(url: str) -> tuple[str, str]:
    folder, name = url.split("/")[-2:]
    return folder, name


def _by_image(path: Path, key: str, value: Callable[[Any], T]) -> dict[str, T]:
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"{path} is not a JSON array.", "Give Visual Genome's own file.")
    found = {}
    for number, record in enumerate(records, 1):
        try:
            found[str(record[key])] = value(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}: record {number} is not in Visual Genome's layout ({type(error).__name__}: {error}).",
                "Give Visual Genome's own file.",
            ) from None
    return found
