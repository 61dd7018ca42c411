"""Visual Genome (Krishna et al. 2017, arXiv:1602.07332): where the images are, and what is on them.

Image ids are strings here, as in the keys of HA-DPO's `desc_data.json`; Visual Genome's own files hold integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from relook.data.rules import as_id
from relook.errors import DataError
from relook.files import read_json, read_text

T = TypeVar("T")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Region:
    """A phrase about a part of an image; `box` is (x, y, width, height) in pixels."""

    phrase: str
    box: Box


def read_image_paths(vg_path: str | Path) -> dict[str, Path]:
    """Image id to file, from the last two parts of each url in `image_data.json` (`VG_100K` or `VG_100K_2`, and name).

    Raises:
        DataError: the folder or its `image_data.json` is missing, or a record has no image id or url.
    """
    vg_path = Path(vg_path)
    if not vg_path.is_dir():
        raise DataError(f"There is no Visual Genome folder {vg_path}.", "Check vg_path.")
    return _by_image(vg_path / "image_data.json", "image_id", lambda record: vg_path.joinpath(*_tail(record["url"])))


def read_sizes(vg_path: str | Path) -> dict[str, tuple[int, int]]:
    """Image id to (width, height) in pixels, from `image_data.json`.

    Raises:
        DataError: the file is missing, or a record has no image id or size.
    """
    vg_path = Path(vg_path)
    return _by_image(
        vg_path / "image_data.json", "image_id", lambda record: (int(record["width"]), int(record["height"]))
    )


def read_image_records(vg_path: str | Path) -> dict[str, dict[str, Any]]:
    """Image id to the whole record of `image_data.json`. Raises DataError as `read_image_paths` does."""
    vg_path = Path(vg_path)
    return _by_image(vg_path / "image_data.json", "image_id", lambda record: dict(record))


def read_objects(vg_path: str | Path) -> dict[str, frozenset[str]]:
    """Image id to the names of the objects on it, in lower case, from `objects.json`.

    Raises:
        DataError: the file is missing, or a record has no image id or objects.
    """
    vg_path = Path(vg_path)
    return _by_image(
        vg_path / "objects.json",
        "image_id",
        lambda record: frozenset(str(n).strip().lower() for item in record["objects"] for n in item["names"]),
    )


def read_aliases(vg_path: str | Path) -> dict[str, str]:
    """Other words for an object, in lower case, to its name, from `object_alias.txt`; empty where it is not there.

    A line of the file is a name and its aliases, with commas between.
    """
    vg_path = Path(vg_path)
    path = vg_path / "object_alias.txt"
    lines = read_text(path).splitlines() if path.exists() else []
    groups = [[word for part in line.split(",") if (word := part.strip().lower())] for line in lines]
    return {word: group[0] for group in groups for word in group[1:]}


def read_regions(vg_path: str | Path) -> dict[str, tuple[Region, ...]]:
    """Image id to its described regions, from `region_descriptions.json`.

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
    found = {}
    for number, record in enumerate(records, 1):
        try:
            found[as_id(record[key])] = value(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}: record {number} is not in Visual Genome's layout ({type(error).__name__}: {error}).",
                "Give Visual Genome's own file.",
            ) from None
    return found
