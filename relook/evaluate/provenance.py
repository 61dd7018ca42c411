"""Where a number comes from: what every result says of itself under `provenance`."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from relook import __version__
from relook.files import file_hash, read_object

EVAL_FILE = "eval.json"  # what `relook eval` notes beside its answers
LIBRARIES = ("torch", "transformers", "tokenizers", "Pillow", "numpy")


def versions() -> dict[str, str]:
    """Versions that a number may depend on; no library is imported. relook's is that of the code that runs: it need
    not be installed, nor be the one that is."""
    own = {"python": platform.python_version(), "relook": __version__}
    return own | {name: version(name) for name in LIBRARIES}


def now() -> str:
    """Date and time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance(answers: Path, longest: int | None = None, **about: Any) -> dict[str, Any]:
    """What a result depends on.

    Args:
        answers: a folder of `relook eval`: model and its hash, precision, template, generation settings, library
            versions and date are those that it noted. A single file is known by its hash alone.
        longest: tokens, where a benchmark never asks for more.
        about: what the benchmark adds: its parser, the hash of its images, its judge, settings beside greedy.
    """
    if not answers.is_dir():
        return {"answers_sha256": file_hash(answers), **about, "versions": versions(), "date": now()}
    noted = {"versions": versions(), "date": now()} | read_object(answers / EVAL_FILE, optional=True)
    tokens = [n for n in (noted.pop("max_new_tokens", None), longest) if n]
    generation = {"do_sample": False, **({"max_new_tokens": min(tokens)} if tokens else {})}
    return {**noted, "generation": generation, **about}
