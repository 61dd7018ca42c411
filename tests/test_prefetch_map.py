"""Work done ahead by threads: order, how far, and what a failure costs."""

from __future__ import annotations

import threading

import pytest

from relook.data.images import WORKERS, prefetch_map


def test_it_is_map() -> None:
    assert list(prefetch_map(lambda n: n * n, range(50))) == [n * n for n in range(50)]
    assert list(prefetch_map(str, [])) == []


def test_the_next_is_under_way_while_the_first_is_used_and_no_more_than_a_few() -> None:
    asked: list[int] = []
    second = threading.Event()

    def inputs() -> object:
        for n in range(100):
            asked.append(n)
            yield n

    def work(n: int) -> int:
        if n == 1:
            second.set()
        return n

    found = prefetch_map(work, inputs())  # type: ignore[arg-type]
    assert next(found) == 0
    assert second.wait(30)
    assert len(asked) == WORKERS + 1
    assert list(found) == list(range(1, 100))


def test_a_failure_is_raised_where_its_result_is_due() -> None:
    def work(n: int) -> float:
        return 1 / (n - 3)

    found = prefetch_map(work, range(10))
    assert [next(found) for _ in range(3)] == [-1 / 3, -1 / 2, -1]
    with pytest.raises(ZeroDivisionError):
        next(found)
