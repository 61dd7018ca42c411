"""Immutable sample types, read reports, and the rules for single records that all readers share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from relook.errors import DataError, RecipeError, count_of, preview

# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferencePair:
    """Images and prompt with a preferred and a dispreferred response.

    Args:
        prompt: the bare question, without role names or a template. It has one `<image>` for each image, or none: the
            images then stand before it.
        context: text with which both responses begin. It is read like the prompt and not supervised.
        complete: False if the responses break off, as sentences of a longer answer do. No end mark follows them.
        desirable: None for a pair. Of a single rated answer, for KTO: whether `chosen` is good; `rejected` is then the
            answer to another prompt, which tells how far the policy is from the reference.
    """

    id: str
    images: tuple[Path, ...]
    prompt: str
    chosen: str
    rejected: str
    context: str = ""
    complete: bool = True
    desirable: bool | None = None


@dataclass(frozen=True)
class Turn:
    """Single exchange of a conversation.

    Args:
        prompt: may hold `<image>` placeholders, in the order of the images.
        context: beginning of `response` that is not supervised.
        complete: False if the response breaks off before its end mark.
    """

    prompt: str
    response: str
    context: str = ""
    complete: bool = True


@dataclass(frozen=True)
class Conversation:
    """Supervised sample: zero or more images and one or more exchanges."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Question:
    """Question on one image. `label` is the expected answer ("yes" or "no"), empty if unknown."""

    id: str
    image: Path
    text: str
    label: str = ""


# ----------------------------------------------------------------------------------------------------
# Records that a reader used, skipped or dropped: counted by reason and named, so that none is lost silently.

ON_BAD = ("drop", "error")


@dataclass(frozen=True)
class ReadReport:
    """Account of one reader's samples: used, skipped and dropped.

    Args:
        source: the file or files that were read.
        used: number of samples returned.
        reasons: why samples were dropped, and the names of those samples.
        skipped: records that the format itself leaves out, counted by reason. They are not faults.
        note: anything else that may surprise a user.
    """

    source: str
    used: int
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    note: str = field(default="", compare=False)

    @property
    def dropped(self) -> int:
        return sum(map(len, self.reasons.values()))

    @property
    def faults(self) -> str:
        """Return the reasons why samples were dropped, each with their number and the first names."""
        return "; ".join(f"{reason}: {len(names):,} ({preview(names, 3)})" for reason, names in self.reasons.items())

    def summary(self) -> str:
        """Summarise in one line how many samples were used, skipped and dropped, and why."""
        parts = [count_of(self.used, "sample")]
        parts += [f"{count:,} skipped ({reason})" for reason, count in self.skipped.items()]
        parts.append(f"{self.dropped:,} dropped ({self.faults})" if self.reasons else "none dropped")
        return f"{self.source}: {', '.join(parts)}."


class DropLog:
    """Log of the records that a reader leaves out; `report` returns the result.

    Args:
        source: the file that is read, for messages.
        on_bad: "drop" notes bad samples; "error" refuses the file for them, all in one error.

    Raises:
        RecipeError: `on_bad` is something else.
    """

    def __init__(self, source: str, on_bad: str) -> None:
        if on_bad not in ON_BAD:
            raise RecipeError(f"on_bad is {on_bad!r}.", f"Choose one of: {', '.join(ON_BAD)}.")
        self._source, self._on_bad = source, on_bad
        self._reasons: dict[str, list[str]] = {}
        self._skipped: Counter[str] = Counter()

    def drop(self, name: str, reason: str) -> None:
        """Note a sample that cannot be used."""
        self._reasons.setdefault(reason, []).append(name)

    def skip(self, reason: str) -> None:
        """Note a sound record that the format leaves out."""
        self._skipped[reason] += 1

    def report(self, used: int, note: str = "") -> ReadReport:
        """Account for all samples.

        Raises:
            DataError: some cannot be used, and `on_bad` is "error".
        """
        reasons = {reason: tuple(names) for reason, names in self._reasons.items()}
        report = ReadReport(self._source, used, reasons, dict(self._skipped), note)
        if reasons and self._on_bad == "error":
            raise DataError(f"{self._source}: bad samples: {report.faults}.", "Repair them, or set on_bad drop.")
        return report


# ----------------------------------------------------------------------------------------------------
# The rules about single records that every reader, converter and check shares.


IMAGE_MISSING, ID_UNKNOWN = "image file missing", "image id not in image_data.json"
IMAGE_COUNT = "number of <image> differs from the number of images"


class BadRecord(Exception):
    """Reason why a record cannot be used."""


def missing_fields(record: Any, *fields: str) -> str:
    """Return "no a, b" for the fields that a record lacks, or ""; what is not a JSON object lacks all."""
    missing = [key for key in fields if not isinstance(record, dict) or key not in record]
    return f"no {', '.join(missing)}" if missing else ""


def text_fault(*texts: Any) -> str:
    """Return "empty text" unless each text is a string with more than white space; "" if all are."""
    return "" if all(isinstance(text, str) and text.strip() for text in texts) else "empty text"


def path_fault(name: str) -> str:
    """Return a fault if a dataset's file name leads out of its folder, where nothing must be read or written."""
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\0" in name
    return "image path leads out of its folder" if outside else ""


def check_pair(prompt: Any, chosen: Any, rejected: Any, context: str = "") -> str:
    """Return why texts are not a preference pair; empty if they are one.

    None but `context` may be empty, and the answers must differ in more than surrounding white space. Both must begin
    with `context` and go on after it, and may not have it twice.
    """
    if fault := text_fault(prompt, chosen, rejected):
        return fault
    if not (chosen.startswith(context) and rejected.startswith(context)):
        return "context is not the beginning of both answers"
    remainders = [answer[len(context) :].strip() for answer in (chosen, rejected)]
    if not all(remainders):
        return "nothing follows the context"
    # A file whose answers are whole, read as one whose answers continue the context.
    if context and any(remainder.startswith(context.strip()) for remainder in remainders):
        return "an answer repeats the context"
    return "chosen equals rejected" if remainders[0] == remainders[1] else ""


PAIR_OPTIONS = ("context", "complete")


def pair_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optional fields of a pair, from a record's keys or a row's columns of the same names.

    A context that is missing, null or white space is none; `complete` is true unless the record says otherwise.

    Raises:
        BadRecord: a value is of another type.
    """
    context, complete = (values.get(name) for name in PAIR_OPTIONS)
    if not isinstance(context, str | None):
        raise BadRecord("context is not text")
    truth = True if complete is None else as_bool(complete)
    if truth is None:
        raise BadRecord("complete is neither true nor false")
    return {"context": context if context and context.strip() else "", "complete": truth}


TRUTH = dict.fromkeys(("true", "yes", "y", "1"), True) | dict.fromkeys(("false", "no", "n", "0", "none", "null"), False)


def as_bool(value: Any) -> bool | None:
    """Parse a truth value in any of the forms found in files: true, 1, 1.0, "True", "yes", ...; null is false.

    Returns:
        The truth value, or None if the value is none of these.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # str(1.0) is not a key of TRUTH
    return TRUTH.get(str(value).strip().lower())


def as_id(value: Any) -> str:
    """Normalise an id: 42, "42", "000042" and 42.0 (from pandas columns with missing values) become the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return str(int(text)) if text.isascii() and text.isdecimal() else text
