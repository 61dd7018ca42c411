"""Errors that a user can act on: what is wrong, why, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from types import TracebackType


class RelookError(Exception):
    """Error that the user can fix. The command prints it as one line and exits with status 2.

    Args:
        what: what is wrong, naming the file, key or sample.
        fix: what to do about it.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem, self.fix = problem, fix
        super().__init__(f"{problem} {fix}".strip())


class DataError(RelookError):
    """Dataset file, record or image that cannot be used."""


class RecipeError(RelookError):
    """Recipe or command-line key that cannot be used."""


class CheckpointError(RelookError):
    """Model files that are missing, incomplete or incompatible."""


class Mistakes(RecipeError):
    """Several errors of one command, which prints a line for each."""

    def __init__(self, errors: Sequence[RelookError]) -> None:
        self.errors = errors
        super().__init__("\n".join(map(str, errors)))


class Faults:
    """Collector of the errors raised in `with` blocks, so that all are reported at once."""

    def __init__(self) -> None:
        self.errors: list[RelookError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        # Bugs and Ctrl-C must not be collected: only errors that the user can fix.
        if not isinstance(error, RelookError):
            return False
        self.errors += error.errors if isinstance(error, Mistakes) else [error]
        return True

    def check(self) -> None:
        """Raise the collected errors without repeats: a single error as it is, several as `Mistakes`."""
        # A dict by message drops repeats and keeps the order.
        errors = list({str(error): error for error in self.errors}.values())
        if errors:
            raise errors[0] if len(errors) == 1 else Mistakes(errors)


def preview(names: Sequence[object], limit: int = 5) -> str:
    """Return the first few of `names` and the number of the rest, for messages that list what is wrong."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: 1 step, 2,000 steps."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def most_similar(name: object, candidates: Iterable[object]) -> str | None:
    """Return the known name that resembles another most, capitals apart; None if none resembles it."""
    names = {str(candidate).lower(): str(candidate) for candidate in candidates}
    close = difflib.get_close_matches(str(name).lower(), names, 1, cutoff=0.7)
    return names[close[0]] if close else None


def did_you_mean(name: object, candidates: Iterable[object], otherwise: str = "") -> str:
    """Return the advice for a name that is not known: the most similar one, else `otherwise`, else all known names."""
    names = list(map(str, candidates))
    close = most_similar(name, names)
    return f"Did you mean {close}?" if close else otherwise or f"Known ones: {', '.join(names)}."
