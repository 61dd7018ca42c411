"""How a command ended that a test ran in its own process by the fixture `relook`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    def mistake(self, *said: str) -> None:
        """Assert that it ended as a user's mistake has to."""
        self.mistakes(*said)
        assert self.err.count("\n") == 1, self.err

    def mistakes(self, *said: str) -> None:
        """As `mistake`, of several: a line each."""
        assert self.status == 2, self.err
        assert self.out == ""
        assert all(line.startswith("relook: ") for line in self.err.splitlines())
        for text in said:
            assert text in self.err


Command = Callable[..., Ended]
