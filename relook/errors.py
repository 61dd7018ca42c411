"""Errors that a user can act on: what is wrong, why, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


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


def some(names: Sequence[object], limit: int = 5) -> str:
    """The first few of `names`, and how many more there are: for messages that list what is wrong."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
