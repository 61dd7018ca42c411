"""Which variants of a parametrised test run by default."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def variants(values: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """Mark all but the `fast` variants of a test as slow.

    The default suite has three minutes, so a long test runs there on the variants that fail for most reasons, and
    `pytest -m slow` runs the others.
    """
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
