"""What every reader returns and every other room takes: three frozen kinds of sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from relook.errors import DataError, RecipeError, some

# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferencePair:
    """One image and prompt with a preferred and a dispreferred response.

    `prompt` is the bare question, without `<image>`, role names or a template.
    """

    id: str
    image: Path
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Turn:
    """One exchange of a conversation. `prompt` may hold `<image>` placeholders, in the order of the images."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Conversation:
    """A supervised sample: zero or more images and one or more exchanges."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Question:
    """A question on one image. `label` is the expected answer ("yes" or "no"), empty where none is known."""

    id: str
    image: Path
    text: str
    label: str = ""


# ----------------------------------------------------------------------------------------------------
# What a reader kept, skipped and could not use: counted by reason and named, so that no sample is lost silently.

ON_BAD = ("drop", "error")


@dataclass(frozen=True)
class ReadReport:
    """What one reader did with its file.

    Args:
        source: the file or files that were read.
        kept: samples returned.
        reasons: why samples could not be used, and the names of those samples.
        skipped: records that the format itself leaves out, counted by reason. They are no fault.
    """

    source: str
    kept: int
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        return sum(map(len, self.reasons.values()))

    def summary(self) -> str:
        """One line: how many were kept, skipped and dropped, and why."""
        parts = [f"{self.kept:,} samples"]
        parts += [f"{count:,} skipped ({reason})" for reason, count in self.skipped.items()]
        faults = "; ".join(f"{reason}: {len(names):,} ({some(names, 3)})" for reason, names in self.reasons.items())
        parts.append(f"{self.dropped:,} dropped ({faults})" if faults else "none dropped")
        return f"{self.source}: {', '.join(parts)}."


class Sieve:
    """Collects what a reader leaves out while it reads; `report` closes the account.

    Args:
        source: the file that is read, for messages.
        on_bad: "drop" notes a bad sample; "error" raises at the first one.

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
        """Note a sample that cannot be used.

        Raises:
            DataError: bad samples are not to be dropped.
        """
        if self._on_bad == "error":
            raise DataError(f"{self._source}, sample {name}: {reason}.", "Repair it, or set on_bad drop.")
        self._reasons.setdefault(reason, []).append(name)

    def skip(self, reason: str) -> None:
        """Note a sound record that the format leaves out."""
        self._skipped[reason] += 1

    def report(self, kept: int) -> ReadReport:
        reasons = {reason: tuple(names) for reason, names in self._reasons.items()}
        return ReadReport(self._source, kept, reasons, dict(self._skipped))
