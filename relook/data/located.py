"""Image files whose extension is not the one in the record: `x.JPG` or `x.gif` for `x.jpg`. Standard library alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path


def located(path: Path) -> Path:
    """Return the path, or where nothing is there, that of a file whose extension differs in case alone."""
    if path.is_file():
        return path
    same = (path.with_name(name) for name in same_stem(path) if Path(name).suffix.lower() == path.suffix.lower())
    return next((other for other in same if other.is_file()), path)


def same_stem(path: Path) -> Sequence[str]:
    """List the files beside a path that have its name but for the extension, in order."""
    try:
        return _by_stem(path.parent, path.parent.stat().st_mtime_ns).get(path.stem, ())
    except (OSError, ValueError):  # no such folder, a name too long, a NUL byte
        return ()


@lru_cache(4)  # of hundreds of thousands of files each
def _by_stem(folder: Path, _: int) -> Mapping[str, Sequence[str]]:
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):  # noqa: PTH208 (names alone)
        names.setdefault(Path(name).stem, []).append(name)
    return names
