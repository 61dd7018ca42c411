"""What a reader could not use: counted by reason and named, so that no sample is lost silently."""

from __future__ import annotations

from dataclasses import dataclass, field

from relook.errors import DataError, some


@dataclass
class ReadReport:
    """Samples read and dropped by one reader. With `on_bad` "error" the first bad sample raises instead.

    Args:
        source: the file that is read, for messages.
    """

    source: str
    on_bad: str = "drop"
    kept: int = 0
    reasons: dict[str, list[str]] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        return sum(map(len, self.reasons.values()))

    def drop(self, name: str, reason: str) -> None:
        """Note a bad sample.

        Raises:
            DataError: bad samples are not to be dropped.
        """
        if self.on_bad == "error":
            raise DataError(f"{self.source}, sample {name}: {reason}.", "Repair it, or set on_bad drop.")
        self.reasons.setdefault(reason, []).append(name)

    def summary(self) -> str:
        """One line: how many were kept, and how many dropped for which reason."""
        line = f"{self.source}: {self.kept:,} samples"
        if not self.reasons:
            return f"{line}, none dropped."
        return f"{line}, {self.dropped:,} dropped ({'; '.join(f'{r}: {len(n)} ({some(n, 3)})' for r, n in self.reasons.items())})."
