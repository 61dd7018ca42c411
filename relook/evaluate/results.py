"""Answer files: JSON lines that grow as answers come, survive a kill, and end in the order of their questions."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from relook import __version__
from relook.errors import DataError
from relook.files import file_hash, read_object, write_jsonl

# ----------------------------------------------------------------------------------------------------


class AnswerFile:
    """An append-only file of answers, one JSON object a line, identified by `key`.

    A last line that a kill cut off is dropped on opening, so at most the batch under way is lost.

    Of several processes each appends to a file of its own beside it; all read all of them, and `finish` makes them one.

    Args:
        rank: of the process; the first one's file is the file itself.

    Raises:
        DataError: another line is not an answer with that key.
    """

    def __init__(self, path: Path, key: str, rank: int = 0) -> None:
        self.path, self.key = path, key
        self.own = path.with_suffix(f".{rank}{path.suffix}") if rank else path
        self.records: dict[str, dict[str, Any]] = {}
        for part in (path, *self._parts()):
            if part.exists():
                self._read(part)

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.[0-9]*{self.path.suffix}"))

    def _read(self, part: Path) -> None:
        records = []
        lines = part.read_bytes().split(b"\n")  # bytes: a kill may cut a character in two
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self.records[str(record[self.key])] = record
                records.append(record)
            except (ValueError, TypeError, KeyError):
                if number < len(lines):
                    raise DataError(
                        f"{part}, line {number}, is not an answer with {self.key}.", "Remove that line."
                    ) from None
        if lines[-1] and part == self.own:  # the others are being written to
            write_jsonl(part, records)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.own.open("a", encoding="utf-8") as file:
            for record in records:
                self.records[str(record[self.key])] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self, order: Sequence[str]) -> list[dict[str, Any]]:
        """Rewrite the file in the order of the questions, as scripts that read line by line expect; returns it."""
        records = [self.records[key] for key in order]
        write_jsonl(self.path, records)
        for part in self._parts():
            part.unlink()
        return records


# ----------------------------------------------------------------------------------------------------
# Where a number comes from: what every result says of itself under `provenance`.

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
