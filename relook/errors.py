"""Errors that a user can act on: what is wrong, why, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType


class RelookError(Exception):
    """A mistake or a fault that the user can mend. The command prints it as one line and exits with status 2.

    Args:
        what: what is wrong, naming the file, key or sample.
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what} {fix}".strip())


class DataError(RelookError):
    """A dataset file, record or image that cannot be used."""


class RecipeError(RelookError):
    """A recipe or a command-line key that cannot be used."""


class CheckpointError(RelookError):
    """Model files that are missing, incomplete or do not fit."""


class Mistakes(RecipeError):
    """Several mistakes of one command; the command prints a line for each."""

    def __init__(self, errors: Sequence[RelookError]) -> None:
        self.errors = errors
        super().__init__("\n".join(map(str, errors)))


class Faults:
    """Collect the errors that are raised in `with` blocks, to name all of them at once."""

    def __init__(self) -> None:
        self.errors: list[RelookError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, RelookError):
            return False
        self.errors += error.errors if isinstance(error, Mistakes) else [error]
        return True

    def check(self) -> None:
        """Raise what was collected, equal ones once: the only error itself, several as `Mistakes`."""
        errors = list({str(error): error for error in self.errors}.values())
        if errors:
            raise errors[0] if len(errors) == 1 else Mistakes(errors)


def preview(names: Sequence[object], limit: int = 5) -> str:
    """The first few of `names`, and how many more there are: for messages that list what is wrong."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
