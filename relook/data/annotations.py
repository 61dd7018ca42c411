"""COCO annotations and captions (Lin et al. 2014, arXiv:1405.0312) and Visual Genome's objects, regions and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from relook.data.samples import as_id
from relook.errors import DataError
from relook.files import file_stamp, read_json, read_text

# ----------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotations:
    """Content of a COCO instances file, by image file name.

    Args:
        images: file names, in the file's order.
        categories: names, in the file's order.
        objects: the categories on each image; empty for images without an annotation.
        boxes: (category, (x, y, width, height) in pixels) of each annotation, in the file's order; None for a missing
            box.
        ids: COCO's id of each image, as `as_id` writes it, to its file name.
        synonyms: other words for a category, from its key `synonyms` (relook's addition to COCO's layout).
    """

    images: tuple[str, ...]
    categories: tuple[str, ...]
    objects: Mapping[str, frozenset[str]]
    boxes: Mapping[str, tuple[tuple[str, Box | None], ...]]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)


def read_coco(path: str | Path) -> Annotations:
    """Read an `instances_*.json` file; an unchanged file is read once per process.

    Raises:
        DataError: a part or a field is missing, or an annotation names an unknown image or category.
    """
    path = Path(path)
    return _read_coco(path, *(file_stamp(path) if path.exists() else ()))


@lru_cache(1)  # COCO's own file has 150 MB
def _read_coco(path: Path, *_: int) -> Annotations:
    content = _parts(path, "images", "categories", "annotations")
    try:
        # Ids are normalised by `as_id`: some tools write them as strings or floats.
        names = {as_id(image["id"]): str(image["file_name"]) for image in content["images"]}
        categories = {as_id(category["id"]): str(category["name"]) for category in content["categories"]}
        synonyms = {str(c["name"]): tuple(c["synonyms"]) for c in content["categories"] if c.get("synonyms")}
        # Start from every image, so that those without an annotation are there with no objects.
        boxes: dict[str, list[tuple[str, Box | None]]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            category = categories[as_id(annotation["category_id"])]
            boxes[names[as_id(annotation["image_id"])]].append((category, _box(annotation.get("bbox"))))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _malformed(path, error) from None
    return Annotations(
        images=tuple(names.values()),
        categories=tuple(categories.values()),
        objects={image: frozenset(name for name, _ in image_boxes) for image, image_boxes in boxes.items()},
        boxes={image: tuple(image_boxes) for image, image_boxes in boxes.items()},
        synonyms=synonyms,
        ids=names,
    )


def _box(numbers: Sequence[float] | None) -> Box | None:
    if not numbers:
        return None
    x, y, width, height = numbers  # a ValueError here is reported as malformed
    return x, y, width, height


def read_captions(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read a `captions_*.json` file: human captions by image file name, which CHAIR's ground truth needs.

    An unchanged file is read once per process.

    Raises:
        DataError: a part or a field is missing, or a caption names an unknown image.
    """
    path = Path(path)
    return _read_captions(path, *(file_stamp(path) if path.exists() else ()))


@lru_cache(1)  # COCO's own file has 200,000 captions
def _read_captions(path: Path, *_: int) -> dict[str, tuple[str, ...]]:
    content = _parts(path, "images", "annotations")
    try:
        names = {as_id(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            captions[names[as_id(annotation["image_id"])]].append(str(annotation["caption"]))
    except (KeyError, TypeError) as error:
        raise _malformed(path, error) from None
    return {image: tuple(texts) for image, texts in captions.items()}


def _parts(path: Path, *keys: str) -> dict[str, Any]:
    content = read_json(path)
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{path} has no list {', '.join(missing)}.", "Give one of COCO's annotation files.")
    return dict(content)


def _malformed(path: Path, error: Exception) -> DataError:
    # A KeyError is either a missing key or the id of an image or category that the file does not list.
    reason = f"an entry lacks or names the unknown {error.args[0]}" if isinstance(error, KeyError) else str(error)
    return DataError(f"{path} is not in COCO's layout: {reason}.", "Give one of COCO's annotation files.")


# ----------------------------------------------------------------------------------------------------
# Visual Genome (Krishna et al. 2017, arXiv:1602.07332): image paths, sizes, objects and regions.
#
# Image ids are strings here, as in the keys of HA-DPO's `desc_data.json`; Visual Genome's own files hold integers.

T = TypeVar("T")


@dataclass(frozen=True)
class Region:
    """Phrase about a part of an image; `box` is (x, y, width, height) in pixels."""

    phrase: str
    box: Box


def read_image_paths(vg_path: str | Path) -> dict[str, Path]:
    """Map image ids to files, by the last two parts of each url in `image_data.json` (`VG_100K` or `VG_100K_2`, name).

    Raises:
        DataError: the folder or its `image_data.json` is missing, or a record has no image id or url.
    """
    vg_path = Path(vg_path)
    if not vg_path.is_dir():
        raise DataError(f"There is no Visual Genome folder {vg_path}.", "Check vg_path.")
    if not (vg_path / "image_data.json").exists():
        raise DataError(f"{vg_path} has no image_data.json: it is no Visual Genome folder.", "Check vg_path.")
    return _by_image(vg_path / "image_data.json", "image_id", lambda record: vg_path.joinpath(*_tail(record["url"])))


def read_sizes(vg_path: str | Path) -> dict[str, tuple[int, int]]:
    """Map image ids to (width, height) in pixels, from `image_data.json`.

    Raises:
        DataError: the file is missing, or a record has no image id or size.
    """
    vg_path = Path(vg_path)
    return _by_image(
        vg_path / "image_data.json", "image_id", lambda record: (int(record["width"]), int(record["height"]))
    )


def read_image_records(vg_path: str | Path) -> dict[str, dict[str, Any]]:
    """Map image ids to their whole records in `image_data.json`. Raises DataError as `read_image_paths` does."""
    vg_path = Path(vg_path)
    return _by_image(vg_path / "image_data.json", "image_id", lambda record: dict(record))


def read_objects(vg_path: str | Path) -> dict[str, frozenset[str]]:
    """Map image ids to the names of the objects on them, in lower case, from `objects.json`.

    Raises:
        DataError: the file is missing, or a record has no image id or objects.
    """
    vg_path = Path(vg_path)
    return _by_image(
        vg_path / "objects.json",
        "image_id",
        lambda record: frozenset(str(n).strip().lower() for entry in record["objects"] for n in entry["names"]),
    )


def read_aliases(vg_path: str | Path) -> dict[str, str]:
    """Map the aliases of an object, in lower case, to its name, from `object_alias.txt`; empty without that file.

    Each line of the file holds a name and its aliases, separated by commas.
    """
    vg_path = Path(vg_path)
    path = vg_path / "object_alias.txt"
    lines = read_text(path).splitlines() if path.exists() else []
    groups = [[word for part in line.split(",") if (word := part.strip().lower())] for line in lines]
    return {word: group[0] for group in groups for word in group[1:]}


def read_regions(vg_path: str | Path) -> dict[str, tuple[Region, ...]]:
    """Map image ids to their described regions, from `region_descriptions.json`.

    Raises:
        DataError: the file is missing, or a record has no id, phrase or box.
    """
    vg_path = Path(vg_path)
    return _by_image(
        vg_path / "region_descriptions.json",
        "id",
        lambda record: tuple(
            Region(str(r["phrase"]), (float(r["x"]), float(r["y"]), float(r["width"]), float(r["height"])))
            for r in record["regions"]
        ),
    )


def _tail(url: str) -> tuple[str, str]:
    folder, name = url.split("/")[-2:]
    return folder, name


def _by_image(path: Path, key: str, value: Callable[[Any], T]) -> dict[str, T]:
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"{path} is not a JSON array.", "Give Visual Genome's own file.")
    by_image = {}
    for number, record in enumerate(records, 1):
        try:
            by_image[as_id(record[key])] = value(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}: record {number} is not in Visual Genome's layout ({type(error).__name__}: {error}).",
                "Give Visual Genome's own file.",
            ) from None
    return by_image
