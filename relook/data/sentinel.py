"""SENTINEL's pairs of sentences with a context (Peng et al. 2025, arXiv:2507.12455), over Visual Genome's images.

    *_SENTINEL_*.json    {image id: [{"question", "context", "y_win", "y_lose", ...}, ...]}
    *_data_pair.jsonl    a line: {"image_id", "question", "context", "y_win", "y_lose", ...}

As in the original's trainer, a space joins the context and a sentence, and no end mark follows a sentence that has a
context. Without one (null, or empty), a pair is an ordinary pair of answers. A further key of relook's, `complete`,
says otherwise: false for first sentences, which have no context, true for whole answers with one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from relook.data.samples import BadRecord, missing_fields, pair_options, text_fault
from relook.errors import DataError
from relook.files import read_json, read_records

FIELDS = ("question", "y_win", "y_lose")
SUFFIXES = (".json", ".jsonl")


class SentinelRecord(NamedTuple):
    """Record of a pair, with its name in reports."""

    name: str
    image_id: Any
    record: Any


class SentinelPair(NamedTuple):
    """Texts of a pair; both answers begin with `context`."""

    prompt: str
    chosen: str
    rejected: str
    context: str
    complete: bool


def read_sentinel_records(path: str | Path) -> list[SentinelRecord]:
    """Read the records of a file in either layout.

    Raises:
        DataError: the file is missing, or in neither layout.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        lines = enumerate(read_records(path))
        return [SentinelRecord(f"line-{number}", record.get("image_id"), record) for number, record in lines]
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(records, list) for records in content.values()):
        raise DataError(f"{path} is not in SENTINEL's layout.", "It is {image id: [pair, ...]}, or JSON lines.")
    return [
        SentinelRecord(f"{image_id}-{number}", image_id, record)
        for image_id, records in content.items()
        for number, record in enumerate(records)
    ]


def sentinel_pair(record: Any) -> SentinelPair:
    """Return the texts of a record.

    Raises:
        BadRecord: a field is missing, or is no text.
    """
    if fault := missing_fields(record, *FIELDS) or text_fault(*(record[name] for name in FIELDS)):
        raise BadRecord(fault)
    options = pair_options(record)
    context: str = options["context"]
    chosen, rejected = (f"{context} {record[side]}" if context else record[side] for side in ("y_win", "y_lose"))
    complete = not context if record.get("complete") is None else options["complete"]
    return SentinelPair(record["question"], chosen, rejected, context, complete)


def sentinel_texts(pair: SentinelPair) -> dict[str, Any]:
    """Return a record's fields for a pair.

    Raises:
        BadRecord: the layout cannot hold the pair.
    """
    sides = [answer.removeprefix(pair.context) for answer in (pair.chosen, pair.rejected)]
    if pair.context and not all(side.startswith(" ") for side in sides):
        raise BadRecord("no space after the context")
    y_win, y_lose = (side.removeprefix(" ") for side in sides) if pair.context else sides
    texts = {"question": pair.prompt, "context": pair.context or None, "y_win": y_win, "y_lose": y_lose}
    return {**texts, **({"complete": pair.complete} if pair.complete == bool(pair.context) else {})}
