"""Visual Genome: where the images are, and what is on them."""

from __future__ import annotations

from pathlib import Path

from relook.errors import DataError
from relook.files import read_json


def read_image_paths(vg_path: Path) -> dict[str, Path]:
    """Image id to file, from the last two parts of each url in `image_data.json` (folder and file)."""
    if not vg_path.is_dir():
        raise DataError(f"There is no Visual Genome folder {vg_path}.", "Check vg_path.")
    paths = {}
    for record in read_json(vg_path / "image_data.json"):
        folder, name = str(record["url"]).split("/")[-2:]
        paths[str(record["image_id"])] = vg_path / folder / name
    return paths


def read_objects(vg_path: Path) -> dict[str, frozenset[str]]:
    """Image id to the names of the objects on it, from `objects.json`."""
    return {
        str(record["image_id"]): frozenset(str(name) for item in record["objects"] for name in item["names"])
        for record in read_json(vg_path / "objects.json")
    }
