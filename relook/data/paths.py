"""Locations of the benchmarks' files in a data folder.

Known are relook's own layout, HA-DPO's tree (`ha_dpo/data`) and the layouts as downloaded. `relook data check` and
`relook eval` both look here, so that they find the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

# ----------------------------------------------------------------------------------------------------

COCO = ("", "coco2014/")  # the second is HA-DPO's


def first_existing(folder: Path, *candidates: str) -> Path:
    """Return the first of `candidates` that exists in a folder, or the first one if none does."""
    paths = [folder / candidate for candidate in candidates]
    return next((path for path in paths if path.exists()), paths[0])


def pope_file(folder: Path, split: str) -> Path:
    """Return POPE's question file of a split."""
    prefixes = ("pope/", "", "output/coco/", "POPE/output/coco/")
    return first_existing(folder, *(f"{prefix}coco_pope_{split}.json" for prefix in prefixes))


def coco_images(folder: Path) -> Path:
    """Return the folder of COCO's val2014 images."""
    return first_existing(folder, *(f"{prefix}val2014" for prefix in COCO), "images")


def coco_annotations(folder: Path, kind: str) -> Path:
    """Return COCO's val2014 annotation file; `kind` is instances or captions."""
    return first_existing(folder, *(f"{prefix}annotations/{kind}_val2014.json" for prefix in COCO))


def visual_genome(folder: Path) -> Path:
    """Return Visual Genome's folder, with `image_data.json`."""
    # The index decides, not the folder's name: an empty vg/ must not hide VG/.
    return first_existing(folder, "vg/image_data.json", "VG/image_data.json", "image_data.json").parent


def shr_file(folder: Path, name: str) -> Path:
    """Return one of SHR's files."""
    return first_existing(folder, f"shr/{name}", name)


def amber_file(folder: Path, name: str) -> Path:
    """Return one of AMBER's files, `data/...` in its repository."""
    return first_existing(folder, *(f"{prefix}{name}" for prefix in ("amber/data/", "amber/", "data/", "")))


def amber_images(folder: Path) -> Path:
    """Return the folder of AMBER's images."""
    return first_existing(_amber(folder), "image", "images", "data/image")


def _amber(folder: Path) -> Path:
    return folder / "amber" if (folder / "amber").is_dir() else folder


# ----------------------------------------------------------------------------------------------------
# Image files whose extension differs from the record's: `x.JPG` or `x.gif` for `x.jpg`. Standard library only.


def resolve_extension(path: Path) -> Path:
    """Return the path, or if nothing is there, that of a file whose extension differs only in case."""
    if path.is_file():
        return path
    siblings = map(path.with_name, same_stem(path))
    candidates = (sibling for sibling in siblings if sibling.suffix.lower() == path.suffix.lower())
    return next(filter(Path.is_file, candidates), path)


def same_stem(path: Path) -> Sequence[str]:
    """List the names of files beside a path that share its stem, in order."""
    try:
        # A folder's mtime changes when a file is added or removed, so the listing is read anew then.
        return _by_stem(path.parent, path.parent.stat().st_mtime_ns).get(path.stem, ())
    except (OSError, ValueError):  # no such folder, a name too long, a NUL byte
        return ()


@lru_cache(4)  # each may hold hundreds of thousands of names
def _by_stem(folder: Path, _: int) -> Mapping[str, Sequence[str]]:
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):  # noqa: PTH208 (names alone)
        names.setdefault(Path(name).stem, []).append(name)
    return names
