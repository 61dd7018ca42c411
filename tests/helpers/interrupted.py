"""Ctrl-C at a moment that a test chooses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest


def interrupt(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """The `at`-th call of a function does not come to its end; those after it do."""
    whole, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return whole(*arguments, **more)

    patch.setattr(owner, name, interrupted)
