"""Which variants of a parametrised test run by default."""

import itertools
from collections.abc import Container, Iterable, Sequence
from typing import Any

import pytest


def variants(values: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """Mark all but the `fast` variants of a test as slow.

    The default suite has three minutes, so a long test runs there on the variants that fail for most reasons, and
    `pytest -m slow` runs the others.
    """
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def crossed(*parameters: Sequence[Any]) -> list[Any]:
    """Cross several parameters; mark all combinations as slow but as many as meet every value of each once.

    It is for parameters that do not depend on each other: what fails, fails for one value in almost any company.
    """
    rows = max(map(len, parameters))
    fast = [tuple(values[row % len(values)] for values in parameters) for row in range(rows)]
    return [
        pytest.param(*values, marks=() if values in fast else pytest.mark.slow, id="-".join(map(str, values)))
        for values in itertools.product(*parameters)
    ]
