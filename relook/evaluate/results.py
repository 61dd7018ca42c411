"""Answer files (JSON lines that grow as answers come and survive a kill), and the provenance of results."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from relook import __version__
from relook.errors import DataError, RecipeError
from relook.files import file_hash, read_json_object, write_jsonl

# ----------------------------------------------------------------------------------------------------


class AnswerFile:
    """Append-only file of answers, one JSON object per line, identified by `key`.

    A last line that was truncated by a kill is dropped on opening, so at most the current batch is lost.

    Each of several processes appends to its own file next to it; all processes read all files. `finish` merges them and
    puts the answers in the order of their questions.

    Args:
        rank: rank of the process; rank 0 writes to the file itself.

    Raises:
        DataError: any other line is not an answer with that key.
    """

    def __init__(self, path: Path, key: str, rank: int = 0) -> None:
        self.path, self.key = path, key
        self.own = path.with_suffix(f".{rank}{path.suffix}") if rank else path
        self.records: dict[str, dict[str, Any]] = {}
        # Read the other processes' files too, also those of a run that was killed with more processes than now.
        for part in (path, *self._parts()):
            if part.exists():
                self._read(part)

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.[0-9]*{self.path.suffix}"))

    def _read(self, part: Path) -> None:
        records = []
        lines = part.read_bytes().split(b"\n")  # bytes, since a kill may split a character
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self.records[str(record[self.key])] = record  # a later answer to the same question replaces it
                records.append(record)
            except (ValueError, TypeError, KeyError):
                if number < len(lines):
                    raise DataError(
                        f"{part}, line {number}, is not an answer with {self.key}.", "Remove that line."
                    ) from None
        if lines[-1] and part == self.own:  # other processes may be writing to theirs
            write_jsonl(part, records)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.own.open("a", encoding="utf-8") as file:
            for record in records:
                self.records[str(record[self.key])] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self, order: Sequence[str]) -> list[dict[str, Any]]:
        """Rewrite the file in the order of the questions, as line-by-line scripts expect, and return its records."""
        records = [self.records[key] for key in order]
        write_jsonl(self.path, records)
        for part in self._parts():
            part.unlink()
        return records


# ----------------------------------------------------------------------------------------------------
# Where a number comes from: what every result records under `provenance`.

EVAL_FILE = "eval.json"  # what `relook eval` notes beside its answers
COMPARISON_FILE = "comparison.json"  # what `relook report A B` writes
# What such a record says about model, data and occasion; all else is a setting that answers depend on.
MODEL_HASHES = ("model_hash", "adapter_hash", "vision_tower_hash")
NOT_SETTINGS = (*MODEL_HASHES, "model", "adapter", "vision_tower", "data", "versions", "date")
LIBRARIES = ("torch", "transformers", "tokenizers", "Pillow", "numpy")


def library_versions() -> dict[str, str]:
    """Return the versions that a number may depend on, without importing any library.

    relook's version is that of the running code, which may differ from the installed one, if any.
    """
    interpreter = {"python": platform.python_version(), "relook": __version__}
    return interpreter | {name: _installed_version(name) for name in LIBRARIES}


@functools.cache
def _installed_version(name: str) -> str:
    return version(name)  # which parses all of a library's metadata


def utc_now() -> str:
    """Return the date and time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance(answers: Path, longest: int | None = None, **details: Any) -> dict[str, Any]:
    """Collect what a result depends on.

    Args:
        answers: a `relook eval` folder, which records the model and its hash, precision, template, generation settings,
            library versions and date; or a single file, which is identified by its hash alone.
        longest: the benchmark's upper bound on generated tokens, if it has one.
        details: what the benchmark adds: its parser, the hash of its images, its judge, settings besides greedy.
    """
    if not answers.is_dir():
        return {"answers_sha256": file_hash(answers), **details, "versions": library_versions(), "date": utc_now()}
    recorded: dict[str, Any] = {"versions": library_versions(), "date": utc_now()}
    recorded |= read_json_object(answers / EVAL_FILE, optional=True)
    # The record holds what was asked for; a benchmark with an upper bound generated no more than that.
    tokens = [n for n in (recorded.pop("max_new_tokens", None), longest) if n]
    generation = {"do_sample": False, **({"max_new_tokens": min(tokens)} if tokens else {})}
    return {**recorded, "generation": generation, **details}


def data_folder_of(out: Path) -> Path:
    """Return the data folder that a `relook eval` folder records.

    Raises:
        RecipeError: the folder does not record it.
    """
    recorded = read_json_object(out / EVAL_FILE, optional=True).get("data")
    if not recorded:
        raise RecipeError(f"{out} does not say what data its answers are about.", "Give --data.")
    return Path(recorded)
