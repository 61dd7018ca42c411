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

    Raises:
        DataError: another line is not an answer with that key.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.records: dict[Any, dict[str, Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines = self.path.read_bytes().split(b"\n")  # bytes: a kill may cut a character in two
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self.records[record[self.key]] = record
            except (ValueError, TypeError, KeyError):
                if number < len(lines):
                    raise DataError(
                        f"{self.path}, line {number}, is not an answer with {self.key}.", "Remove that line."
                    ) from None
        if lines[-1]:
            write_jsonl(self.path, self.records.values())

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for record in records:
                self.records[record[self.key]] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self, order: Sequence[Any]) -> list[dict[str, Any]]:
        """Rewrite the file in the order of the questions, as scripts that read line by line expect; returns it."""
        records = [self.records[key] for key in order]
        write_jsonl(self.path, records)
        return records
