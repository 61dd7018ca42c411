"""The folder of uploaded pictures: what may lie in it, and for how long.

Gradio removes the files that it has given to a browser. Those of a form that it refuses or does not know, and empty
folders, it leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

import anyio.to_thread

KEPT_SECONDS = 3600  # how long an upload stays
EVERY_SECONDS = KEPT_SECONDS // 6  # how often what is older is looked for
MOST_BYTES, MOST_FILES = 2_000_000_000, 10_000


@dataclass(frozen=True)
class Uploads:
    """A folder of uploads; what lies in it at the start stays."""

    folder: Path
    own: frozenset[Path] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "own", frozenset(self.folder.rglob("*")))

    def has(self, path: str) -> bool:
        """Whether a path, with its links followed, leads below the folder. Any other text does not."""
        try:
            return Path(path).resolve().is_relative_to(self.folder.resolve())
        except (ValueError, OSError, RuntimeError):  # a NUL byte, a name too long, links in a circle
            return False

    def full(self) -> bool:
        """Whether no more is taken."""
        files, size = self.sweep()
        return files > MOST_FILES or size > MOST_BYTES

    def sweep(self) -> tuple[int, int]:
        """Remove what Gradio should have removed; how many files are left, and their bytes."""
        old, files, size = time.time() - KEPT_SECONDS - EVERY_SECONDS, 0, 0
        for place, folders, names in os.walk(self.folder, topdown=False):
            for path in (Path(place, name) for name in (*names, *folders)):
                with contextlib.suppress(OSError):  # it is gone meanwhile, or a folder that holds something
                    status = path.lstat()
                    is_folder = stat.S_ISDIR(status.st_mode)
                    if status.st_mtime < old and path not in self.own:
                        path.rmdir() if is_folder else path.unlink()
                    elif not is_folder:
                        files, size = files + 1, size + status.st_size
        return files, size

    async def sweep_often(self) -> None:
        """As long as the server runs."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            await anyio.to_thread.run_sync(self.sweep)
