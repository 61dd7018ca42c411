"""Answer files: JSON lines that grow as answers come, survive a kill, and end in the order of their questions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from relook.errors import DataError
from relook.files import write_jsonl


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
